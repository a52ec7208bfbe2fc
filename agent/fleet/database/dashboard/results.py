"""Statements on results over time. Rows of a task follow its time, so a time is found by bisection over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.fleet.database.interface import Connection, Row

LAST = "SELECT row, t FROM results WHERE device = ? AND task = ? ORDER BY row DESC LIMIT 1"
AT_OR_AFTER = "SELECT row, t FROM results WHERE device = ? AND task = ? AND row >= ? ORDER BY row LIMIT 1"
POINT = """
    SELECT row, t, label, score, value, log, seq FROM results
    WHERE device = ? AND task = ? AND row >= ? ORDER BY row LIMIT 1"""
SPAN = """
    SELECT row, t, label, score, value, log, seq FROM results
    WHERE device = ? AND task = ? AND row >= ? AND row <= ? ORDER BY row LIMIT ?"""
LAST_RESULT = """
    SELECT row, t, label, score, value, log, seq FROM results
    WHERE device = ? AND task = ? ORDER BY row DESC LIMIT 1"""
NEWEST = """
    SELECT row, t, label, score, value, log, seq FROM results
    WHERE device = ? AND task = ? ORDER BY row DESC LIMIT ?"""
_MAX_STEPS = 64


def load_newest(db: Connection, device: str, task: str, limit: int) -> list[Row]:
    """Return (row, t, label, score, value, log, seq) of the newest results, newest first."""
    return db.execute(NEWEST, (device, task, limit)).fetchall()


def load_last_of_each(db: Connection, tasks: Sequence[tuple[str, str]]) -> list[Row | None]:
    """Return the newest result of each (device, task), as in `load_newest`."""
    return db.execute_each(LAST_RESULT, tasks)


def load_series(db: Connection, device: str, task: str, since_us: int, until_us: int, points: int) -> tuple[
    list[Row], bool
]:  # fmt: skip
    """Return up to `points` results between two times, and True if they are a sample at even distances of rows."""
    last = db.execute(LAST, (device, task)).fetchone()
    if last is None:
        return [], False
    first_row = _first_row_since(db, device, task, since_us, last)
    last_row = _first_row_since(db, device, task, until_us, last) if until_us < last[1] else last[0]
    rows = db.execute(SPAN, (device, task, first_row, last_row, points + 1)).fetchall()
    if len(rows) <= points:
        return rows, False
    step = max(1, (last_row - first_row) // points)
    places = [(device, task, row) for row in range(first_row, last_row + 1, step)]
    sampled: dict[int, Any] = {row[0]: row for row in db.execute_each(POINT, places) if row is not None}
    return [sampled[row] for row in sorted(sampled)], True


def _first_row_since(db: Connection, device: str, task: str, t_us: int, last: Row) -> int:
    """Return the first row whose result is not older than `t_us`; the row after the last one if there is none."""
    if last[1] < t_us:
        return int(last[0]) + 1
    low, high = 0, int(last[0])
    for _ in range(_MAX_STEPS):
        if low >= high:
            break
        middle = (low + high) // 2
        row = db.execute(AT_OR_AFTER, (device, task, middle)).fetchone()
        if row is not None and row[1] < t_us:
            low = int(row[0]) + 1
        else:
            high = middle
    return low
