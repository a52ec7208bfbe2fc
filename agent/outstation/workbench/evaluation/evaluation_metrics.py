"""Metrics of an evaluation, of its classes and slices, and reliability, with intervals over bootstrap units."""

from __future__ import annotations

import contextlib
import math
import re

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.datasets.blocks import TextColumn
from outstation.ml.performance import metrics as performance_metrics
from outstation.ml.performance import slices
from outstation.ml.performance.estimates import MetricEstimate, round_or_none
from outstation.ml.performance.metrics import LabelledPredictions, equal_mass_bins
from outstation.workbench.evaluation.bootstrap import BootstrapUnits, percentile_interval, proportion_interval
from outstation.workbench.evaluation.document import ClassMetrics, IntervalEstimate, ReliabilityBin

_SLICE_BINS = 4
_MAX_CATEGORIES = 12  # distinct numbers that are still taken for names


class MetricReport(msgspec.Struct, frozen=True, eq=False):
    """`confusion`: a row for each true class, a column for each predicted one."""

    metrics: list[MetricEstimate]
    classes: list[ClassMetrics] = []
    confusion: list[list[int]] = []
    reliability: list[ReliabilityBin] = []


def compute(kind: str, labels: list[str], predictions: LabelledPredictions, units: BootstrapUnits) -> MetricReport:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        several = predictions.label_sets is not None
        metrics = _estimate_metrics("several" if several else kind, labels, predictions, units)
        if several:
            true, chosen = performance_metrics.label_sets(predictions, len(labels))
            hits, actual, named = (
                np.concatenate([units.sums(column) for column in sets.T], axis=1)
                for sets in (true & chosen, true, chosen)
            )
            classes = [_class_estimates(*c, units) for c in zip(labels, hits.T, actual.T, named.T, strict=True)]
            return MetricReport(metrics, classes)
        if predictions.predicted is None:
            return MetricReport(metrics)
        truth, predicted = predictions.classes
        count = len(labels) if kind == "classify" else 2
        confusion = bincount(truth * count + predicted, minlength=count**2).reshape(count, -1).tolist()
        if kind == "anomaly":
            return MetricReport(metrics, confusion=confusion)
        hits = units.sums(predictions.right, truth, count)
        actual, named = units.sums(None, truth, count), units.sums(None, predicted, count)
        shown = np.flatnonzero(actual[0] + named[0])
        classes = [_class_estimates(labels[i], hits[:, i], actual[:, i], named[:, i], units) for i in shown]
        return MetricReport(metrics, classes, confusion, _reliability_bins(predictions, units))


def _estimate_metrics(
    kind: str, labels: list[str], predictions: LabelledPredictions, units: BootstrapUnits
) -> list[MetricEstimate]:
    estimates: dict[str, IntervalEstimate] = {}
    for metric, statistic in performance_metrics.prepare_metrics(kind, labels, predictions, "evaluation"):
        values, rests_on = np.asarray(statistic.compute(units)[0]), statistic.parts[0].rests_on
        estimates[metric.name] = proportion_interval(values, rests_on, units)
    if "f1" in estimates:
        estimates["f1"] = _f1_interval(estimates["f1"], estimates["precision"], estimates["recall"])
    return [MetricEstimate(name, e.value, e.low, e.high, len(predictions)) for name, e in estimates.items()]


def primary_metric(kind: str, predictions: LabelledPredictions, units: BootstrapUnits) -> Float64s:
    """Return accuracy, MAE or AUC (1 + replicates,)."""
    statistic = performance_metrics.primary(kind).prepare(predictions, ())
    assert statistic is not None
    return np.asarray(statistic.compute(units)[0])


def primary_interval(kind: str, values: Float64s, truth: Float64s, units: BootstrapUnits) -> IntervalEstimate:
    """Return the interval of values (1 + replicates,) of the primary metric, of results with this truth (n,)."""
    rests_on = {"classify": len(truth), "anomaly": performance_metrics.count_fewer(truth > 0)}.get(kind, 0)
    return proportion_interval(values, rests_on, units)


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


def slice_metrics(
    kind: str, predictions: LabelledPredictions, columns: dict[str, TextColumn], units: BootstrapUnits
) -> list[MetricEstimate]:
    """Return the metric of each slice, by the rule that devices use, ordered by column and value."""
    binned = {name: bin_column(column) for name, column in columns.items()}
    # Neighbours without groups depend on each other within slices: one that is worse throughout is no dependence.
    design_effect = units.design_effect if units.group_count else None
    estimates = slices.compute_slice_metrics(kind, predictions, binned, design_effect)
    # Only what was tested has a state.
    return sorted((estimate for estimate in estimates if estimate.state is not None), key=_sort_key)


def _sort_key(metric: MetricEstimate) -> tuple[str, float, list[tuple[int, str]]]:
    """Order by column, then bins from the lowest to the highest, then names, with numbers in them by size."""
    column, _, value = metric.slice.partition("=")
    words = value.split(" ")
    try:
        lower_edge = -math.inf if words[0] == "below" else float(words[1] if words[0] == "from" else words[0])
    except (ValueError, IndexError):
        lower_edge = math.inf
    parts = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", value)]
    return column, lower_edge, parts


def bin_column(column: TextColumn) -> list[str]:
    """Return names as they are, and many distinct numbers in quarters."""
    texts = np.char.strip(column)
    known = np.unique(texts[texts != ""])
    if len(known) > _MAX_CATEGORIES:
        with contextlib.suppress(ValueError):
            values = np.where(texts == "", "nan", texts).astype(np.float64)
            edges = {float(f"{edge:.3g}") for edge in np.nanquantile(values, np.arange(1, _SLICE_BINS) / _SLICE_BINS)}
            return slices.name_bins(values, sorted(edges))
    return [text or slices.MISSING for text in texts.tolist()]
