"""What a `quality` message says of labelled results.

Labels that are the model's own answers, and results that are no number, are counted and left out of every metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent import clock
from agent.arrays import Float64s
from agent.device.pipeline.batch import LoadedTask
from agent.device.store import labels
from agent.device.store.labels import StoredLabel
from agent.device.store.transaction import Transaction
from agent.drift.baseline.reference import Reference
from agent.performance import cbpe, degradation, slices
from agent.performance.estimates import MetricEstimate, compute_metrics
from agent.performance.labels import MODEL, LabelSchema, count_sources
from agent.performance.metrics import LabelledPredictions
from agent.wire.messages import encode

_MAX_CLASSES = 40
# Room for the head that every message has, and for labels and estimate.
_HEAD_BYTES = 1_500


class LabelWindow(msgspec.Struct, frozen=True):
    """Labelled results in the order of their labels; `fresh` are those that no message has told of.

    `corrected` of these took the place of a label that one has told of.
    """

    samples: list[StoredLabel]
    new_samples: list[StoredLabel]
    corrected_count: int

    @classmethod
    def from_labelled(
        cls, task: LoadedTask, window: Sequence[StoredLabel], state: degradation.DegradationState
    ) -> LabelWindow:
        understood = filter_understood(task, window)
        fresh = [one for one in understood if one.number > state.last_number]
        return cls(understood, fresh, sum(one.first_number <= state.last_number for one in fresh))


def build_label_schema(task: LoadedTask) -> LabelSchema:
    manifest = task.bundle.manifest
    return LabelSchema(manifest.label_kind, tuple(manifest.output.labels))


def filter_understood(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
    """Those whose label this bundle understands."""
    truth = build_label_schema(task)
    return [one for one in samples if _read_label(truth, one) is not None]


def filter_evaluable(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
    """Those that somebody else labelled, and whose result is a number."""
    named = build_label_schema(task).kind in ("classify", "several")
    scored = any(one.prediction.score is not None for one in samples)

    def is_complete(sample: StoredLabel) -> bool:
        if not named:
            return sample.prediction.value is not None
        # A model without any scores is judged by its answers alone.
        return sample.prediction.predicted_class is not None and (sample.prediction.score is not None or not scored)

    return [one for one in samples if one.source != MODEL and is_complete(one)]


def _read_label(schema: LabelSchema, sample: StoredLabel) -> float | None:
    try:
        return schema.parse(sample.label)
    except ValueError:
        return None


def to_labelled_predictions(task: LoadedTask, samples: Sequence[StoredLabel]) -> LabelledPredictions:
    """Of `judged` ones, in the order given."""
    results = [one.prediction for one in samples]
    truth = build_label_schema(task)
    said = (
        None
        if any(r.predicted_class is None for r in results)
        else np.array([r.predicted_class for r in results], np.int64)
    )
    score = np.array([np.nan if r.score is None else r.score for r in results]) if said is not None else None
    value = None if any(r.value is None for r in results) else np.array([r.value for r in results])
    return LabelledPredictions(np.array([truth.parse(one.label) for one in samples]), said, score, value)


def estimate_error_chances(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[float | None]:
    """The chance of a mistake that the score of each result tells."""
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    scores = [one.prediction.score for one in samples]
    if shipped is None or shipped.score_correct is None or not len(shipped.score_edges):
        return [None] * len(samples)
    known = np.array([0.0 if score is None else score for score in scores])
    found = cbpe.correctness_probabilities(shipped.score_n, shipped.score_correct, shipped.score_edges, known)
    return [None if score is None else 1 - float(chance) for score, chance in zip(scores, found, strict=True)]


def _find_score_bins(shipped: Reference, scores: Float64s) -> Any:
    return np.searchsorted(shipped.score_edges, scores, side="right")


def build_body(task: LoadedTask, tx: Transaction, max_bytes: int, label_window: LabelWindow) -> dict[str, Any]:
    """The message's members; `most` bytes, with its head."""
    ordered = sorted(label_window.samples, key=lambda one: one.prediction.row)
    some = filter_evaluable(task, ordered)
    rows, times = [one.prediction.row for one in ordered], [one.prediction.t for one in ordered]
    window = {
        "rows": [rows[0], rows[-1]],
        "from": clock.to_rfc3339(min(times)),
        "to": clock.to_rfc3339(max(times)),
        "n": len(some),
        "new": len(label_window.new_samples),
        "corrected": label_window.corrected_count,
        "no_result": sum(one.source != MODEL for one in ordered) - len(some),
    }
    head = {"model": task.bundle_ref, "window": window, "labels": _describe_labels(task, tx, ordered)}
    whole = {**head, "estimate": _estimate_accuracy(task, some)}
    found = _compute_metrics(task, some)
    while found and len(encode({**whole, "metrics": [one.to_dict() for one in found]})) > max_bytes - _HEAD_BYTES:
        # Slices and rare classes come last.
        found = found[: len(found) * 3 // 4]
    return {**whole, "metrics": [one.to_dict() for one in found]}


def _compute_metrics(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[MetricEstimate]:
    if not samples:
        return []
    truth, given = build_label_schema(task), to_labelled_predictions(task, samples)
    names = sorted(set.intersection(*(set(one.prediction.slices) for one in samples)))
    sliced = {name: [one.prediction.slices[name] for one in samples] for name in names}
    return [
        *compute_metrics(truth.kind, truth.labels, given),
        *slices.compute_slice_metrics(truth.kind, given, sliced),
    ]


def _describe_labels(task: LoadedTask, tx: Transaction, ordered: Sequence[StoredLabel]) -> dict[str, Any]:
    """Where the labels come from: how late, how many of each class, how much of the results they cover."""
    delay = np.array([max(0, one.received - one.prediction.t) / 1e6 for one in ordered])
    results = labels.count_predictions(tx.connection, task.name, ordered[0].prediction.row, ordered[-1].prediction.row)
    counters = {name: tx.counter(f"labels {name}.{task.name}") for name in ("replaced", "late", "unmatched")}
    found: dict[str, Any] = {
        "n": len(ordered),
        "delay_s": {"median": round(float(np.median(delay)), 3), "p90": round(float(np.quantile(delay, 0.9)), 3)},
        "coverage": round(min(1.0, len(ordered) / results), 4) if results else None,
        "sources": count_sources([one.source for one in ordered]),
        **counters,
    }
    return found | _count_classes(build_label_schema(task), [one.label for one in ordered])


def _count_classes(schema: LabelSchema, texts: Sequence[str]) -> dict[str, Any]:
    """How many labels of each class there is, whatever words they came in; a class without any counts as one."""
    if not schema.class_names:
        return {}
    counts = dict.fromkeys(schema.class_names, 0)
    for text in texts:
        for name in schema.true_names(text):
            counts[name] += 1
    most = sorted(counts, key=lambda name: -counts[name])[:_MAX_CLASSES]
    imbalance = max(counts.values()) / max(1, min(counts.values()))
    return {"classes": {name: counts[name] for name in most}, "imbalance": round(imbalance, 2)}


def _estimate_accuracy(task: LoadedTask, samples: Sequence[StoredLabel]) -> dict[str, Any] | None:
    """Expected accuracy of the same results without labels, and whether what labels say lies outside its interval."""
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    scores = [one.prediction.score for one in samples]
    if shipped is None or shipped.score_correct is None or not samples or any(score is None for score in scores):
        return None
    counts = np.bincount(_find_score_bins(shipped, np.array(scores, np.float64)), minlength=len(shipped.score_n))
    found = cbpe.estimate_accuracy(shipped.score_n, shipped.score_correct, counts)
    predictions = to_labelled_predictions(task, samples)
    if found is None or predictions.predicted is None:
        return None
    right = float(predictions.right.mean())
    return {**found, "outside": not found["low"] <= right <= found["high"]}
