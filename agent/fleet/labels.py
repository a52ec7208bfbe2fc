"""Labels that come to the collector instead of the device: joined with its results here, by the same pure code.

Rows count anew in each log, so that a label is of a result of the device's newest log that has results of the task. One
label a row: the last wins. Metrics are of all labelled results of that log, and replace those computed here before.
"""

from __future__ import annotations

import bisect
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.drift import quality
from agent.drift.quality import Metric, Pairs
from agent.drift.truth import MODEL, Label, Truth, told

SOURCE = "collector"
_NEAR_US = 500
_NEWEST = """
    SELECT l.log FROM logs l WHERE l.device = :device AND EXISTS (
        SELECT 1 FROM results r WHERE r.device = l.device AND r.task = :task AND r.log = l.log)
    ORDER BY l.rowid DESC LIMIT 1"""
_LABELLED = """
    SELECT l.label, l.source, r.label, r.score, r.value FROM labels l
    JOIN results r ON r.device = l.device AND r.task = l.task AND r.row = l.row AND r.log = l.log
    WHERE l.device = ? AND l.task = ? AND l.log = ? ORDER BY l.row"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`rejected` position → reason; `replaced` labels of rows that had one; `metrics` of all labels there are now."""

    accepted: int
    replaced: int
    rejected: dict[int, str]
    sources: dict[str, int]
    metrics: list[Metric]


def take(db: sqlite3.Connection, device: str, task: str, labels: Sequence[Label], now: str) -> Outcome:
    """Add labels and compute metrics anew, in the caller's transaction. Raises ValueError without any results."""
    found = db.execute(_NEWEST, {"device": device, "task": task}).fetchone()
    if found is None:
        raise ValueError(f"no results of task {task!r} of {device} are here")
    log = str(found[0])
    sql = "SELECT t, row FROM results WHERE device = ? AND task = ? AND log = ? ORDER BY t, row"
    places = _Places(db.execute(sql, (device, task, log)).fetchall())
    truth = _truth(db, device, task, log)
    rejected: dict[int, str] = {}
    accepted = replaced = 0
    for index, label in enumerate(labels):
        row = places.find(label)
        problem = _problem(truth, label, row)
        if problem is not None:
            rejected[index] = problem
            continue
        before = (device, task, log, row)
        sql = "SELECT label, source FROM labels WHERE device = ? AND task = ? AND log = ? AND row = ?"
        old = db.execute(sql, before).fetchone()
        replaced += old is not None and tuple(old) != (label.text, label.source)
        accepted += 1
        db.execute(
            "INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?)", (*before, label.text, label.source, now)
        )
    rows = db.execute(_LABELLED, (device, task, log)).fetchall()
    metrics = _measure(truth.kind, [row for row in rows if row[1] != MODEL])
    _write(db, device, task, log, metrics, now)
    return Outcome(accepted, replaced, rejected, told([row[1] for row in rows]), metrics)


class _Places:
    """Results by row and by time."""

    def __init__(self, found: list[tuple[int, int]]) -> None:
        self._times, self._rows = [t for t, _ in found], [row for _, row in found]
        self._known = set(self._rows)
        between = np.diff(self._times)
        self._most = max(_NEAR_US, int(np.median(between)) // 2 if len(between) else 0)

    def find(self, label: Label) -> int | None:
        """The row of the result it is of: exactly, or nearest in time within half of what lies between results."""
        if label.row is not None:
            return label.row if label.row in self._known else None
        t = label.t or 0
        at = bisect.bisect_left(self._times, t)
        near = [i for i in (at - 1, at) if 0 <= i < len(self._times)]
        best = min(near, key=lambda i: abs(self._times[i] - t), default=None)
        return None if best is None or abs(self._times[best] - t) > self._most else self._rows[best]


def _truth(db: sqlite3.Connection, device: str, task: str, log: str) -> Truth:
    """As far as results tell: classes that were never named are not known here, and are taken as they come."""
    sql = "SELECT max(label IS NOT NULL) FROM results WHERE device = ? AND task = ? AND log = ?"
    return Truth("classify" if db.execute(sql, (device, task, log)).fetchone()[0] else "regress")


def _problem(truth: Truth, label: Label, row: int | None) -> str | None:
    if row is None:
        return f"row {label.row} has no result here" if label.row is not None else "no result is that near to this time"
    if truth.kind == "regress":
        try:
            truth.read(label.text)
        except ValueError as problem:
            return str(problem)
    return None


def _measure(kind: str, rows: Sequence[tuple[Any, ...]]) -> list[Metric]:
    if not rows:
        return []
    if kind == "regress":
        known = [(float(row[0]), row[4]) for row in rows if row[4] is not None]
        values = np.array([value for _, value in known], np.float64)
        return quality.measure(kind, (), Pairs(np.array([label for label, _ in known], np.float64), value=values))
    known_labels = tuple(sorted({row[0] for row in rows} | {row[2] for row in rows if row[2] is not None}))
    code = {label: index for index, label in enumerate(known_labels)}
    named = [row for row in rows if row[2] is not None]
    score = np.array([np.nan if row[3] is None else row[3] for row in named], np.float64)
    truth = np.array([code[row[0]] for row in named], np.float64)
    said = np.array([code[row[2]] for row in named], np.int64)
    return quality.measure(kind, known_labels, Pairs(truth, said, score))


def _write(db: sqlite3.Connection, device: str, task: str, log: str, metrics: Sequence[Metric], now: str) -> None:
    db.execute("DELETE FROM metrics WHERE device = ? AND task = ? AND source = ?", (device, task, SOURCE))
    db.executemany(
        "INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (device, task, now, one.metric, one.slice, one.value, one.low, one.high, one.n, one.state, SOURCE, log, 0)
            for one in metrics
        ],
    )
