"""How good answers are: the project's metrics (`agent.performance.metrics`) from sums over units, with intervals."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Floats, Ints
from agent.evaluation.bootstrap import REPLICATES, Units, share, span
from agent.evaluation.document import Bin, Class, Span
from agent.performance import metrics as quality
from agent.performance.metrics import Metric, Pairs

_TOP = (2, 3, 5)
_RANKED_REPLICATES = 200  # of AUC and average precision, each of which looks at every result
MAIN = {"classify": "accuracy", "regress": "mae", "anomaly": "auc"}


class Measured(msgspec.Struct, frozen=True, eq=False):
    metrics: list[Metric]
    classes: list[Class]
    confusion: list[list[int]]
    reliability: list[Bin]


def measure(kind: str, labels: list[str], pairs: Pairs, units: Units) -> Measured:
    """Everything there is to say of `pairs`."""
    if kind == "classify":
        return _classes(labels, pairs, units)
    metrics = _numbers(pairs, units) if kind == "regress" else _anomalies(pairs, units)
    return Measured(metrics, [], _table(pairs, 2) if pairs.said is not None else [], [])


def main(kind: str, pairs: Pairs, units: Units) -> Floats:
    """(1 + REPLICATES,) accuracy, MAE or AUC."""
    n = units.sums(np.ones(len(pairs)))[:, 0]
    if kind == "classify":
        assert pairs.said is not None
        return np.asarray(units.sums(pairs.said == pairs.truth)[:, 0] / n)
    assert pairs.value is not None
    if kind == "regress":
        return np.asarray(units.sums(np.abs(pairs.value - pairs.truth))[:, 0] / n)
    return _ranked(quality.auc, pairs, units)


def main_span(kind: str, pairs: Pairs, units: Units) -> Span:
    found = main(kind, pairs, units)
    return share(found, len(pairs), units) if kind == "classify" else span(found)


def _ranked(metric: quality.Ranked, pairs: Pairs, units: Units) -> Floats:
    """(1 + replicates,) of a metric that looks at the order of all values."""
    assert pairs.value is not None
    yes, found = pairs.truth > 0, [metric(pairs.value, pairs.truth > 0, np.ones(len(pairs)))]
    few = min(REPLICATES, _RANKED_REPLICATES)
    return np.array([*found, *(metric(pairs.value, yes, w[units.code]) for w in units.weights[:few])])


def _metric(name: str, found: Span, n: int) -> Metric:
    return Metric(name, found.value, found.low, found.high, n)


def _numbers(pairs: Pairs, units: Units) -> list[Metric]:
    assert pairs.value is not None
    n, off = len(pairs), pairs.value - pairs.truth
    # R² from sums needs a centred truth: squares of large numbers cancel.
    truth = pairs.truth - pairs.truth.mean()
    total, bias, mae, square, t, tt = units.sums(
        np.stack([np.ones(n), off, np.abs(off), off**2, truth, truth**2], axis=1)
    ).T
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = 1 - square / (tt - t**2 / total)
    found = {"mae": mae / total, "rmse": np.sqrt(square / total), "r2": r2, "bias": bias / total}
    return [_metric(name, span(np.asarray(figures)), n) for name, figures in found.items()]


def _anomalies(pairs: Pairs, units: Units) -> list[Metric]:
    n = len(pairs)
    metrics = [
        _metric("auc", span(_ranked(quality.auc, pairs, units)), n),
        _metric("average_precision", span(_ranked(quality.average_precision, pairs, units)), n),
    ]
    if pairs.said is None:
        return metrics
    sums = _sums(pairs, 2, units)
    total = units.sums(np.ones(n))[:, 0]
    metrics.append(_metric("accuracy", share(sums.hit.sum(axis=1) / total, n, units), n))
    one = _class("anomaly", 1, sums, units)
    for name, found in (("precision", one.precision), ("recall", one.recall), ("f1", one.f1)):
        metrics.append(_metric(name, found, n))
    return metrics


class _Sums(msgspec.Struct, frozen=True, eq=False):
    """(1 + REPLICATES, C) results of each class that were right, meant, and named."""

    hit: Floats
    meant: Floats
    named: Floats


def _sums(pairs: Pairs, count: int, units: Units) -> _Sums:
    assert pairs.said is not None
    truth = pairs.truth.astype(np.int64)
    hit = units.counts(truth, count, np.asarray(pairs.said == truth))
    return _Sums(hit, units.counts(truth, count), units.counts(pairs.said, count))


def _class(label: str, i: int, sums: _Sums, units: Units) -> Class:
    hit, meant, named = sums.hit[:, i], sums.meant[:, i], sums.named[:, i]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hit / named, hit / meant
    of_named, of_meant = share(precision, float(named[0]), units), share(recall, float(meant[0]), units)
    with np.errstate(invalid="ignore"):
        f1 = harmonic(span(quality.f1_of(hit, meant + named)), of_named, of_meant)
    return Class(label=label, n=int(meant[0]), named=int(named[0]), precision=of_named, recall=of_meant, f1=f1)


def harmonic(f1: Span, precision: Span, recall: Span) -> Span:
    """F1 with its interval; where replicates cannot differ, from the ends of the intervals of its parts."""
    ends = (precision.low, recall.low, precision.high, recall.high)
    if f1.low is None or f1.low != f1.high or None in ends:
        return f1
    low, high = (
        quality.rounded(2 * a * b / (a + b)) if a and b and a + b > 0 else 0.0 for a, b in (ends[:2], ends[2:])
    )
    return Span(value=f1.value, low=low, high=high)


def _classes(labels: list[str], pairs: Pairs, units: Units) -> Measured:
    assert pairs.said is not None
    n, truth = len(pairs), pairs.truth.astype(np.int64)
    sums = _sums(pairs, len(labels), units)
    total = units.sums(np.ones(n))[:, 0]
    metrics = [_metric("accuracy", share(sums.hit.sum(axis=1) / total, n, units), n)]
    with np.errstate(invalid="ignore"):
        each = quality.f1_of(sums.hit, sums.meant + sums.named)
    metrics.append(_metric("f1_macro", span(np.nanmean(each, axis=1)), n))
    if pairs.full is not None and np.isfinite(pairs.full).all():
        metrics += _tops(pairs.full, truth, total, units)
        metrics.append(_metric("brier", span(units.sums(quality.brier(pairs.full, truth))[:, 0] / total), n))
    reliability: list[Bin] = []
    if pairs.score is not None and np.isfinite(pairs.score).all():
        right = np.asarray(pairs.said == truth, np.float64)
        where = quality.equal_mass(pairs.score)
        apart = _by_bin(where, pairs.score - right, units)
        metrics.append(_metric("ece", span(quality.ece_of(apart, total)), n))
        reliability = _reliability(where, pairs.score, right, units)
    shown = [i for i in range(len(labels)) if sums.meant[0, i] or sums.named[0, i]]
    classes = [_class(labels[i], i, sums, units) for i in shown]
    return Measured(metrics, classes, _table(pairs, len(labels)), reliability)


def _tops(full: Floats, truth: Ints, total: Floats, units: Units) -> list[Metric]:
    """How often the true class is among the k most probable; of equals, the first named come first."""
    own = full[np.arange(len(truth)), truth][:, None]
    before = np.arange(full.shape[1])[None] < truth[:, None]
    rank = ((full > own) | ((full == own) & before)).sum(axis=1)
    tops = [k for k in _TOP if k < full.shape[1]]
    return [_metric(f"top_{k}", share(units.sums(rank < k)[:, 0] / total, len(truth), units), len(truth)) for k in tops]


def _by_bin(where: Ints, values: Floats, units: Units) -> Floats:
    return units.sums(values[:, None] * (where[:, None] == np.arange(int(where.max()) + 1)))


def _reliability(where: Ints, score: Floats, right: Floats, units: Units) -> list[Bin]:
    n, scores, rights = (_by_bin(where, values, units) for values in (np.ones(len(score)), score, right))
    found = []
    for i in np.flatnonzero(n[0]):
        told = share(rights[:, i] / n[:, i], float(n[0, i]), units)
        found.append(Bin(n=int(n[0, i]), score=float(scores[0, i] / n[0, i]), right=told))
    return found


def _table(pairs: Pairs, count: int) -> list[list[int]]:
    """A row for each true class, a column for each named one."""
    assert pairs.said is not None
    where = pairs.truth.astype(np.int64) * count + pairs.said
    table = np.bincount(where, minlength=count * count).reshape(count, count)
    return [[int(n) for n in row] for row in table]
