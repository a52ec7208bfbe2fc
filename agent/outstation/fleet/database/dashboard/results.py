"""Statements on results over time, of the newest log of a task.

In a log, rows follow time, so a time is located by bisection over rows. Index results_by_row has the rows of all logs:
each statement has bounds of rows, beyond which those of a replaced store may continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling.labelled_results import TaskLog
from outstation.fleet.database.log_succession import find_newest_logs

_OF_LOG = "FROM results WHERE device = ? AND task = ? AND log = ?"
_COLUMNS = "row, t, label, score, value, log, seq"
LAST = f"SELECT row, t {_OF_LOG} AND row <= ? ORDER BY row DESC LIMIT 1"
AT_OR_AFTER = f"SELECT row, t {_OF_LOG} AND row >= ? AND row <= ? ORDER BY row LIMIT 1"
POINT = f"SELECT {_COLUMNS} {_OF_LOG} AND row >= ? AND row <= ? ORDER BY row LIMIT 1"
SPAN = f"SELECT {_COLUMNS} {_OF_LOG} AND row >= ? AND row <= ? ORDER BY row LIMIT ?"
NEWEST = f"SELECT {_COLUMNS} {_OF_LOG} AND row <= ? ORDER BY row DESC LIMIT ?"
OUTPUTS = "SELECT outputs FROM result_details WHERE device = ? AND log = ? AND seq = ? AND row = ?"
_MAX_STEPS = 64


class StoredResult(NamedTuple):
    """A result of the first output; `t`: epoch µs."""

    row: int
    t: int
    label: str | None
    score: float | None
    value: float | None
    log: str
    seq: int


def load_newest(db: Connection, device: str, task: str, limit: int) -> list[StoredResult]:
    """Return the newest results, newest first."""
    [newest] = find_newest_logs(db, [(device, task)])
    return [] if newest is None else [*map(StoredResult._make, db.execute(NEWEST, (device, task, *newest, limit)))]


def load_outputs(db: Connection, device: str, results: Sequence[StoredResult]) -> dict[int, str]:
    """Return row → further outputs, as JSON."""
    keys = [(device, result.log, result.seq, result.row) for result in results]
    details = db.execute_each(OUTPUTS, keys)
    return {key[3]: str(item[0]) for key, item in zip(keys, details, strict=True) if item and item[0]}


def load_last_of_each(db: Connection, tasks: Sequence[tuple[str, str]]) -> list[StoredResult | None]:
    """Return the newest result of each (device, task)."""
    # Without a log, no row is below 0.
    logs = [newest or ("", -1) for newest in find_newest_logs(db, tasks)]
    rows = db.execute_each(NEWEST, [(*task, *log, 1) for task, log in zip(tasks, logs, strict=True)])
    return [row and StoredResult._make(row) for row in rows]


def load_series(db: Connection, device: str, task: str, since_us: int, until_us: int, points: int) -> tuple[
    list[StoredResult], bool
]:  # fmt: skip
    """Return up to `points` results between two times, and True if they are a sample at even distances of rows."""
    [newest] = find_newest_logs(db, [(device, task)])
    last = None if newest is None else db.execute(LAST, (device, task, *newest)).fetchone()
    if newest is None or last is None:
        return [], False
    key = (device, task, newest[0])
    first_row = _first_row_since(db, key, since_us, last)
    last_row = _first_row_since(db, key, until_us, last) if until_us < last[1] else last[0]
    rows = [*map(StoredResult._make, db.execute(SPAN, (*key, first_row, last_row, points + 1)))]
    if len(rows) <= points:
        return rows, False
    step = max(1, (last_row - first_row) // points)
    places = [(*key, row, last_row) for row in range(first_row, last_row + 1, step)]
    sampled = {result.row: result for result in map(StoredResult._make, filter(None, db.execute_each(POINT, places)))}
    return [sampled[row] for row in sorted(sampled)], True


def _first_row_since(db: Connection, key: TaskLog, t_us: int, last: Row) -> int:
    """Return the first row whose result is not older than `t_us`; the row after the last one if there is none."""
    newest, newest_us = last
    if newest_us < t_us:
        return int(newest) + 1
    low, high = 0, int(newest)
    for _ in range(_MAX_STEPS):
        if low >= high:
            break
        middle = (low + high) // 2
        row, row_us = db.execute(AT_OR_AFTER, (*key, middle, newest)).fetchone() or (middle, t_us)
        if row_us < t_us:
            low = int(row) + 1
        else:
            high = middle
    return low
