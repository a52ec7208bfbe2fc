"""Labels at the collector: join them with collected results, or split them into commands for the device.

Rows are numbered per log, so a label belongs to the device's newest log with results of the task. Each output of a row
has one label; the last one wins. Metrics of an output cover all labelled results of the newest bundle with such labels
in that log, and replace the metrics computed here before. Only the device computes slices, because their columns are
not sent to the collector.
"""

from __future__ import annotations

import bisect
import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.fleet import bundle_history
from outstation.fleet.bundle_history import BundleLabelSchema, BundleRun
from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.labelling import labelled_results as label_tables
from outstation.fleet.database.labelling.labelled_results import LabelledResult, Place, TaskLog
from outstation.foundation.config.toml_files import did_you_mean
from outstation.ml.performance.estimates import MetricEstimate, compute_metrics
from outstation.ml.performance.labels import MODEL, VERDICT, Label, count_sources
from outstation.ml.performance.metrics import LabelledPredictions
from outstation.protocol.wire.commands import MAX_ARGUMENT_LENGTH

SOURCE = "collector"
_MATCH_TOLERANCE_US = 500
_MAX_LABELS_PER_COMMAND = 200


class OutputEvaluation(msgspec.Struct, frozen=True, kw_only=True):
    """All stored labels of one output, and its metrics.

    `sources`: number of labels by source. `metrics` are of the results of `model`, None without labelled results;
    `other_bundle_labels` counts labels of results of other bundles.
    """

    sources: dict[str, int]
    metrics: list[MetricEstimate]
    model: BundleRun | None
    other_bundle_labels: int

    @property
    def sparse_warning(self) -> str | None:
        """Warning that the metrics are of a biased sample; None if the device publishes all results."""
        if self.model is None or self.model.listed >= self.model.results:
            return None
        return (
            f"the device publishes {self.model.listed} of {self.model.results} results of this bundle (task option "
            "publish), selected by the model's own scores, so these metrics are of a biased sample. Send the labels "
            'to the device (--send), or set publish = "all".'
        )


class LabelOutcome(OutputEvaluation, frozen=True, kw_only=True):
    """Outcome of joining labels with results, and the evaluation of the first output.

    `rejected`: position → reason. `replaced`: labels that changed. `further`: evaluations of further outputs.
    """

    accepted: int
    replaced: int
    rejected: dict[int, str]
    further: dict[str, OutputEvaluation]


def add(db: Connection, device: str, task: str, labels: Sequence[Label], now: str, by: str) -> LabelOutcome:
    """Store labels by `by` and recompute the metrics, in the caller's transaction.

    Raises ValueError without any results.
    """
    db.lock_devices([device])
    log = label_tables.find_newest_log(db, device, task)
    if log is None:
        rows = db.execute("SELECT DISTINCT task FROM results WHERE device = ?", (device,)).fetchall()
        known = [str(name) for (name,) in rows]
        hint = did_you_mean(task, known, "none of other tasks either")
        raise ValueError(f"the collector has no results of task {task!r} of {device}{hint}")
    key = (device, task, log)
    results = _ResultIndex(label_tables.load_results(db, key))
    schemas = _BundleSchemas(db, key, labels)
    stored = label_tables.load_labels(db, key)
    given: dict[Place, tuple[str, str]] = {}
    rejected: dict[int, str] = {}
    replaced = 0
    for index, label in enumerate(labels):
        row, problem = results.find_row(label), None
        # PostgreSQL cannot store it in text.
        if "\0" in label.text:
            problem = "holds the character NUL"
        elif label.source == VERDICT:
            problem = "a verdict is no ground truth; give it by `outstation fleet labels verdict result`"
        elif row is not None:
            problem = schemas.check_label(label, results.seq_by_row[row])
        if row is None or problem is not None:
            missing = (
                "no result is that near to this time" if label.row is None else f"row {label.row} has no result here"
            )
            rejected[index] = problem or missing
            continue
        place = (row, label.output)
        former = given.get(place, stored.get(place))
        given[place] = (label.text, label.source)
        replaced += former is not None and former != given[place]
    label_tables.save_labels(db, key, given, now, by)
    outputs = ["", *label_tables.list_labelled_outputs(db, key)]
    first, *others = evaluations = [_evaluate(db, key, schemas, output) for output in outputs]
    rows = [
        row
        for output, each in zip(outputs, evaluations, strict=True)
        for row in metric_rows(each.metrics, device, task, log, now, SOURCE, output)
    ]
    label_tables.replace_metrics(db, device, task, SOURCE, rows)
    return LabelOutcome(
        **msgspec.structs.asdict(first),
        accepted=len(labels) - len(rejected),
        replaced=replaced,
        rejected=rejected,
        further=dict(zip(outputs[1:], others, strict=True)),
    )


def _evaluate(db: Connection, key: TaskLog, schemas: _BundleSchemas, output: str) -> OutputEvaluation:
    rows = label_tables.load_labelled_results(db, key, output)
    judged = [result for result in rows if result.source != MODEL]
    model = schemas.runs.get(max((result.seq for result in judged), default=0))
    of_model = [result for result in judged if schemas.runs.get(result.seq) is model]
    schema = None if model is None else schemas.find_schema(model, output)
    return OutputEvaluation(
        sources=count_sources([result.source for result in rows]),
        metrics=[] if schema is None else compute_label_metrics(schema, of_model),
        model=model,
        other_bundle_labels=len(judged) - len(of_model),
    )


def split_labels(labels: Sequence[Label]) -> Iterator[tuple[int, int, str]]:
    """Split labels into arguments of `label` commands: (first, end, JSON columns of at most MAX_ARGUMENT_LENGTH)."""
    first = 0
    while first < len(labels):
        end = min(first + _MAX_LABELS_PER_COMMAND, len(labels))
        while len(text := _encode_columns(labels[first:end])) > MAX_ARGUMENT_LENGTH:
            end = first + (end - first) // 2
        yield first, end, text
        first = end


def _encode_columns(labels: Sequence[Label]) -> str:
    columns: dict[str, list[Any]] = {
        "row": [label.row for label in labels],
        "t": [None if label.t is None else label.t / 1e6 for label in labels],
        "label": [label.text for label in labels],
        "source": [label.source for label in labels],
    }
    if any(label.output for label in labels):
        columns["output"] = [label.output for label in labels]
    return json.dumps(columns, separators=(",", ":"))


class _ResultIndex:
    """Results by row and by time; `seq_by_row` has the message of each."""

    def __init__(self, results: list[tuple[int, int, int]]) -> None:
        self._times, self._rows = [t for t, _, _ in results], [row for _, row, _ in results]
        self.seq_by_row = {row: seq for _, row, seq in results}
        intervals = np.diff(self._times)
        self._max_distance_us = max(_MATCH_TOLERANCE_US, int(np.median(intervals)) // 2 if len(intervals) else 0)

    def find_row(self, label: Label) -> int | None:
        """Return the row of the labelled result: exact, or nearest in time within half the median interval."""
        if label.row is not None:
            return label.row if label.row in self.seq_by_row else None
        t = label.t or 0
        index = bisect.bisect_left(self._times, t)
        nearby = [i for i in (index - 1, index) if 0 <= i < len(self._times)]
        best = min(nearby, key=lambda i: abs(self._times[i] - t), default=None)
        return None if best is None or abs(self._times[best] - t) > self._max_distance_us else self._rows[best]


class _BundleSchemas:
    """The bundle of each message with results, and the label schema of each bundle."""

    def __init__(self, db: Connection, key: TaskLog, given: Sequence[Label]) -> None:
        self._db, self._key, self._given = db, key, given
        self.runs = bundle_history.load_bundle_runs(db, key)
        self._schemas: dict[tuple[str, str], BundleLabelSchema | None] = {}

    def find_schema(self, model: BundleRun, output: str) -> BundleLabelSchema | None:
        """Return the schema of an output; None if the bundle has not this further output."""
        place = (model.digest, output)
        if place not in self._schemas:
            texts = [label.text for label in self._given if label.output == output]
            texts += label_tables.load_label_texts(self._db, self._key, output, except_source=MODEL)
            self._schemas[place] = bundle_history.resolve_label_schema(self._db, self._key, model.digest, texts, output)
        return self._schemas[place]

    def check_label(self, label: Label, seq: int) -> str | None:
        """Return why a label of a result in this message is rejected."""
        model = self.runs[seq]
        schema = self.find_schema(model, label.output)
        if schema is None:
            return f"{model.name} {model.version}, which made this result, has no further output {label.output!r}"
        try:
            schema.label_schema.parse(label.text)
        except ValueError as problem:
            hint = "" if schema.declared else ", as inferred from its results here; the device knows all (--send)"
            return f"{problem}{hint}"
        return None


def metric_rows(
    metrics: Sequence[MetricEstimate], device: str, task: str, log: str, now: str, source: str, output: str = ""
) -> list[Row]:
    """Return rows of table metrics."""
    tail = (source, log, 0, output)
    return [(device, task, now, m.metric, m.slice, m.value, m.low, m.high, m.n, m.state, *tail) for m in metrics]


def compute_label_metrics(schema: BundleLabelSchema, results: Sequence[LabelledResult]) -> list[MetricEstimate]:
    """Compute the metrics of labelled results; omit labels outside the schema."""
    labels, usable = schema.label_schema, []
    is_classifier = labels.kind in ("classify", "several")
    texts = {result.label for result in results}
    if is_classifier:
        texts |= {result.predicted or "" for result in results}
    parsed = {}
    for text in texts:
        with contextlib.suppress(ValueError):
            parsed[text] = labels.parse(text)
    for result in results:
        truth, predicted = parsed.get(result.label), parsed.get(result.predicted or "") if is_classifier else 0.0
        if truth is not None and predicted is not None and (is_classifier or result.value is not None):
            usable.append((truth, predicted, np.nan if result.score is None else result.score, result.value))
    truths = np.array([truth for truth, *_ in usable], np.float64)
    if is_classifier:
        classes = np.array([predicted for _, predicted, *_ in usable], np.int64)
        scores = np.array([score for *_, score, _ in usable], np.float64)
        return compute_metrics(labels.kind, labels.labels, LabelledPredictions(truths, classes, scores))
    values, above = np.array([value for *_, value in usable], np.float64), None
    if labels.kind == "anomaly" and schema.threshold is not None:
        above = (values > schema.threshold).astype(np.int64)
    return compute_metrics(labels.kind, labels.labels, LabelledPredictions(truths, above, value=values))
