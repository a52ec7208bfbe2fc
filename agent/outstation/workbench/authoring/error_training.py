"""Training of an error model from held-out data, by gradient boosting and cross-fitting. Deterministic.

The bins of expected errors come from answers that the trees did not see: each of FOLDS contiguous parts, as neighbours
are alike, is predicted by trees fitted to the others (Chernozhukov et al. 2018, Double/debiased machine learning).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.errors import UsageError
from outstation.foundation.indices import bincount
from outstation.ml.performance import expected_error, intervals
from outstation.ml.performance.error_model import STEPS, ErrorModel, join_inputs
from outstation.ml.performance.expected_error import ErrorReference

MIN_ANSWERS, MAX_ANSWERS = 200, 20_000
FOLDS = 5
_TREES, _DEPTH, _RATE = 64, 4, 0.3
_MAX_LOSS = 1.003  # of the least loss of any number of trees: more trees tell large errors better
# Answers of no error beyond the mean that each leaf is thought to hold; of few answers more, as chance is larger.
_SHRINKAGE, _FEW_ANSWERS = 3.0, 1000
_MAX_INPUTS = 32  # those that by themselves tell most of the error
_CUTS, _TAIL_CUTS = 39, 6  # of an input: evenly, and in each tail
_MIN_TAIL, _FEW_TAIL, _TAIL_SHARE = 25, 12, 400  # answers beyond the last cut: one of 400, within these limits
_MAX_QUANTILE = 0.995  # larger errors count as this one where predictions are judged
# What the error model must explain of the squared deviations of unseen errors, and by how many standard errors.
MIN_EXPLAINED, MIN_STANDARD_ERRORS = 0.01, 3.0


class _Split(msgspec.Struct, frozen=True):
    row: int  # of the search's inputs
    cut: int


class _SplitSearch:
    """Search for the split of inputs (n, D) that explains a target best; values stand in bins between cuts."""

    def __init__(self, inputs: Float64s) -> None:
        beyond = min(max(len(inputs) // _TAIL_SHARE, _FEW_TAIL), _MIN_TAIL)
        tail = np.geomspace(min(beyond / len(inputs), 0.1), 0.1, _TAIL_CUTS)
        quantiles = np.concatenate([tail, np.linspace(0.1, 0.9, _CUTS + 2)[1:-1], 1 - tail[::-1]])
        self.width = len(quantiles) + 1
        self.shrinkage = _SHRINKAGE * max(1.0, _FEW_ANSWERS / len(inputs))
        self.columns = [i for i, column in enumerate(inputs.T) if np.isfinite(column).any()]
        known = [column[np.isfinite(column)] for column in inputs.T[self.columns]]
        # Where a column ends, nothing is above the cut.
        self.cuts = [np.unique(np.quantile(values, quantiles)) for values in known]
        self.cuts = [cuts[cuts < values.max()] for cuts, values in zip(self.cuts, known, strict=True)]
        columns = zip(self.cuts, inputs.T[self.columns], strict=True)
        binned = [np.where(np.isnan(values), 0, np.searchsorted(cuts, values)) for cuts, values in columns]
        self.bins = np.stack(binned)

    def keep_best(self, target: Float64s) -> None:
        """Search only the inputs that by themselves explain most of the target (n,)."""
        gain = self.gains(target, np.zeros(len(target), np.int64), 1).max(1)
        best = np.sort(np.argsort(-gain, kind="stable")[:_MAX_INPUTS]).tolist()
        self.columns, self.cuts = [self.columns[i] for i in best], [self.cuts[i] for i in best]
        self.bins = self.bins[best]

    def gains(self, target: Float64s, leaf: Ints, leaves: int) -> Float64s:
        """Return how much (inputs, bins) a split above each bin, in every leaf (n,) at once, lessens squared errors."""
        inputs, shape = len(self.bins), (len(self.bins), leaves, self.width)
        cells = leaves * self.width
        place = (self.bins + leaf * self.width + (np.arange(inputs, dtype=np.int64) * cells)[:, None]).ravel()
        n = bincount(place, minlength=inputs * cells).reshape(shape).cumsum(-1)
        total = bincount(place, np.tile(target, inputs), inputs * cells).reshape(shape).cumsum(-1)
        above_n, above = n[..., -1:] - n, total[..., -1:] - total
        gain = (total**2 / (n + self.shrinkage) + above**2 / (above_n + self.shrinkage)).sum(1)
        for row, cuts in enumerate(self.cuts):
            gain[row, len(cuts) :] = -np.inf
        return np.asarray(gain)

    def find_best(self, target: Float64s, leaf: Ints, leaves: int) -> _Split:
        gain = self.gains(target, leaf, leaves)
        return _Split(*(int(place) for place in np.unravel_index(gain.argmax(), gain.shape)))


def train(statistics: Float32s | Float64s, answers: Float64s, errors: Float64s) -> ErrorReference:
    """Return the error reference of held-out `answers` (n,) with `errors` (n,) to model windows (n, D), in order.

    Of very many answers, evenly spaced ones are used. Raises UsageError if they are too few, or if unseen errors are
    not predicted better than by their mean.
    """
    known = np.flatnonzero(np.isfinite(errors) & np.isfinite(answers))
    if len(known) < MIN_ANSWERS:
        raise UsageError(f"{len(known)} labelled windows; an estimate takes {MIN_ANSWERS}")
    known = known[:: math.ceil(len(known) / MAX_ANSWERS)]
    absolute = np.abs(errors[known])
    mean = float(absolute.mean())
    if not (mean >= expected_error.MIN_SUM and (absolute**2).sum() <= expected_error.MAX_SUM):
        raise UsageError("all errors are zero, or beyond any number: nothing to estimate")
    inputs, ratio = join_inputs(statistics[known], answers[known]), absolute / mean
    unseen = _cross_fit(inputs, ratio)
    loss = ((unseen - ratio) ** 2).mean(1)
    best, trees = max(1, int(loss.argmin())), max(1, int(np.flatnonzero(loss <= loss.min() * _MAX_LOSS)[-1]))
    # A few large errors, or predictions, decide nothing.
    large = np.quantile(ratio, _MAX_QUANTILE)
    constant, predicted = ((np.minimum(unseen[count], large) - np.minimum(ratio, large)) ** 2 for count in (0, best))
    _require_skill(constant, predicted)
    model = _boost(inputs, ratio, trees)
    seen = model.predict(statistics[known], answers[known])
    return _bin_errors(model, seen, np.rint(unseen[trees] * STEPS).astype(np.int64), absolute)


def _require_skill(constant: Float64s, predicted: Float64s) -> None:
    """Raise UsageError unless squared deviations (n,) of predictions are clearly below those of the mean."""
    gain = constant - predicted
    error = float(gain.std()) * math.sqrt(intervals.estimate_design_effect(gain) / len(gain))
    explained = float(gain.mean() / max(float(constant.mean()), 1e-300))
    if explained < MIN_EXPLAINED or gain.mean() < MIN_STANDARD_ERRORS * error:
        raise UsageError(
            f"the inputs explain {max(explained, 0.0):.1%} of how the model's error varies, which chance explains, too"
        )


def _bin_errors(model: ErrorModel, seen: Ints, unseen: Ints, absolute: Float64s) -> ErrorReference:
    """Return the reference with the errors (n,) by bin of the predictions (n,) of trees that did not see them.

    Bins hold equal shares of the square root of the density of predictions (Dalenius and Hodges 1959): narrower than
    those of equal counts where predictions are large and few. The predictions of `model` (n,) reach further out.
    """
    bins, ordered = expected_error.BINS, np.sort(np.concatenate([seen, unseen]))
    density = np.cumsum(np.sqrt(np.diff(ordered, prepend=ordered[0])))
    edges = np.rint(np.interp(np.linspace(0, density[-1], bins + 1)[1:-1], density, ordered)).astype(np.int64)
    place = np.searchsorted(edges, unseen, side="right")
    total, squares = (bincount(place, values, bins) for values in (absolute, absolute**2))
    return ErrorReference(model, edges, bincount(place, minlength=bins), total, squares)


def _cross_fit(inputs: Float64s, ratio: Float64s) -> Float64s:
    """Return the predictions (1 + trees, n) of each part by trees fitted to the others: the mean, then more trees."""
    n = len(ratio)
    fold = np.arange(n, dtype=np.int64) * FOLDS // n
    unseen = np.empty((1 + _TREES, n))
    for number in range(FOLDS):
        inside = fold == number
        model = _boost(inputs[~inside], ratio[~inside], _TREES)
        by_tree = model.predict_by_tree(inputs[inside])
        unseen[:, inside] = np.cumsum(np.insert(by_tree, 0, model.base, axis=1), axis=1).T / STEPS
    return unseen


def _boost(inputs: Float64s, ratio: Float64s, trees: int) -> ErrorModel:
    """Fit trees to errors (n,), as shares of their mean, one after another."""
    base = float(ratio.mean())
    search, residual = _SplitSearch(inputs), ratio - base
    search.keep_best(residual)
    columns = np.zeros((trees, _DEPTH), np.int64)
    splits, leaves = np.zeros((trees, _DEPTH)), np.zeros((trees, 1 << _DEPTH), np.int64)
    for tree in range(trees):
        leaf = np.zeros(len(residual), np.int64)
        for level in range(_DEPTH):
            split = search.find_best(residual, leaf, 1 << level)
            columns[tree, level] = search.columns[split.row]
            if split.cut < len(search.cuts[split.row]):
                splits[tree, level] = search.cuts[split.row][split.cut]
                leaf += (search.bins[split.row] > split.cut).astype(np.int64) << level
            else:
                # No input varies: every answer is in one leaf.
                splits[tree, level] = np.finfo(np.float64).max
        n, total = bincount(leaf, minlength=1 << _DEPTH), bincount(leaf, residual, 1 << _DEPTH)
        leaves[tree] = np.rint(_RATE * total / (n + search.shrinkage) * STEPS)
        residual = residual - leaves[tree][leaf] / STEPS
    return ErrorModel(round(base * STEPS), columns, splits, leaves)
