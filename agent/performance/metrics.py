"""How good results were, from labels: each metric with a 95 % interval. Pure; the device and the collector use it.

- classify: accuracy (Wilson), F1 macro, micro and of each class, Brier, ECE on bins of equal mass (Nguyen & O'Connor
  2015; ties stay together)
- ece_chance: the ECE that a calibrated model would have of as many results with these scores, by chance, and the range
  of that; an ECE within it says nothing against calibration, so its interval begins at 0 then
- several (labels a result): accuracy is of results whose labels are all right; F1 macro and of each label
- regress: MAE, RMSE, R²
- anomaly: AUC (ties count half), and accuracy and F1 where the bundle has a threshold
Brier is of the named class, mean (p - right)², unless all probabilities are known: then the sum over classes.
No interval (null) of fewer than 10 labels, or 10 of a class, but for shares that Wilson's is right for. Where a
bootstrap does not vary, as where all answers were right, an F1 or AUC has Wilson's interval of as many results as it
rests on, and anything else none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Float64s, Ints
from agent.performance import intervals

ECE_BINS = 10
_MIN_RESULTS_PER_BIN = 10
# Classes told one by one, those with most labels first.
_MAX_CLASSES = 40
# Values from weights (n,).
WeightedStatistics = Callable[[Float64s], list[float]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
# A metric of values, which of them are anomalies, and weights.
RankMetric = Callable[[Float64s, Booleans, Float64s], float]


class MetricEstimate(msgspec.Struct, frozen=True):
    """`slice` "" is of all; `state` of a slice: ok, worse (than the rest, significantly) or small (to tell)."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    slice: str = ""
    state: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a message."""
        head = {"metric": self.metric, **({"slice": self.slice} if self.slice else {})}
        tail = {"state": self.state} if self.state else {}
        return {**head, "value": self.value, "low": self.low, "high": self.high, "n": self.n, **tail}


class LabelledPredictions(msgspec.Struct, frozen=True, eq=False):
    """n labelled results, in the order of their rows.

    `truth`: class index, number, or 1 for an anomaly. `said`: the class named, or 1 above the threshold. `score`: the
    probability of it, NaN where not known; `full` (n, C) of every class. `value` of a model that gives numbers.
    """

    truth: Float64s
    predicted: Ints | None = None
    score: Float64s | None = None
    value: Float64s | None = None
    probabilities: Float64s | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, index: Any) -> LabelledPredictions:
        picked = (getattr(self, name) for name in ("predicted", "score", "value", "probabilities"))
        return LabelledPredictions(self.truth[index], *(None if column is None else column[index] for column in picked))

    @property
    def zero_one_losses(self) -> Float64s | None:
        """(n,) 1 where the answer was wrong, or how far off the number was; None for scores without a threshold."""
        if self.predicted is not None:
            return np.asarray(self.predicted != self.truth, np.float64)
        return None

    def task_losses(self, kind: str) -> Float64s | None:
        """What `decay` and slices look at."""
        if kind == "regress" and self.value is not None:
            return np.abs(self.value - self.truth)
        return self.zero_one_losses


class _MetricSpec(msgspec.Struct, frozen=True):
    """What a statistic is called. `fewest` labels of a class it needs; `rests` on so many results, 0 for no share."""

    metric: str
    n: int
    slice: str = ""
    smallest_class: int = intervals.MIN_RESULTS
    supporting_n: float = 0.0

    def to_estimate(self, value: float, bounds: tuple[float, float], design_effect: float) -> MetricEstimate:
        flat = math.isnan(bounds[0]) and math.isfinite(value)
        if flat and self.supporting_n:
            bounds = intervals.wilson(value, self.supporting_n / design_effect)
        told = math.isfinite(value) and min(self.n, self.smallest_class) >= intervals.MIN_RESULTS
        return _build_estimate(self.metric, value, bounds if told else intervals.NO_INTERVAL, self.n, self.slice)


_MetricGroup = tuple[list[_MetricSpec], WeightedStatistics]


def compute_metrics(kind: str, labels: Sequence[str], predictions: LabelledPredictions) -> list[MetricEstimate]:
    """All metrics of `pairs`; none without any."""
    if not len(predictions):
        return []
    off = predictions.task_losses(kind)
    alike = intervals.estimate_design_effect(off) if off is not None else 1.0
    found: list[MetricEstimate] = []
    if predictions.predicted is not None and off is not None:
        accuracy = 1 - float(off.mean())
        bounds = intervals.wilson(accuracy, len(predictions) / alike)
        # Of single labels they are the same number.
        also = ["f1_micro"] if kind == "classify" else []
        found += [_build_estimate(name, accuracy, bounds, len(predictions)) for name in ("accuracy", *also)]
    parts = list(_metric_groups(kind, labels, predictions))
    named = [one for names, _ in parts for one in names]

    def compute_statistics(w: Float64s) -> list[float]:
        return [value for _, part in parts for value in part(w)]

    with np.errstate(over="ignore", invalid="ignore"):
        values = compute_statistics(np.ones(len(predictions)))
        enough = len(predictions) >= intervals.MIN_RESULTS
        spans = (
            intervals.bootstrap(compute_statistics, intervals.bootstrap_weights(len(predictions), alike))
            if enough and named
            else []
        )
    spans = spans or [intervals.NO_INTERVAL] * len(named)
    found += [one.to_estimate(value, span, alike) for one, value, span in zip(named, values, spans, strict=True)]
    return [told for metric in found for told in _add_chance_ece(metric, predictions, alike)]


def _add_chance_ece(
    metric: MetricEstimate, predictions: LabelledPredictions, design_effect: float
) -> list[MetricEstimate]:
    """An ECE with what chance makes of it; any other metric as it is."""
    if metric.metric != "ece" or metric.value is None or predictions.score is None:
        return [metric]
    score = predictions.score[np.isfinite(predictions.score)]
    mean, sd = chance_ece(score, equal_mass_bins(score), design_effect)
    low, high = max(0.0, mean - intervals.Z * sd), mean + intervals.Z * sd
    if metric.low is not None and metric.value <= high:
        metric = replace(metric, low=0.0)
    return [metric, _build_estimate("ece_chance", mean, (low, high), metric.n)]


def _metric_groups(kind: str, labels: Sequence[str], predictions: LabelledPredictions) -> Iterator[_MetricGroup]:
    """Names of statistics, and a function of weights that gives them: all but accuracy."""
    n, value, truth = len(predictions), predictions.value, predictions.truth
    if kind == "regress" and value is not None:
        off = value - truth
        yield [_MetricSpec("mae", n)], lambda w: [_weighted_mean(np.abs(off), w)]
        yield (
            [_MetricSpec("rmse", n), _MetricSpec("r2", n)],
            lambda w: [math.sqrt(_weighted_mean(off**2, w)), r2(truth, off, w)],
        )
    if kind == "anomaly" and value is not None:
        fewest = int(min((truth > 0).sum(), (truth <= 0).sum()))
        yield [_MetricSpec("auc", n, smallest_class=fewest, supporting_n=fewest)], lambda w: [auc(value, truth > 0, w)]
    if predictions.predicted is not None and kind == "anomaly":
        meant, said = truth.astype(np.int64), predictions.predicted
        yes = int(meant.sum())
        named = _MetricSpec("f1", n, smallest_class=yes, supporting_n=(yes + int(said.sum())) / 2)
        yield [named], lambda w: [float(f1(meant, said, 2, w)[1])]
    elif predictions.predicted is not None and kind == "several":
        # Slices are told by how many are right alone.
        if labels:
            yield _multilabel_metrics(labels, truth.astype(np.int64), predictions.predicted)
    elif predictions.predicted is not None:
        yield from _calibration_metrics(predictions, truth.astype(np.int64), predictions.predicted)
        yield _class_metrics(labels, truth.astype(np.int64), predictions.predicted)


def _calibration_metrics(predictions: LabelledPredictions, truth: Ints, predicted: Ints) -> Iterator[_MetricGroup]:
    """Of the results whose score is known."""
    if predictions.probabilities is not None:
        each = brier(predictions.probabilities, truth)
        yield [_MetricSpec("brier", len(predictions))], lambda w: [_weighted_mean(each, w)]
    known = np.isfinite(predictions.score) if predictions.score is not None else np.zeros(len(predictions), np.bool_)
    if predictions.score is None or not known.any():
        return
    score, right, n = predictions.score[known], np.asarray(predicted == truth, np.float64)[known], int(known.sum())
    if predictions.probabilities is None:
        yield [_MetricSpec("brier_top", n)], lambda w: [_weighted_mean((score - right) ** 2, w[known])]
    where = equal_mass_bins(score)
    yield [_MetricSpec("ece", n)], lambda w: [ece(score, right, where, w[known])]


def _class_metrics(labels: Sequence[str], truth: Ints, predicted: Ints) -> _MetricGroup:
    count = max(len(labels), int(max(truth.max(), predicted.max())) + 1)
    support, named = np.bincount(truth, minlength=count), np.bincount(predicted, minlength=count)
    shown = [int(i) for i in np.argsort(-support, kind="stable")[:_MAX_CLASSES] if support[i] and i < len(labels)]
    fewest = int(support[support > 0].min())

    def scores(w: Float64s) -> list[float]:
        found = f1(truth, predicted, count, w)
        return [macro_mean(found), *found[shown].tolist()]

    # One mistake in the smallest class moves the mean as much as one in so many results.
    whole = _MetricSpec("f1_macro", len(truth), smallest_class=fewest, supporting_n=fewest * int((support > 0).sum()))
    each = [
        _MetricSpec("f1", int(support[i]), f"class={labels[i]}", supporting_n=(int(support[i]) + int(named[i])) / 2)
        for i in shown
    ]
    return [whole, *each], scores


def _multilabel_metrics(labels: Sequence[str], truth: Ints, predicted: Ints) -> _MetricGroup:
    meant, told = [[codes >> i & 1 for i in range(len(labels))] for codes in (truth, predicted)]
    true = [int(one.sum()) for one in meant]

    def scores(w: Float64s) -> list[float]:
        each = np.array([f1(one, other, 2, w)[1] for one, other in zip(meant, told, strict=True)])
        return [macro_mean(each), *each.tolist()]

    # As of classes.
    whole = _MetricSpec("f1_macro", len(truth), smallest_class=min(true), supporting_n=min(true) * len(labels))
    named = [
        _MetricSpec("f1", n, f"class={label}", supporting_n=(n + int(other.sum())) / 2)
        for label, n, other in zip(labels, true, told, strict=True)
    ]
    return [whole, *named], scores


def f1(truth: Ints, predicted: Ints, count: int, w: Float64s) -> Float64s:
    """(count,) F1 of each class; NaN of those neither meant nor named."""
    hit = np.asarray(np.bincount(truth, w * (truth == predicted), count), np.float64)
    both = np.asarray(np.bincount(truth, w, count) + np.bincount(predicted, w, count), np.float64)
    return f1_from_counts(hit, both)


def f1_from_counts(hits: Float64s, support_sum: Float64s) -> Float64s:
    """F1 (…) of how many were right, and how many were meant plus how many were named; NaN without any."""
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * hits / support_sum)


def macro_mean(each: Float64s) -> float:
    """Mean over the classes that were meant or named."""
    known = each[~np.isnan(each)]
    return float(known.sum() / len(known)) if len(known) else math.nan


def brier(probabilities: Float64s, truth: Ints) -> Float64s:
    """(n,) squared distance of probabilities (n, C) from certainty of the true class."""
    squares = np.square(probabilities).sum(axis=1) - 2 * probabilities[np.arange(len(truth)), truth] + 1
    return np.asarray(squares)


def equal_mass_bins(score: Float64s, bins: int = ECE_BINS) -> Ints:
    """(n,) bin of each result: as many in each as ties allow, and fewer bins where there are few results."""
    bins = max(1, min(bins, len(score) // _MIN_RESULTS_PER_BIN))
    ordered = np.sort(score)
    cuts = ordered[[len(score) * i // bins for i in range(1, bins)]]
    return np.searchsorted(cuts, score, side="right")


def ece(score: Float64s, right: Float64s, bin_index: Ints, w: Float64s) -> float:
    """Σ share of a bin × |mean score - share right|, from bins as `equal_mass` has them."""
    return float(ece_from_gaps(np.asarray(np.bincount(bin_index, w * (score - right)), np.float64), w.sum()))


def chance_ece(score: Float64s, bin_index: Ints, design_effect: float) -> tuple[float, float]:
    """Mean and standard deviation of the ECE where each answer is right with the probability that its score says.

    The gap of a bin is near normal with mean 0 then, and its size half-normal; `alike` from `intervals.design`.
    """
    variance = np.bincount(bin_index, score * (1 - score)) * design_effect
    mean = float(np.sqrt(2 / math.pi * variance).sum()) / len(score)
    return mean, math.sqrt((1 - 2 / math.pi) * float(variance.sum())) / len(score)


def ece_from_gaps(gap_sums: Float64s, total: Any) -> Float64s:
    """ECE (…) from sums of score - right in each bin (…, bins), of so many results in all."""
    return np.asarray(np.abs(gap_sums).sum(axis=-1) / total)


def auc(value: Float64s, is_anomaly: Booleans, w: Float64s) -> float:
    """P(value of an anomaly > value of none), ties counting half; NaN where there is only one of the two."""
    _, at = np.unique(value, return_inverse=True)
    good, bad = np.bincount(at, w * is_anomaly), np.bincount(at, w * ~is_anomaly)
    if not good.sum() or not bad.sum():
        return math.nan
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2)).sum() / (good.sum() * bad.sum()))


def average_precision(value: Float64s, is_anomaly: Booleans, w: Float64s) -> float:
    """Σ precision × growth of recall, from the largest value down, ties together; NaN without an anomaly."""
    _, at = np.unique(-value, return_inverse=True)
    good = np.cumsum(np.bincount(at, w * is_anomaly))
    every = np.cumsum(np.bincount(at, w))
    if not good[-1] > 0:
        return math.nan
    grown = np.diff(good, prepend=0.0) / good[-1]
    with np.errstate(invalid="ignore"):
        return float(np.nansum(grown * good / every))


def r2(truth: Float64s, errors: Float64s, w: Float64s) -> float:
    """1 - squared error / variance of the truth; NaN where that is 0."""
    spread = _weighted_mean((truth - _weighted_mean(truth, w)) ** 2, w)
    return 1 - _weighted_mean(errors**2, w) / spread if spread > 0 else math.nan


def _weighted_mean(values: Any, w: Float64s) -> float:
    return float((values * w).sum() / w.sum())


def _build_estimate(name: str, value: float, bounds: tuple[float, float], n: int, label: str = "") -> MetricEstimate:
    return MetricEstimate(name, round_or_none(value), round_or_none(bounds[0]), round_or_none(bounds[1]), n, label)


def round_or_none(value: float) -> float | None:
    """Six significant digits; None where it is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
