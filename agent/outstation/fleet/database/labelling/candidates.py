"""Statements on results whose first output has no label yet; each inside a snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling.labelled_results import TaskLog

# Tables of bundles are small, where results are many.
_TASKS = """
    SELECT DISTINCT device, task FROM result_provenance
    WHERE (CAST(:device AS TEXT) IS NULL OR device = :device) AND (CAST(:task AS TEXT) IS NULL OR task = :task)
      AND device NOT IN (SELECT device FROM retired_devices) ORDER BY device, task"""
_NEWEST = """
    SELECT row, t, label, score, value, seq FROM results
    WHERE device = ? AND task = ? AND log = ? AND row <= ? ORDER BY row DESC LIMIT ?"""
_DRIFTED = """
    SELECT first, last, features FROM drift_windows
    WHERE task = ? AND device = ? AND state = 'drift' AND log = ? AND last >= ? ORDER BY "to" DESC LIMIT ?"""
_LABELLED_ROWS = """
    SELECT row FROM labels
    WHERE device = :device AND task = :task AND log = :log AND row >= :row AND output = ''
    UNION SELECT row FROM verdicts WHERE device = :device AND task = :task AND log = :log AND row >= :row"""
_CLASSES = """
    SELECT label, count(*) FROM (
        SELECT row, label FROM labels
        WHERE device = :device AND task = :task AND log = :log AND source <> 'model' AND output = ''
        UNION SELECT row, label FROM agreed_verdicts WHERE device = :device AND task = :task AND log = :log) known
    GROUP BY label"""


class UnlabelledResult(NamedTuple):
    """A result of the first output; `t`: epoch µs."""

    row: int
    t: int
    label: str | None
    score: float | None
    value: float | None
    seq: int


def list_tasks(db: Connection, device: str | None, task: str | None) -> Sequence[tuple[str, str]]:
    """Return (device, task) of all that ever had results, without retired devices."""
    return db.execute(_TASKS, {"device": device, "task": task}).fetchall()


def load_newest(db: Connection, key: TaskLog, last_row: int, limit: int) -> list[UnlabelledResult]:
    """Return the newest results up to `last_row`, newest first."""
    return [*map(UnlabelledResult._make, db.execute(_NEWEST, (*key, last_row, limit)))]


def load_drifted(db: Connection, key: TaskLog, since_row: int, limit: int) -> list[Row]:
    """Return (first row, last row, features as JSON) of the newest windows with drift."""
    device, task, log = key
    return db.execute(_DRIFTED, (task, device, log, since_row, limit)).fetchall()


def load_labelled_rows(db: Connection, key: TaskLog, since_row: int) -> set[int]:
    """Return the rows of results that have a label or a verdict."""
    return {row for (row,) in db.execute(_LABELLED_ROWS, _values(key) | {"row": since_row})}


def count_classes(db: Connection, key: TaskLog) -> dict[str, int]:
    """Return the number of results that are known to be of each class."""
    return {label: int(n) for label, n in db.execute(_CLASSES, _values(key))}


def _values(key: TaskLog) -> dict[str, Any]:
    return dict(zip(("device", "task", "log"), key, strict=True))
