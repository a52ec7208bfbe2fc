"""Labels that come to the collector instead of the device: joined with its results here, by the same pure code.

Rows count anew in each log, so that a label is of a result of the device's newest log that has results of the task. One
label a row: the last wins. Metrics are of all labelled results of the newest bundle that has any in that log, and
replace those computed here before. Slices are the device's alone: what they are of does not come here.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent.arrays import Float64s
from agent.fleet import bundle_history
from agent.fleet.bundle_history import BundleLabelSchema, BundleRun
from agent.fleet.database.interface import Connection
from agent.performance import metrics as quality
from agent.performance.labels import MODEL, Label, count_sources
from agent.performance.metrics import LabelledPredictions, MetricEstimate

SOURCE = "collector"
_MATCH_TOLERANCE_US = 500
_NEWEST_LOG = """
    SELECT l.log FROM logs l WHERE l.device = :device AND EXISTS (
        SELECT 1 FROM results r WHERE r.device = l.device AND r.task = :task AND r.log = l.log)
    ORDER BY l.rowid DESC LIMIT 1"""
_UPSERT_LABEL = """
    INSERT INTO labels VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, task, log, row) DO UPDATE SET
        label = excluded.label, source = excluded.source, received = excluded.received"""
_LABELLED_RESULTS = """
    SELECT l.label, l.source, r.label, r.score, r.value, r.seq FROM labels l
    JOIN results r ON r.device = l.device AND r.task = l.task AND r.row = l.row AND r.log = l.log
    WHERE l.device = ? AND l.task = ? AND l.log = ? ORDER BY l.row"""


class LabelOutcome(msgspec.Struct, frozen=True):
    """`rejected` position → reason; `replaced` labels of rows that had one; `sources` of all labels there are now.

    `metrics` are of the results of `model`, None without any; `others` are labels of results of other bundles.
    """

    accepted: int
    replaced: int
    rejected: dict[int, str]
    sources: dict[str, int]
    metrics: list[MetricEstimate]
    model: BundleRun | None
    other_bundle_labels: int

    @property
    def sparse_warning(self) -> str | None:
        """What to know where the device lists a part of its results only."""
        if self.model is None or self.model.listed >= self.model.results:
            return None
        return (
            f"the device lists {self.model.listed} of {self.model.results} results of this bundle (its publish), and "
            "which ones depends on what the model said: these metrics are of those, not of all its results. Send the "
            "labels to the device (--send), or let it publish all."
        )


def add(db: Connection, device: str, task: str, labels: Sequence[Label], now: str) -> LabelOutcome:
    """Add labels and compute metrics anew, in the caller's transaction. Raises ValueError without any results."""
    db.lock_devices([device])
    found = db.execute(_NEWEST_LOG, {"device": device, "task": task}).fetchone()
    if found is None:
        raise ValueError(f"no results of task {task!r} of {device} are here")
    log = str(found[0])
    sql = "SELECT t, row, seq FROM results WHERE device = ? AND task = ? AND log = ? ORDER BY t, row"
    places = _ResultIndex(db.execute(sql, (device, task, log)).fetchall())
    bundles = _BundleSchemas(db, device, task, log, [label.text for label in labels])
    rejected: dict[int, str] = {}
    accepted = replaced = 0
    for index, label in enumerate(labels):
        row = places.find_row(label)
        # PostgreSQL has no text with it.
        if "\0" in label.text:
            rejected[index] = "holds the character NUL"
            continue
        problem = _missing_reason(label) if row is None else bundles.check_label(label, places.seq_by_row[row])
        if problem is not None:
            rejected[index] = problem
            continue
        before = (device, task, log, row)
        sql = "SELECT label, source FROM labels WHERE device = ? AND task = ? AND log = ? AND row = ?"
        old = db.execute(sql, before).fetchone()
        replaced += old is not None and tuple(old) != (label.text, label.source)
        accepted += 1
        db.execute(_UPSERT_LABEL, (*before, label.text, label.source, now))
    rows = db.execute(_LABELLED_RESULTS, (device, task, log)).fetchall()
    judged = [row for row in rows if row[1] != MODEL]
    model = bundles.runs.get(max((row[5] for row in judged), default=0))
    of_model = [row for row in judged if bundles.runs.get(row[5]) is model]
    metrics = _compute_metrics(bundles.get_schema(model), of_model) if model else []
    _store_metrics(db, device, task, log, metrics, now)
    others = len(judged) - len(of_model)
    return LabelOutcome(accepted, replaced, rejected, count_sources([row[1] for row in rows]), metrics, model, others)


class _ResultIndex:
    """Results by row and by time; `message` has the seq of each."""

    def __init__(self, results: list[tuple[int, int, int]]) -> None:
        self._times, self._rows = [t for t, _, _ in results], [row for _, row, _ in results]
        self.seq_by_row = {row: seq for _, row, seq in results}
        between = np.diff(self._times)
        self._max_distance_us = max(_MATCH_TOLERANCE_US, int(np.median(between)) // 2 if len(between) else 0)

    def find_row(self, label: Label) -> int | None:
        """The row of the result it is of: exactly, or nearest in time within half of what lies between results."""
        if label.row is not None:
            return label.row if label.row in self.seq_by_row else None
        t = label.t or 0
        at = bisect.bisect_left(self._times, t)
        near = [i for i in (at - 1, at) if 0 <= i < len(self._times)]
        best = min(near, key=lambda i: abs(self._times[i] - t), default=None)
        return None if best is None or abs(self._times[best] - t) > self._max_distance_us else self._rows[best]


def _missing_reason(label: Label) -> str:
    return f"row {label.row} has no result here" if label.row is not None else "no result is that near to this time"


class _BundleSchemas:
    """What each message's results are of, and what labels of them may be."""

    def __init__(self, db: Connection, device: str, task: str, log: str, texts: Sequence[str]) -> None:
        self._db, self._log_key = db, (device, task, log)
        self.runs = bundle_history.load_bundle_runs(db, device, task, log)
        sql = "SELECT DISTINCT label FROM labels WHERE device = ? AND task = ? AND log = ? AND source <> ?"
        self._label_texts = [*texts, *(row[0] for row in db.execute(sql, (*self._log_key, MODEL)))]
        self._schemas: dict[str, BundleLabelSchema] = {}

    def get_schema(self, model: BundleRun) -> BundleLabelSchema:
        if model.digest not in self._schemas:
            self._schemas[model.digest] = bundle_history.resolve_label_schema(
                self._db, *self._log_key, model.digest, self._label_texts
            )
        return self._schemas[model.digest]

    def check_label(self, label: Label, seq: int) -> str | None:
        """Why a label of a result in this message is refused."""
        meaning = self.get_schema(self.runs[seq])
        try:
            meaning.label_schema.parse(label.text)
        except ValueError as problem:
            hint = "" if meaning.declared else ", as far as its results here tell; the device knows all (--send)"
            return f"{problem}{hint}"
        return None


def _compute_metrics(schema: BundleLabelSchema, rows: Sequence[tuple[Any, ...]]) -> list[MetricEstimate]:
    """Of (label, source, named, score, value, …) each; one that is not understood any more is left out."""
    truth, known = schema.label_schema, []
    for row in rows:
        with contextlib.suppress(ValueError):
            known.append((truth.parse(row[0]), row[2], row[3], row[4]))
    if truth.kind == "classify":
        named = [one for one in known if one[1] in truth.labels]
        said = np.array([truth.labels.index(one[1]) for one in named], np.int64)
        score = np.array([np.nan if one[2] is None else one[2] for one in named], np.float64)
        return quality.compute_metrics("classify", truth.labels, LabelledPredictions(_true_values(named), said, score))
    numbers = [one for one in known if one[3] is not None]
    value = np.array([one[3] for one in numbers], np.float64)
    above = None
    if truth.kind == "anomaly" and schema.threshold is not None:
        above = (value > schema.threshold).astype(np.int64)
    return quality.compute_metrics(
        truth.kind, truth.labels, LabelledPredictions(_true_values(numbers), above, value=value)
    )


def _true_values(labelled: Sequence[tuple[Any, ...]]) -> Float64s:
    return np.array([one[0] for one in labelled], np.float64)


def _store_metrics(
    db: Connection, device: str, task: str, log: str, metrics: Sequence[MetricEstimate], now: str
) -> None:
    db.execute("DELETE FROM metrics WHERE device = ? AND task = ? AND source = ?", (device, task, SOURCE))
    db.executemany(
        "INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (device, task, now, one.metric, one.slice, one.value, one.low, one.high, one.n, one.state, SOURCE, log, 0)
            for one in metrics
        ],
    )
