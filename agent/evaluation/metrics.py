"""Metrics of an evaluation, class metrics and reliability, with intervals over bootstrap units."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.evaluation.bootstrap import BootstrapUnits, percentile_interval, proportion_interval
from agent.evaluation.document import ClassMetrics, IntervalEstimate, ReliabilityBin
from agent.performance import metrics as performance_metrics
from agent.performance.estimates import MetricEstimate, round_or_none
from agent.performance.metrics import LabelledPredictions, equal_mass_bins


class MetricReport(msgspec.Struct, frozen=True, eq=False):
    """`confusion`: a row for each true class, a column for each predicted one."""

    metrics: list[MetricEstimate]
    classes: list[ClassMetrics] = []
    confusion: list[list[int]] = []
    reliability: list[ReliabilityBin] = []


def compute(kind: str, labels: list[str], predictions: LabelledPredictions, units: BootstrapUnits) -> MetricReport:
    """Return everything there is to say of the predictions."""
    kind = "several" if predictions.label_sets is not None else kind
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        estimates: dict[str, IntervalEstimate] = {}
        for metric, statistic in performance_metrics.prepare_metrics(kind, labels, predictions, "evaluation"):
            values, rests_on = np.asarray(statistic.compute(units)[0]), statistic.parts[0].rests_on
            estimates[metric.name] = (
                proportion_interval(values, rests_on, units) if statistic.is_share else percentile_interval(values)
            )
        if "f1" in estimates:
            estimates["f1"] = _f1_interval(estimates["f1"], estimates["precision"], estimates["recall"])
        n = len(predictions)
        metrics = [MetricEstimate(name, e.value, e.low, e.high, n) for name, e in estimates.items()]
        if kind == "several":
            return MetricReport(metrics, _label_metrics(labels, predictions, units))
        if predictions.predicted is None:
            return MetricReport(metrics)
        truth, predicted = predictions.classes
        class_count = len(labels) if kind == "classify" else 2
        confusion = np.bincount(truth * class_count + predicted, minlength=class_count**2).reshape(class_count, -1)
        if kind == "anomaly":
            return MetricReport(metrics, confusion=confusion.tolist())
        (truth, predicted), count = predictions.classes, len(labels)
        hits = units.sums(predictions.right, truth, count)
        actual, named = units.sums(None, truth, count), units.sums(None, predicted, count)
        shown = np.flatnonzero(actual[0] + named[0])
        classes = [_class_estimates(labels[i], hits[:, i], actual[:, i], named[:, i], units) for i in shown]
        return MetricReport(metrics, classes, confusion.tolist(), _reliability_bins(predictions, units))


def primary_metric(kind: str, predictions: LabelledPredictions, units: BootstrapUnits) -> Float64s:
    """Return accuracy, MAE or AUC (1 + replicates,)."""
    statistic = performance_metrics.primary(kind).prepare(predictions, ())
    assert statistic is not None
    return np.asarray(statistic.compute(units)[0])


def primary_interval(kind: str, values: Float64s, n: int, units: BootstrapUnits) -> IntervalEstimate:
    """Return the interval of values (1 + replicates,) of the primary metric."""
    return proportion_interval(values, n, units) if kind == "classify" else percentile_interval(values)


def _label_metrics(labels: list[str], predictions: LabelledPredictions, units: BootstrapUnits) -> list[ClassMetrics]:
    true, named = performance_metrics.label_sets(predictions, len(labels))
    hits, actual, predicted = (
        np.concatenate([units.sums(column) for column in sets.T], axis=1) for sets in (true & named, true, named)
    )
    return [_class_estimates(label, hits[:, i], actual[:, i], predicted[:, i], units) for i, label in enumerate(labels)]


def _class_estimates(
    label: str, hits: Float64s, actual: Float64s, predicted: Float64s, units: BootstrapUnits
) -> ClassMetrics:
    precision = proportion_interval(hits / predicted, float(predicted[0]), units)
    recall = proportion_interval(hits / actual, float(actual[0]), units)
    f1 = percentile_interval(performance_metrics.f1_from_counts(hits, actual + predicted))
    return ClassMetrics(
        label=label,
        n=int(actual[0]),
        predicted=int(predicted[0]),
        precision=precision,
        recall=recall,
        f1=_f1_interval(f1, precision, recall),
    )


def _f1_interval(f1: IntervalEstimate, precision: IntervalEstimate, recall: IntervalEstimate) -> IntervalEstimate:
    """Return F1 with its interval; if replicates cannot differ, from the ends of the intervals of its parts."""
    ends = (precision.low, recall.low, precision.high, recall.high)
    if f1.low is None or f1.low != f1.high or None in ends:
        return f1
    low, high = (round_or_none(2 * a * b / (a + b)) if a and b else 0.0 for a, b in (ends[:2], ends[2:]))
    return IntervalEstimate(value=f1.value, low=low, high=high)


def _reliability_bins(predictions: LabelledPredictions, units: BootstrapUnits) -> list[ReliabilityBin]:
    if predictions.score is None or not np.isfinite(predictions.score).all():
        return []
    bins: Ints = equal_mass_bins(predictions.score)
    count = int(bins.max()) + 1
    n, scores, right = (units.sums(values, bins, count) for values in (None, predictions.score, predictions.right))
    return [
        ReliabilityBin(
            n=int(n[0, i]),
            score=float(scores[0, i] / n[0, i]),
            accuracy=proportion_interval(right[:, i] / n[:, i], float(n[0, i]), units),
        )
        for i in np.flatnonzero(n[0])
    ]
