"""Slices in which a model is worse than elsewhere: its results by a category or a binned number.

A slice is worse by a one-sided test against all other results, with Holm's correction (1979) over all slices of all
fields: 5 % for the whole table. Source of the exact test: Fisher (1922).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation.arrays import Bools, Float64s
from outstation.foundation.indices import bincount
from outstation.ml.performance import intervals
from outstation.ml.performance.estimates import MetricEstimate, compute_metrics, round_or_none
from outstation.ml.performance.metrics import LabelledPredictions

WORSE, SMALL, OK = "worse", "small", "ok"
SIGNIFICANCE_LEVEL = 0.05
# A slice with a wider interval to either side is too small to tell.
_MAX_HALF_WIDTH = 0.15
_MIN_RESULTS = 5
MIN_RESULTS_FOR_EXTRA = 50
_EXTRA_METRICS = ("f1_macro", "f1", "brier", "brier_top")
_MIN_REGRESSION_RESULTS = 20
_MAX_VALUES = 20
_MAX_EXACT_RESULTS = 2_000
OTHER, MISSING = "other", "missing"


def compute_slice_metrics(
    kind: str, predictions: LabelledPredictions, slices: Mapping[str, Sequence[str]], design_effect: float | None = None
) -> list[MetricEstimate]:
    """Return accuracy or MAE in each slice, then F1 and Brier; `slices`: field → texts (n,).

    Of each field, `design_effect` results count as one; by default as its losses depend on each other within slices,
    so that a slice that is worse throughout is no dependence.
    """
    losses = predictions.losses(kind)
    if losses is None or not len(predictions):
        return []
    tested: list[tuple[MetricEstimate, float]] = []
    extra: list[MetricEstimate] = []
    for field in sorted(slices):
        values = np.array(merge_rare_values(slices[field]))
        effect = _within_effect(losses, values) if design_effect is None else design_effect
        for value in sorted(set(values.tolist())):
            inside = values == value
            tested.append(_slice_metric(kind, f"{field}={value}", losses, inside, effect))
            if kind != "regress" and tested[-1][0].state != SMALL and inside.sum() >= MIN_RESULTS_FOR_EXTRA:
                estimates = compute_metrics(kind, (), predictions[inside])
                extra += [
                    replace(e, slice=(f"{field}={value}"))
                    for e in estimates
                    if e.metric in _EXTRA_METRICS and not e.slice
                ]
    significant = holm_correction([p for _, p in tested])
    marked = [
        replace(metric, state=WORSE) if worse else metric
        for (metric, _), worse in zip(tested, significant, strict=True)
    ]
    # Tested slices come first: a message may have no room for all.
    return [*marked, *extra]


def _within_effect(losses: Float64s, values: NDArray[np.str_]) -> float:
    """Return how many results count as one, by how losses (n,) vary around the mean of their slice."""
    _, place = np.unique(values, return_inverse=True)
    means = bincount(place, losses) / bincount(place)
    return intervals.estimate_dependence(losses - means[place], with_quantile=False).design_effect


def holm_correction(p_values: Sequence[float]) -> list[bool]:
    """Return which p-values are significant together; NaN, for a test not made, never is."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    significant = [False] * len(p_values)
    for rank, (p, i) in enumerate(tested):
        if p > SIGNIFICANCE_LEVEL / (len(tested) - rank):
            break
        significant[i] = True
    return significant


def _slice_metric(
    kind: str, name: str, losses: Float64s, inside: Bools, design_effect: float
) -> tuple[MetricEstimate, float]:
    n, mean = int(inside.sum()), float(losses[inside].mean())
    if kind == "regress":
        half = intervals.Z * math.sqrt(float(losses[inside].var()) * design_effect / max(1, n - 1))
        state = SMALL if n / design_effect < _MIN_REGRESSION_RESULTS else OK
        # Errors that are all the same do not show how much they vary.
        low, high = (
            (max(0.0, mean - half), mean + half) if n >= intervals.MIN_RESULTS and half > 0 else intervals.NO_INTERVAL
        )
        metric = MetricEstimate("mae", round_or_none(mean), round_or_none(low), round_or_none(high), n, name, state)
    else:
        low, high = intervals.wilson(1 - mean, n / design_effect)
        state = SMALL if n / design_effect < _MIN_RESULTS or high - low > 2 * _MAX_HALF_WIDTH else OK
        metric = MetricEstimate(
            "accuracy", round_or_none(1 - mean), round_or_none(low), round_or_none(high), n, name, state
        )
    return metric, _p_value(kind, losses[inside], losses[~inside], design_effect)


def _p_value(kind: str, inside: Float64s, outside: Float64s, design_effect: float) -> float:
    """Return the probability that chance makes `inside` this much worse; NaN if too few results are in or out of it."""
    a, b = len(inside) / design_effect, len(outside) / design_effect
    if min(a, b) < (_MIN_RESULTS if kind != "regress" else _MIN_REGRESSION_RESULTS):
        return math.nan
    if kind != "regress" and a + b <= _MAX_EXACT_RESULTS:
        return _fisher_exact(
            round(inside.sum() / design_effect), round(a), round(outside.sum() / design_effect), round(b)
        )
    spread = float(inside.var() / a + outside.var() / b)
    difference = float(inside.mean() - outside.mean())
    if spread <= 0:
        return 0.0 if difference > 0 else 1.0
    return 0.5 * math.erfc(difference / math.sqrt(2 * spread))


def _fisher_exact(wrong: int, n: int, wrong_elsewhere: int, n_elsewhere: int) -> float:
    """Return P(at least `wrong` of `n`) if all mistakes are dealt out at random."""
    total, mistakes = n + n_elsewhere, wrong + wrong_elsewhere
    ways = sum(
        math.comb(n, k) * math.comb(n_elsewhere, mistakes - k)
        for k in range(wrong, min(n, mistakes) + 1)
        if mistakes - k <= n_elsewhere
    )
    return ways / math.comb(total, mistakes)


def merge_rare_values(values: Sequence[str]) -> list[str]:
    """Return the most frequent values, and OTHER for the rest."""
    counts = Counter(values)
    frequent = set(sorted(counts, key=lambda value: (-counts[value], value))[:_MAX_VALUES])
    return [value if value in frequent else OTHER for value in values]


def name_bins(values: Float64s, edges: Sequence[float]) -> list[str]:
    """Return the names of the bins that (n,) values fall in, between ascending `edges`."""
    below = f"below {edges[0]:g}"
    between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    names = [below, *between, f"from {edges[-1]:g}"]
    at = np.searchsorted(np.asarray(edges), values, side="right")
    return [MISSING if math.isnan(value) else names[i] for i, value in zip(at, values.tolist(), strict=True)]
