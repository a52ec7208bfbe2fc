"""How good answers are: the project's metrics (`agent.performance.metrics`) from sums over units, with intervals."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.evaluation.bootstrap import REPLICATES, BootstrapUnits, percentile_interval, proportion_interval
from agent.evaluation.document import ClassMetrics, IntervalEstimate, ReliabilityBin
from agent.performance import metrics as quality
from agent.performance.metrics import LabelledPredictions, MetricEstimate

_TOP_K = (2, 3, 5)
_RANK_REPLICATES = 200  # of AUC and average precision, each of which looks at every result
PRIMARY_METRIC = {"classify": "accuracy", "regress": "mae", "anomaly": "auc"}


class MetricReport(msgspec.Struct, frozen=True, eq=False):
    metrics: list[MetricEstimate]
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    reliability: list[ReliabilityBin]


def compute(kind: str, labels: list[str], pairs: LabelledPredictions, units: BootstrapUnits) -> MetricReport:
    """Everything there is to say of `pairs`."""
    if kind == "classify":
        return _classification_metrics(labels, pairs, units)
    metrics = _regression_metrics(pairs, units) if kind == "regress" else _anomaly_metrics(pairs, units)
    return MetricReport(metrics, [], _confusion_matrix(pairs, 2) if pairs.predicted is not None else [], [])


def primary_metric(kind: str, pairs: LabelledPredictions, units: BootstrapUnits) -> Float64s:
    """(1 + REPLICATES,) accuracy, MAE or AUC."""
    n = units.weighted_sums(np.ones(len(pairs)))[:, 0]
    if kind == "classify":
        assert pairs.predicted is not None
        return np.asarray(units.weighted_sums(pairs.predicted == pairs.truth)[:, 0] / n)
    assert pairs.value is not None
    if kind == "regress":
        return np.asarray(units.weighted_sums(np.abs(pairs.value - pairs.truth))[:, 0] / n)
    return _rank_metric(quality.auc, pairs, units)


def primary_interval(kind: str, pairs: LabelledPredictions, units: BootstrapUnits) -> IntervalEstimate:
    found = primary_metric(kind, pairs, units)
    return proportion_interval(found, len(pairs), units) if kind == "classify" else percentile_interval(found)


def _rank_metric(metric: quality.RankMetric, pairs: LabelledPredictions, units: BootstrapUnits) -> Float64s:
    """(1 + replicates,) of a metric that looks at the order of all values."""
    assert pairs.value is not None
    yes, found = pairs.truth > 0, [metric(pairs.value, pairs.truth > 0, np.ones(len(pairs)))]
    few = min(REPLICATES, _RANK_REPLICATES)
    return np.array([*found, *(metric(pairs.value, yes, w[units.unit_index]) for w in units.weights[:few])])


def _to_metric(name: str, estimate: IntervalEstimate, n: int) -> MetricEstimate:
    return MetricEstimate(name, estimate.value, estimate.low, estimate.high, n)


def _regression_metrics(pairs: LabelledPredictions, units: BootstrapUnits) -> list[MetricEstimate]:
    assert pairs.value is not None
    n, off = len(pairs), pairs.value - pairs.truth
    # R² from sums needs a centred truth: squares of large numbers cancel.
    truth = pairs.truth - pairs.truth.mean()
    total, bias, mae, square, t, tt = units.weighted_sums(
        np.stack([np.ones(n), off, np.abs(off), off**2, truth, truth**2], axis=1)
    ).T
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = 1 - square / (tt - t**2 / total)
    found = {"mae": mae / total, "rmse": np.sqrt(square / total), "r2": r2, "bias": bias / total}
    return [_to_metric(name, percentile_interval(np.asarray(figures)), n) for name, figures in found.items()]


def _anomaly_metrics(pairs: LabelledPredictions, units: BootstrapUnits) -> list[MetricEstimate]:
    n = len(pairs)
    metrics = [
        _to_metric("auc", percentile_interval(_rank_metric(quality.auc, pairs, units)), n),
        _to_metric("average_precision", percentile_interval(_rank_metric(quality.average_precision, pairs, units)), n),
    ]
    if pairs.predicted is None:
        return metrics
    sums = _class_counts(pairs, 2, units)
    total = units.weighted_sums(np.ones(n))[:, 0]
    metrics.append(_to_metric("accuracy", proportion_interval(sums.true_positives.sum(axis=1) / total, n, units), n))
    one = _class_metrics("anomaly", 1, sums, units)
    for name, found in (("precision", one.precision), ("recall", one.recall), ("f1", one.f1)):
        metrics.append(_to_metric(name, found, n))
    return metrics


class _ClassCounts(msgspec.Struct, frozen=True, eq=False):
    """(1 + REPLICATES, C) results of each class that were right, meant, and named."""

    true_positives: Float64s
    actual: Float64s
    predicted: Float64s


def _class_counts(pairs: LabelledPredictions, class_count: int, units: BootstrapUnits) -> _ClassCounts:
    assert pairs.predicted is not None
    truth = pairs.truth.astype(np.int64)
    hit = units.weighted_counts(truth, class_count, np.asarray(pairs.predicted == truth))
    return _ClassCounts(
        hit, units.weighted_counts(truth, class_count), units.weighted_counts(pairs.predicted, class_count)
    )


def _class_metrics(label: str, i: int, counts: _ClassCounts, units: BootstrapUnits) -> ClassMetrics:
    hit, meant, named = counts.true_positives[:, i], counts.actual[:, i], counts.predicted[:, i]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hit / named, hit / meant
    of_named, of_meant = (
        proportion_interval(precision, float(named[0]), units),
        proportion_interval(recall, float(meant[0]), units),
    )
    with np.errstate(invalid="ignore"):
        f1 = f1_interval(percentile_interval(quality.f1_from_counts(hit, meant + named)), of_named, of_meant)
    return ClassMetrics(label=label, n=int(meant[0]), named=int(named[0]), precision=of_named, recall=of_meant, f1=f1)


def f1_interval(f1: IntervalEstimate, precision: IntervalEstimate, recall: IntervalEstimate) -> IntervalEstimate:
    """F1 with its interval; where replicates cannot differ, from the ends of the intervals of its parts."""
    ends = (precision.low, recall.low, precision.high, recall.high)
    if f1.low is None or f1.low != f1.high or None in ends:
        return f1
    low, high = (
        quality.round_or_none(2 * a * b / (a + b)) if a and b and a + b > 0 else 0.0 for a, b in (ends[:2], ends[2:])
    )
    return IntervalEstimate(value=f1.value, low=low, high=high)


def _classification_metrics(labels: list[str], pairs: LabelledPredictions, units: BootstrapUnits) -> MetricReport:
    assert pairs.predicted is not None
    n, truth = len(pairs), pairs.truth.astype(np.int64)
    sums = _class_counts(pairs, len(labels), units)
    total = units.weighted_sums(np.ones(n))[:, 0]
    metrics = [_to_metric("accuracy", proportion_interval(sums.true_positives.sum(axis=1) / total, n, units), n)]
    with np.errstate(invalid="ignore"):
        each = quality.f1_from_counts(sums.true_positives, sums.actual + sums.predicted)
    metrics.append(_to_metric("f1_macro", percentile_interval(np.nanmean(each, axis=1)), n))
    if pairs.probabilities is not None and np.isfinite(pairs.probabilities).all():
        metrics += _top_k_accuracy(pairs.probabilities, truth, total, units)
        metrics.append(
            _to_metric(
                "brier",
                percentile_interval(units.weighted_sums(quality.brier(pairs.probabilities, truth))[:, 0] / total),
                n,
            )
        )
    reliability: list[ReliabilityBin] = []
    if pairs.score is not None and np.isfinite(pairs.score).all():
        right = np.asarray(pairs.predicted == truth, np.float64)
        where = quality.equal_mass_bins(pairs.score)
        apart = _bin_sums(where, pairs.score - right, units)
        metrics.append(_to_metric("ece", percentile_interval(quality.ece_from_gaps(apart, total)), n))
        reliability = _reliability_bins(where, pairs.score, right, units)
    shown = [i for i in range(len(labels)) if sums.actual[0, i] or sums.predicted[0, i]]
    classes = [_class_metrics(labels[i], i, sums, units) for i in shown]
    return MetricReport(metrics, classes, _confusion_matrix(pairs, len(labels)), reliability)


def _top_k_accuracy(full: Float64s, truth: Ints, total: Float64s, units: BootstrapUnits) -> list[MetricEstimate]:
    """How often the true class is among the k most probable; of equals, the first named come first."""
    own = full[np.arange(len(truth)), truth][:, None]
    before = np.arange(full.shape[1])[None] < truth[:, None]
    rank = ((full > own) | ((full == own) & before)).sum(axis=1)
    tops = [k for k in _TOP_K if k < full.shape[1]]
    return [
        _to_metric(
            f"top_{k}", proportion_interval(units.weighted_sums(rank < k)[:, 0] / total, len(truth), units), len(truth)
        )
        for k in tops
    ]


def _bin_sums(bin_index: Ints, values: Float64s, units: BootstrapUnits) -> Float64s:
    return units.weighted_sums(values[:, None] * (bin_index[:, None] == np.arange(int(bin_index.max()) + 1)))


def _reliability_bins(bin_index: Ints, score: Float64s, right: Float64s, units: BootstrapUnits) -> list[ReliabilityBin]:
    n, scores, rights = (_bin_sums(bin_index, values, units) for values in (np.ones(len(score)), score, right))
    found = []
    for i in np.flatnonzero(n[0]):
        told = proportion_interval(rights[:, i] / n[:, i], float(n[0, i]), units)
        found.append(ReliabilityBin(n=int(n[0, i]), score=float(scores[0, i] / n[0, i]), right=told))
    return found


def _confusion_matrix(pairs: LabelledPredictions, class_count: int) -> list[list[int]]:
    """A row for each true class, a column for each named one."""
    assert pairs.predicted is not None
    where = pairs.truth.astype(np.int64) * class_count + pairs.predicted
    table = np.bincount(where, minlength=class_count * class_count).reshape(class_count, class_count)
    return [[int(n) for n in row] for row in table]
