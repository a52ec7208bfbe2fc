"""Performance metrics: one registry, for devices, the collector and `model evaluate`.

Each metric gives values from weighted sums over labelled results, so that every bootstrap resamples the same function.
Accuracy of a multi-label model counts results whose labels are all right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import bincount
from outstation.ml.performance import intervals

ECE_BINS = 10
_MIN_RESULTS_PER_BIN = 10
# Classes with an F1 of their own: those with most labels.
_MAX_CLASSES = 40
Prepare = Callable[["LabelledPredictions", Sequence[str]], "Statistic | None"]


class LabelledPredictions(msgspec.Struct, frozen=True, eq=False):
    """n labelled results, in the order of their rows.

    `truth`: class index, number, 1 for an anomaly, or of a multi-label model the sum of 2^label. `predicted`: what the
    model predicts, likewise. `score`: probability of the prediction, NaN if unknown; `probabilities` (n, C) of every
    class. `value`: output of a model that predicts numbers. `label_sets` (n, 2, K): true and predicted labels of a
    multi-label model with any number of labels.
    """

    truth: Float64s
    predicted: Ints | None = None
    score: Float64s | None = None
    value: Float64s | None = None
    probabilities: Float64s | None = None
    label_sets: Bools | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, index: Any) -> LabelledPredictions:
        columns: dict[str, Any] = {name: getattr(self, name) for name in self.__struct_fields__}
        picked: dict[str, Any] = {name: c if c is None else c[index] for name, c in columns.items()}
        return LabelledPredictions(**picked)

    @property
    def classes(self) -> tuple[Ints, Ints]:
        """True and predicted class (n,) of each result."""
        assert self.predicted is not None
        return self.truth.astype(np.int64), self.predicted

    @property
    def right(self) -> Bools:
        """(n,) whether the prediction is right as a whole."""
        assert self.predicted is not None
        return np.asarray(self.predicted == self.truth)

    @property
    def errors(self) -> Float64s:
        assert self.value is not None
        return self.value - self.truth

    def losses(self, kind: str) -> Float64s | None:
        """Return absolute errors (n,) of numbers, else 1 for each wrong answer; None without a prediction."""
        if kind == "regress" and self.value is not None:
            return np.abs(self.errors)
        return None if self.predicted is None else (~self.right).astype(np.float64)


class Weights(Protocol):
    """Weights of n results: one vector, or replicates of it, whose shape leads that of every value."""

    @property
    def total(self) -> Any: ...

    def sums(self, values: Any = None, group: Ints | None = None, group_count: int = 1) -> Float64s:
        """Return the weighted sums (…, group_count) of `values` (n,), by default of 1, in each group."""
        ...

    def apply(self, statistic: Callable[[Float64s], float]) -> Any:
        """Return a statistic of the weight vectors (n,), for what is no function of sums."""
        ...


class WeightVector:
    def __init__(self, weights: Float64s) -> None:
        self._weights, self.total = weights, weights.sum()

    @classmethod
    def uniform(cls, n: int) -> WeightVector:
        return cls(np.ones(n))

    def sums(self, values: Any = None, group: Ints | None = None, group_count: int = 1) -> Float64s:
        weighted = self._weights if values is None else values * self._weights
        if group is None:
            return np.asarray(weighted.sum(keepdims=True))
        return np.asarray(bincount(group, weighted, group_count), np.float64)

    def apply(self, statistic: Callable[[Float64s], float]) -> float:
        return statistic(self._weights)


class Part(msgspec.Struct, frozen=True):
    """Value of a statistic of `n` results, `smallest_class` in the rarest class; a share is of `rests_on` results."""

    n: int
    smallest_class: int = intervals.MIN_RESULTS
    rests_on: float = 0.0
    slice: str = ""
    metric: str = ""


class Statistic(msgspec.Struct, frozen=True):
    """Metric of given results; `compute` returns each part's value, or NaN. A share has Wilson's interval."""

    parts: list[Part]
    compute: Callable[[Weights], Sequence[Any]]
    is_share: bool = False


class Metric(msgspec.Struct, frozen=True):
    """Metric of models of some kinds, for results with column `requires`; `prepare` takes results and class names."""

    name: str
    display_name: str
    kinds: tuple[str, ...]
    requires: Literal["predicted", "score", "value", "probabilities"]
    prepare: Prepare
    direction: Literal["higher", "lower", "zero"] = "higher"
    scope: Literal["all", "device", "evaluation"] = "all"


def prepare_metrics(
    kind: str, labels: Sequence[str], predictions: LabelledPredictions, scope: Literal["device", "evaluation"]
) -> list[tuple[Metric, Statistic]]:
    prepared = [
        (metric, metric.prepare(predictions, labels))
        for metric in METRICS
        if kind in metric.kinds and metric.scope in ("all", scope) and getattr(predictions, metric.requires) is not None
    ]
    return [(metric, statistic) for metric, statistic in prepared if statistic is not None]


def _mean_of(values: Any) -> Statistic:
    return Statistic([Part(len(values))], lambda w: [mean(w, values)])


def _share_of(values: Any) -> Statistic:
    return Statistic([Part(len(values), rests_on=len(values))], lambda w: [mean(w, values)], is_share=True)


def _ratio_of(numerator: Any, denominator: Any, part: Part, *, is_share: bool = False) -> Statistic:
    return Statistic([part], lambda w: [w.sums(numerator)[..., 0] / w.sums(denominator)[..., 0]], is_share)


def mean(w: Weights, values: Any) -> Any:
    return w.sums(values)[..., 0] / w.total


def _rmse(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    squares = predictions.errors**2
    return Statistic([Part(len(squares))], lambda w: [np.sqrt(mean(w, squares))])


def _r2(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    """Return 1 - squared error / variance of the truth; NaN if that is 0."""
    # Centred first: squares of large numbers cancel.
    squares, centred = predictions.errors**2, predictions.truth - predictions.truth.mean()
    centred_squares = centred**2

    def compute(w: Weights) -> list[Any]:
        variance = mean(w, centred_squares) - mean(w, centred) ** 2
        return [np.where(variance > 0, 1 - mean(w, squares) / variance, np.nan)]

    return Statistic([Part(len(squares))], compute)


def _top_k(k: int) -> Prepare:
    """Return how often the true class is among the k most probable; of equals, the first in order comes first."""

    def prepare(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic | None:
        p = predictions.probabilities
        if p is None or k >= p.shape[1] or not np.isfinite(p).all():
            return None
        truth = predictions.truth.astype(np.int64)[:, None]
        own, before = np.take_along_axis(p, truth, axis=1), np.arange(p.shape[1])[None] < truth
        rank = ((p > own) | ((p == own) & before)).sum(axis=1)
        return _share_of(rank < k)

    return prepare


def _brier(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic | None:
    """Return the squared distance of all probabilities from certainty of the true class."""
    p, truth = predictions.probabilities, predictions.truth.astype(np.int64)
    if p is None or not np.isfinite(p).all():
        return None
    return _mean_of(np.square(p).sum(axis=1) - 2 * p[np.arange(len(truth)), truth] + 1)


def _brier_top(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic | None:
    known, gaps = _calibration_gaps(predictions)
    if predictions.probabilities is not None or not known.any():
        return None
    return _ratio_of(gaps**2, known, Part(int(known.sum())))


def _ece(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic | None:
    known, gaps = _calibration_gaps(predictions)
    if predictions.score is None or not known.any():
        return None
    bins = np.zeros(len(predictions), np.int64)
    bins[known] = equal_mass_bins(predictions.score[known])
    count, all_known = int(bins.max()) + 1, bool(known.all())

    def compute(w: Weights) -> list[Any]:
        """Return Σ share of a bin · |mean score - share right|."""
        total = w.total if all_known else w.sums(known)[..., 0]
        return [np.abs(w.sums(gaps, bins, count)).sum(axis=-1) / total]

    return Statistic([Part(int(known.sum()))], compute)


def _calibration_gaps(predictions: LabelledPredictions) -> tuple[Bools, Float64s]:
    """Return which scores are known, and score - right (n,), 0 where it is not."""
    assert predictions.score is not None
    known = np.isfinite(predictions.score)
    return known, np.where(known, predictions.score - predictions.right, 0.0)


def _f1_of_classes(predictions: LabelledPredictions, labels: Sequence[str]) -> Statistic:
    """Return the mean F1 of all classes, and the F1 of those with most labels."""
    truth, predicted = predictions.classes
    count = max(len(labels), int(max(truth.max(), predicted.max())) + 1)
    support, named = bincount(truth, minlength=count), bincount(predicted, minlength=count)
    shown = [int(i) for i in np.argsort(-support, kind="stable")[:_MAX_CLASSES] if support[i] and i < len(labels)]
    fewest = int(support[support > 0].min())
    # One mistake in the smallest class moves the mean as much as one mistake in this number of results.
    whole = Part(len(truth), fewest, fewest * int((support > 0).sum()))
    parts = [_class_part(labels[i], int(support[i]), int(named[i])) for i in shown]
    return _f1_with_mean(whole, parts, shown, lambda w: class_f1(w, truth, predicted, count))


def _f1_of_labels(predictions: LabelledPredictions, labels: Sequence[str]) -> Statistic | None:
    """Return the mean F1 of all labels of a multi-label model, and the F1 of each."""
    if not labels:
        return None
    true, predicted = label_sets(predictions, len(labels))
    support, named = true.sum(axis=0).tolist(), predicted.sum(axis=0).tolist()
    present = [n for n in support if n]
    fewest = min(present, default=0)
    whole = Part(len(true), fewest, fewest * len(present))
    parts = [_class_part(*of_label) for of_label in zip(labels, support, named, strict=True)]
    return _f1_with_mean(whole, parts, range(len(labels)), lambda w: label_f1(w, true, predicted))


def _class_part(label: str, support: int, named: int) -> Part:
    return Part(support, rests_on=(support + named) / 2, slice=f"class={label}", metric="f1")


def _f1_with_mean(
    whole: Part, parts: list[Part], shown: Sequence[int], compute: Callable[[Weights], Float64s]
) -> Statistic:
    def compute_parts(w: Weights) -> list[Any]:
        each = compute(w)
        return [macro_mean(each), *(each[..., i] for i in shown)]

    return Statistic([whole, *parts], compute_parts)


def _f1_micro_of_labels(predictions: LabelledPredictions, labels: Sequence[str]) -> Statistic:
    true, predicted = label_sets(predictions, len(labels))
    named = true.sum(axis=1) + predicted.sum(axis=1)
    return _ratio_of(2 * (true & predicted).sum(axis=1), named, Part(len(true), rests_on=float(named.sum()) / 2))


def label_sets(predictions: LabelledPredictions, label_count: int) -> tuple[Bools, Bools]:
    """Return the true and the predicted labels (n, K) of a multi-label model."""
    if predictions.label_sets is not None:
        return predictions.label_sets[:, 0], predictions.label_sets[:, 1]
    true, predicted = ((codes[:, None] >> np.arange(label_count) & 1).astype(bool) for codes in predictions.classes)
    return true, predicted


def _of_ranks(rank_metric: Callable[[Float64s, Bools, Float64s], float]) -> Prepare:
    def prepare(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic | None:
        value, is_anomaly = predictions.value, predictions.truth > 0
        if value is None:
            return None
        fewest = count_fewer(is_anomaly)
        # If all are anomalies, the average precision is 1 for any values.
        part = Part(len(predictions), fewest, fewest or len(predictions))
        return Statistic([part], lambda w: [w.apply(lambda vector: rank_metric(value, is_anomaly, vector))])

    return prepare


def count_fewer(is_anomaly: Bools) -> int:
    """Return how many results the rarer of anomalies and others has."""
    return int(min(is_anomaly.sum(), (~is_anomaly).sum()))


def _precision(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    true, predicted = predictions.classes
    part = Part(len(true), rests_on=float(predicted.sum()))
    return _ratio_of(true & predicted, predicted, part, is_share=True)


def _recall(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    true, predicted = predictions.classes
    return _ratio_of(true & predicted, true, Part(len(true), rests_on=float(true.sum())), is_share=True)


def _f1(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    true, predicted = predictions.classes
    part = Part(len(true), int(true.sum()), float(true.sum() + predicted.sum()) / 2)
    return _ratio_of(2 * (true & predicted), true + predicted, part)


def class_f1(w: Weights, truth: Ints, predicted: Ints, class_count: int) -> Float64s:
    """Return the F1 (…, class_count) of each class; NaN for those neither true nor predicted."""
    hits = w.sums(truth == predicted, truth, class_count)
    return f1_from_counts(hits, w.sums(None, truth, class_count) + w.sums(None, predicted, class_count))


def label_f1(w: Weights, true: Bools, predicted: Bools) -> Float64s:
    """Return the F1 (…, K) of each label of (n, K)."""
    pairs = list(zip(true.T, predicted.T, strict=True))
    hits = np.concatenate([w.sums(a & b) for a, b in pairs], axis=-1)
    return f1_from_counts(hits, np.concatenate([w.sums(a) + w.sums(b) for a, b in pairs], axis=-1))


def f1_from_counts(hits: Float64s, support_sum: Float64s) -> Float64s:
    """Return the F1 (…) from true positives, and true plus predicted positives; NaN without any."""
    return np.asarray(2 * hits / support_sum)


def macro_mean(each: Float64s) -> Any:
    """Return the mean (…) over the last axis, NaN left out."""
    known = ~np.isnan(each)
    return np.where(known, each, 0.0).sum(axis=-1) / known.sum(axis=-1)


def equal_mass_bins(score: Float64s) -> Ints:
    """Return the bin (n,) of each result: as many in each as ties allow, and fewer bins if there are few results."""
    bins = max(1, min(ECE_BINS, len(score) // _MIN_RESULTS_PER_BIN))
    ordered = np.sort(score)
    cuts = ordered[[len(score) * i // bins for i in range(1, bins)]]
    return np.searchsorted(cuts, score, side="right")


def chance_ece(score: Float64s, bins: Ints, design_effect: float) -> tuple[float, float]:
    """Return mean and sd of the ECE of a calibrated model: the gap of each bin is near half-normal."""
    variance = bincount(bins, score * (1 - score)) * design_effect
    expected = float(np.sqrt(2 / math.pi * variance).sum()) / len(score)
    return expected, math.sqrt((1 - 2 / math.pi) * float(variance.sum())) / len(score)


def auc(value: Float64s, is_anomaly: Bools, w: Float64s) -> float:
    """Return P(value of an anomaly > value of none), ties counting half; NaN if there is only one of the two."""
    _, at = np.unique(value, return_inverse=True)
    good, bad = bincount(at, w * is_anomaly), bincount(at, w * ~is_anomaly)
    if not good.sum() or not bad.sum():
        return math.nan
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2)).sum() / (good.sum() * bad.sum()))


def average_precision(value: Float64s, is_anomaly: Bools, w: Float64s) -> float:
    """Return Σ precision · growth of recall, from the largest value down, ties together; NaN without an anomaly."""
    _, at = np.unique(-value, return_inverse=True)
    good = np.cumsum(bincount(at, w * is_anomaly))
    every = np.cumsum(bincount(at, w))
    if not good[-1] > 0:
        return math.nan
    grown = np.diff(good, prepend=0.0) / good[-1]
    return float(np.nansum(grown * good / every))


def _accuracy(predictions: LabelledPredictions, _: Sequence[str]) -> Statistic:
    return _share_of(predictions.right)


_CLASSIFY, _SEVERAL, _REGRESS, _ANOMALY = ("classify",), ("several",), ("regress",), ("anomaly",)
METRICS = (
    Metric("accuracy", "accuracy", ("classify", "several", "anomaly"), "predicted", _accuracy),
    # With one label for each result it is the accuracy.
    Metric("f1_micro", "F1 of all decisions", _CLASSIFY, "predicted", _accuracy, scope="device"),
    Metric("f1_micro", "F1 of all decisions", _SEVERAL, "predicted", _f1_micro_of_labels, scope="evaluation"),
    Metric("f1_macro", "F1, mean of classes", _CLASSIFY, "predicted", _f1_of_classes),
    Metric("f1_macro", "F1, mean of classes", _SEVERAL, "predicted", _f1_of_labels),
    Metric("top_2", "in the top 2", _CLASSIFY, "probabilities", _top_k(2), scope="evaluation"),
    Metric("top_3", "in the top 3", _CLASSIFY, "probabilities", _top_k(3), scope="evaluation"),
    Metric("top_5", "in the top 5", _CLASSIFY, "probabilities", _top_k(5), scope="evaluation"),
    Metric("brier", "Brier score", _CLASSIFY, "probabilities", _brier, "lower"),
    Metric("brier_top", "Brier score of the top class", _CLASSIFY, "score", _brier_top, "lower", "device"),
    Metric("ece", "calibration error (ECE)", _CLASSIFY, "score", _ece, "lower"),
    Metric("mae", "mean absolute error", _REGRESS, "value", lambda p, _: _mean_of(np.abs(p.errors)), "lower"),
    Metric("rmse", "root mean square error", _REGRESS, "value", _rmse, "lower"),
    Metric("r2", "R²", _REGRESS, "value", _r2),
    Metric("bias", "mean error", _REGRESS, "value", lambda p, _: _mean_of(p.errors), "zero", "evaluation"),
    Metric("auc", "ROC AUC", _ANOMALY, "value", _of_ranks(auc)),
    Metric(
        "average_precision", "average precision", _ANOMALY, "value", _of_ranks(average_precision), scope="evaluation"
    ),
    Metric("precision", "precision", _ANOMALY, "predicted", _precision, scope="evaluation"),
    Metric("recall", "recall", _ANOMALY, "predicted", _recall, scope="evaluation"),
    Metric("f1", "F1", _ANOMALY, "predicted", _f1),
)
_OTHER_NAMES = {
    "coverage": "truth within the bounds of the residuals",
    "expected_mae": "error expected without labels (DLE)",
    "expected_mae_share": "expected error, as a share of the true one",
}
_PRIMARY_METRICS = {"classify": "accuracy", "regress": "mae", "anomaly": "auc"}


def primary(kind: str) -> Metric:
    """Return the metric that slices, faults and comparisons of models are measured by."""
    return _find_metric(_PRIMARY_METRICS[kind], kind)


def _find_metric(name: str, kind: str) -> Metric:
    return next(metric for metric in METRICS if metric.name == name and kind in metric.kinds)


def compute_value(name: str, kind: str, predictions: LabelledPredictions) -> float:
    """Return a metric of these results, NaN if they do not have it."""
    statistic = _find_metric(name, kind).prepare(predictions, ())
    if statistic is None:
        return math.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(statistic.compute(WeightVector.uniform(len(predictions)))[0])


def display_name(metric: str) -> str:
    """Return the name of a metric for people; an unknown metric keeps its own name."""
    return _OTHER_NAMES.get(metric) or next((known.display_name for known in METRICS if known.name == metric), metric)
