"""Statements on results over time, of the newest log of a task.

In a log, rows follow time, so a time is located by bisection over rows. Index results_by_row has the rows of all logs:
each statement has bounds of rows, beyond which those of a replaced store may continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling.labels import TaskLog
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


def load_newest(db: Connection, device: str, task: str, limit: int) -> list[Row]:
    """Return (row, t, label, score, value, log, seq) of the newest results, newest first."""
    [newest] = find_newest_logs(db, [(device, task)])
    return [] if newest is None else db.execute(NEWEST, (device, task, *newest, limit)).fetchall()


def load_outputs(db: Connection, device: str, results: Sequence[Row]) -> dict[int, str]:
    """Return row → further outputs, as JSON, of results as in `load_newest`."""
    keys = [(device, log, seq, row) for row, *_, log, seq in results]
    details = db.execute_each(OUTPUTS, keys)
    return {key[3]: str(item[0]) for key, item in zip(keys, details, strict=True) if item and item[0]}


def load_last_of_each(db: Connection, tasks: Sequence[tuple[str, str]]) -> list[Row | None]:
    """Return the newest result of each (device, task), as in `load_newest`."""
    # Without a log, no row is below 0.
    logs = [newest or ("", -1) for newest in find_newest_logs(db, tasks)]
    return db.execute_each(NEWEST, [(*task, *log, 1) for task, log in zip(tasks, logs, strict=True)])


def load_series(db: Connection, device: str, task: str, since_us: int, until_us: int, points: int) -> tuple[
    list[Row], bool
]:  # fmt: skip
    """Return up to `points` results between two times, and True if they are a sample at even distances of rows."""
    [newest] = find_newest_logs(db, [(device, task)])
    last = None if newest is None else db.execute(LAST, (device, task, *newest)).fetchone()
    if newest is None or last is None:
        return [], False
    key = (device, task, newest[0])
    first_row = _first_row_since(db, key, since_us, last)
    last_row = _first_row_since(db, key, until_us, last) if until_us < last[1] else last[0]
    rows = db.execute(SPAN, (*key, first_row, last_row, points + 1)).fetchall()
    if len(rows) <= points:
        return rows, False
    step = max(1, (last_row - first_row) // points)
    places = [(*key, row, last_row) for row in range(first_row, last_row + 1, step)]
    sampled: dict[int, Any] = {row[0]: row for row in db.execute_each(POINT, places) if row is not None}
    return [sampled[row] for row in sorted(sampled)], True


def _first_row_since(db: Connection, key: TaskLog, t_us: int, last: Row) -> int:
    """Return the first row whose result is not older than `t_us`; the row after the last one if there is none."""
    if last[1] < t_us:
        return int(last[0]) + 1
    low, high = 0, int(last[0])
    for _ in range(_MAX_STEPS):
        if low >= high:
            break
        middle = (low + high) // 2
        row = db.execute(AT_OR_AFTER, (*key, middle, last[0])).fetchone()
        if row is not None and row[1] < t_us:
            low = int(row[0]) + 1
        else:
            high = middle
    return low
