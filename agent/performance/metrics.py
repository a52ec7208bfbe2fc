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

from agent.arrays import Floats, Ints
from agent.performance import intervals

ECE_BINS = 10
_FEWEST_A_BIN = 10
# Classes told one by one, those with most labels first.
_MOST_CLASSES = 40
# Values from weights (n,).
Weighted = Callable[[Floats], list[float]]
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
# A metric of values, which of them are anomalies, and weights.
Ranked = Callable[[Floats, Booleans, Floats], float]


class Metric(msgspec.Struct, frozen=True):
    """`slice` "" is of all; `state` of a slice: ok, worse (than the rest, significantly) or small (to tell)."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    slice: str = ""
    state: str | None = None

    def told(self) -> dict[str, Any]:
        """For a message."""
        head = {"metric": self.metric, **({"slice": self.slice} if self.slice else {})}
        tail = {"state": self.state} if self.state else {}
        return {**head, "value": self.value, "low": self.low, "high": self.high, "n": self.n, **tail}


class Pairs(msgspec.Struct, frozen=True, eq=False):
    """n labelled results, in the order of their rows.

    `truth`: class index, number, or 1 for an anomaly. `said`: the class named, or 1 above the threshold. `score`: the
    probability of it, NaN where not known; `full` (n, C) of every class. `value` of a model that gives numbers.
    """

    truth: Floats
    said: Ints | None = None
    score: Floats | None = None
    value: Floats | None = None
    full: Floats | None = None

    def __len__(self) -> int:
        return len(self.truth)

    def __getitem__(self, some: Any) -> Pairs:
        picked = (getattr(self, name) for name in ("said", "score", "value", "full"))
        return Pairs(self.truth[some], *(None if column is None else column[some] for column in picked))

    @property
    def losses(self) -> Floats | None:
        """(n,) 1 where the answer was wrong, or how far off the number was; None for scores without a threshold."""
        if self.said is not None:
            return np.asarray(self.said != self.truth, np.float64)
        return None

    def off(self, kind: str) -> Floats | None:
        """What `decay` and slices look at."""
        if kind == "regress" and self.value is not None:
            return np.abs(self.value - self.truth)
        return self.losses


class _Named(msgspec.Struct, frozen=True):
    """What a statistic is called. `fewest` labels of a class it needs; `rests` on so many results, 0 for no share."""

    metric: str
    n: int
    slice: str = ""
    fewest: int = intervals.FEWEST
    rests: float = 0.0

    def of(self, value: float, bounds: tuple[float, float], alike: float) -> Metric:
        flat = math.isnan(bounds[0]) and math.isfinite(value)
        if flat and self.rests:
            bounds = intervals.wilson(value, self.rests / alike)
        told = math.isfinite(value) and min(self.n, self.fewest) >= intervals.FEWEST
        return _metric(self.metric, value, bounds if told else intervals.NONE, self.n, self.slice)


_Part = tuple[list[_Named], Weighted]


def measure(kind: str, labels: Sequence[str], pairs: Pairs) -> list[Metric]:
    """All metrics of `pairs`; none without any."""
    if not len(pairs):
        return []
    off = pairs.off(kind)
    alike = intervals.design(off) if off is not None else 1.0
    found: list[Metric] = []
    if pairs.said is not None and off is not None:
        accuracy = 1 - float(off.mean())
        bounds = intervals.wilson(accuracy, len(pairs) / alike)
        # Of single labels they are the same number.
        also = ["f1_micro"] if kind == "classify" else []
        found += [_metric(name, accuracy, bounds, len(pairs)) for name in ("accuracy", *also)]
    parts = list(_parts(kind, labels, pairs))
    named = [one for names, _ in parts for one in names]

    def statistics(w: Floats) -> list[float]:
        return [value for _, part in parts for value in part(w)]

    with np.errstate(over="ignore", invalid="ignore"):
        values = statistics(np.ones(len(pairs)))
        enough = len(pairs) >= intervals.FEWEST
        spans = intervals.bootstrap(statistics, intervals.weights(len(pairs), alike)) if enough and named else []
    spans = spans or [intervals.NONE] * len(named)
    found += [one.of(value, span, alike) for one, value, span in zip(named, values, spans, strict=True)]
    return [told for metric in found for told in _with_chance(metric, pairs, alike)]


def _with_chance(metric: Metric, pairs: Pairs, alike: float) -> list[Metric]:
    """An ECE with what chance makes of it; any other metric as it is."""
    if metric.metric != "ece" or metric.value is None or pairs.score is None:
        return [metric]
    score = pairs.score[np.isfinite(pairs.score)]
    mean, sd = ece_by_chance(score, equal_mass(score), alike)
    low, high = max(0.0, mean - intervals.Z * sd), mean + intervals.Z * sd
    if metric.low is not None and metric.value <= high:
        metric = replace(metric, low=0.0)
    return [metric, _metric("ece_chance", mean, (low, high), metric.n)]


def _parts(kind: str, labels: Sequence[str], pairs: Pairs) -> Iterator[_Part]:
    """Names of statistics, and a function of weights that gives them: all but accuracy."""
    n, value, truth = len(pairs), pairs.value, pairs.truth
    if kind == "regress" and value is not None:
        off = value - truth
        yield [_Named("mae", n)], lambda w: [_mean(np.abs(off), w)]
        yield [_Named("rmse", n), _Named("r2", n)], lambda w: [math.sqrt(_mean(off**2, w)), r2(truth, off, w)]
    if kind == "anomaly" and value is not None:
        fewest = int(min((truth > 0).sum(), (truth <= 0).sum()))
        yield [_Named("auc", n, fewest=fewest, rests=fewest)], lambda w: [auc(value, truth > 0, w)]
    if pairs.said is not None and kind == "anomaly":
        meant, said = truth.astype(np.int64), pairs.said
        yes = int(meant.sum())
        named = _Named("f1", n, fewest=yes, rests=(yes + int(said.sum())) / 2)
        yield [named], lambda w: [float(f1(meant, said, 2, w)[1])]
    elif pairs.said is not None and kind == "several":
        # Slices are told by how many are right alone.
        if labels:
            yield _of_labels(labels, truth.astype(np.int64), pairs.said)
    elif pairs.said is not None:
        yield from _calibration(pairs, truth.astype(np.int64), pairs.said)
        yield _of_classes(labels, truth.astype(np.int64), pairs.said)


def _calibration(pairs: Pairs, truth: Ints, said: Ints) -> Iterator[_Part]:
    """Of the results whose score is known."""
    if pairs.full is not None:
        each = brier(pairs.full, truth)
        yield [_Named("brier", len(pairs))], lambda w: [_mean(each, w)]
    known = np.isfinite(pairs.score) if pairs.score is not None else np.zeros(len(pairs), np.bool_)
    if pairs.score is None or not known.any():
        return
    score, right, n = pairs.score[known], np.asarray(said == truth, np.float64)[known], int(known.sum())
    if pairs.full is None:
        yield [_Named("brier_top", n)], lambda w: [_mean((score - right) ** 2, w[known])]
    where = equal_mass(score)
    yield [_Named("ece", n)], lambda w: [ece(score, right, where, w[known])]


def _of_classes(labels: Sequence[str], truth: Ints, said: Ints) -> _Part:
    count = max(len(labels), int(max(truth.max(), said.max())) + 1)
    support, named = np.bincount(truth, minlength=count), np.bincount(said, minlength=count)
    shown = [int(i) for i in np.argsort(-support, kind="stable")[:_MOST_CLASSES] if support[i] and i < len(labels)]
    fewest = int(support[support > 0].min())

    def scores(w: Floats) -> list[float]:
        found = f1(truth, said, count, w)
        return [macro(found), *found[shown].tolist()]

    # One mistake in the smallest class moves the mean as much as one in so many results.
    whole = _Named("f1_macro", len(truth), fewest=fewest, rests=fewest * int((support > 0).sum()))
    each = [
        _Named("f1", int(support[i]), f"class={labels[i]}", rests=(int(support[i]) + int(named[i])) / 2) for i in shown
    ]
    return [whole, *each], scores


def _of_labels(labels: Sequence[str], truth: Ints, said: Ints) -> _Part:
    meant, told = [[codes >> i & 1 for i in range(len(labels))] for codes in (truth, said)]
    true = [int(one.sum()) for one in meant]

    def scores(w: Floats) -> list[float]:
        each = np.array([f1(one, other, 2, w)[1] for one, other in zip(meant, told, strict=True)])
        return [macro(each), *each.tolist()]

    # As of classes.
    whole = _Named("f1_macro", len(truth), fewest=min(true), rests=min(true) * len(labels))
    named = [
        _Named("f1", n, f"class={label}", rests=(n + int(other.sum())) / 2)
        for label, n, other in zip(labels, true, told, strict=True)
    ]
    return [whole, *named], scores


def f1(truth: Ints, said: Ints, count: int, w: Floats) -> Floats:
    """(count,) F1 of each class; NaN of those neither meant nor named."""
    hit = np.asarray(np.bincount(truth, w * (truth == said), count), np.float64)
    both = np.asarray(np.bincount(truth, w, count) + np.bincount(said, w, count), np.float64)
    return f1_of(hit, both)


def f1_of(hit: Floats, both: Floats) -> Floats:
    """F1 (…) of how many were right, and how many were meant plus how many were named; NaN without any."""
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * hit / both)


def macro(each: Floats) -> float:
    """Mean over the classes that were meant or named."""
    known = each[~np.isnan(each)]
    return float(known.sum() / len(known)) if len(known) else math.nan


def brier(full: Floats, truth: Ints) -> Floats:
    """(n,) squared distance of probabilities (n, C) from certainty of the true class."""
    squares = np.square(full).sum(axis=1) - 2 * full[np.arange(len(truth)), truth] + 1
    return np.asarray(squares)


def equal_mass(score: Floats, bins: int = ECE_BINS) -> Ints:
    """(n,) bin of each result: as many in each as ties allow, and fewer bins where there are few results."""
    bins = max(1, min(bins, len(score) // _FEWEST_A_BIN))
    ordered = np.sort(score)
    cuts = ordered[[len(score) * i // bins for i in range(1, bins)]]
    return np.searchsorted(cuts, score, side="right")


def ece(score: Floats, right: Floats, where: Ints, w: Floats) -> float:
    """Σ share of a bin × |mean score - share right|, from bins as `equal_mass` has them."""
    return float(ece_of(np.asarray(np.bincount(where, w * (score - right)), np.float64), w.sum()))


def ece_by_chance(score: Floats, where: Ints, alike: float) -> tuple[float, float]:
    """Mean and standard deviation of the ECE where each answer is right with the probability that its score says.

    The gap of a bin is near normal with mean 0 then, and its size half-normal; `alike` from `intervals.design`.
    """
    variance = np.bincount(where, score * (1 - score)) * alike
    mean = float(np.sqrt(2 / math.pi * variance).sum()) / len(score)
    return mean, math.sqrt((1 - 2 / math.pi) * float(variance.sum())) / len(score)


def ece_of(apart: Floats, total: Any) -> Floats:
    """ECE (…) from sums of score - right in each bin (…, bins), of so many results in all."""
    return np.asarray(np.abs(apart).sum(axis=-1) / total)


def auc(value: Floats, yes: Booleans, w: Floats) -> float:
    """P(value of an anomaly > value of none), ties counting half; NaN where there is only one of the two."""
    _, at = np.unique(value, return_inverse=True)
    good, bad = np.bincount(at, w * yes), np.bincount(at, w * ~yes)
    if not good.sum() or not bad.sum():
        return math.nan
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2)).sum() / (good.sum() * bad.sum()))


def average_precision(value: Floats, yes: Booleans, w: Floats) -> float:
    """Σ precision × growth of recall, from the largest value down, ties together; NaN without an anomaly."""
    _, at = np.unique(-value, return_inverse=True)
    good = np.cumsum(np.bincount(at, w * yes))
    every = np.cumsum(np.bincount(at, w))
    if not good[-1] > 0:
        return math.nan
    grown = np.diff(good, prepend=0.0) / good[-1]
    with np.errstate(invalid="ignore"):
        return float(np.nansum(grown * good / every))


def r2(truth: Floats, off: Floats, w: Floats) -> float:
    """1 - squared error / variance of the truth; NaN where that is 0."""
    spread = _mean((truth - _mean(truth, w)) ** 2, w)
    return 1 - _mean(off**2, w) / spread if spread > 0 else math.nan


def _mean(values: Any, w: Floats) -> float:
    return float((values * w).sum() / w.sum())


def _metric(name: str, value: float, bounds: tuple[float, float], n: int, label: str = "") -> Metric:
    return Metric(name, rounded(value), rounded(bounds[0]), rounded(bounds[1]), n, label)


def rounded(value: float) -> float | None:
    """Six significant digits; None where it is no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
