"""Where a model is worse than elsewhere: its results in slices by a category or a binned number.

A slice is called worse where it is so by a one-sided test against all other results, with Holm's correction (1979) over
all slices of all fields: 5 % for the whole table. Source of the exact test: Fisher (1922).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from msgspec.structs import replace

from agent.arrays import Float64s
from agent.performance import intervals, metrics
from agent.performance.metrics import LabelledPredictions, MetricEstimate, round_or_none

WORSE, SMALL, OK = "worse", "small", "ok"
SIGNIFICANCE_LEVEL = 0.05
# A slice whose interval reaches further than this to either side says too little.
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
    """Accuracy, or MAE of numbers, in each slice; then F1 and Brier. `slices`: field → (n,) texts, as `pairs`.

    `alike` results count as one; without it, as many as neighbours tell.
    """
    off = predictions.task_losses(kind)
    if off is None or not len(predictions):
        return []
    design_effect = intervals.estimate_design_effect(off) if design_effect is None else design_effect
    found: list[tuple[MetricEstimate, float]] = []
    more: list[MetricEstimate] = []
    for field in sorted(slices):
        values = np.array(_merge_rare_values(slices[field]))
        for value in sorted(set(values.tolist())):
            inside = values == value
            found.append(_slice_metric(kind, f"{field}={value}", off, inside, design_effect))
            if kind != "regress" and found[-1][0].state != SMALL and inside.sum() >= MIN_RESULTS_FOR_EXTRA:
                more += _extra_metrics(kind, f"{field}={value}", predictions[inside])
    worse = holm_correction([p for _, p in found])
    # Where there is no room for all, what was tested is told first.
    return [*(_mark_worse(metric, bad) for (metric, _), bad in zip(found, worse, strict=True)), *more]


def holm_correction(p_values: Sequence[float]) -> list[bool]:
    """Which p-values are significant together; NaN, of what was not tested, never is."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    found = [False] * len(p_values)
    for rank, (p, i) in enumerate(tested):
        if p > SIGNIFICANCE_LEVEL / (len(tested) - rank):
            break
        found[i] = True
    return found


def _slice_metric(
    kind: str,
    name: str,
    losses: Float64s,
    inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
    design_effect: float,
) -> tuple[MetricEstimate, float]:
    n, mean = int(inside.sum()), float(losses[inside].mean())
    if kind == "regress":
        half = intervals.Z * math.sqrt(float(losses[inside].var()) * design_effect / max(1, n - 1))
        state = SMALL if n / design_effect < _MIN_REGRESSION_RESULTS else OK
        # Errors that are all the same do not tell how much they vary.
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


def _extra_metrics(kind: str, name: str, predictions: LabelledPredictions) -> list[MetricEstimate]:
    found = metrics.compute_metrics(kind, (), predictions)
    return [replace(one, slice=name) for one in found if one.metric in _EXTRA_METRICS and not one.slice]


def _mark_worse(metric: MetricEstimate, worse: bool) -> MetricEstimate:
    return replace(metric, state=WORSE) if worse else metric


def _p_value(kind: str, inside: Float64s, outside: Float64s, design_effect: float) -> float:
    """That chance makes `inside` this much worse; NaN where too few results are in or out of it."""
    a, b = len(inside) / design_effect, len(outside) / design_effect
    if min(a, b) < (_MIN_RESULTS if kind != "regress" else _MIN_REGRESSION_RESULTS):
        return math.nan
    if kind != "regress" and a + b <= _MAX_EXACT_RESULTS:
        return _fisher_exact(
            round(inside.sum() / design_effect), round(a), round(outside.sum() / design_effect), round(b)
        )
    spread = float(inside.var() / a + outside.var() / b)
    apart = float(inside.mean() - outside.mean())
    if spread <= 0:
        return 0.0 if apart > 0 else 1.0
    return 0.5 * math.erfc(apart / math.sqrt(2 * spread))


def _fisher_exact(wrong: int, n: int, wrong_elsewhere: int, n_elsewhere: int) -> float:
    """P(at least `wrong` of `n`), all mistakes dealt out at random."""
    total, mistakes = n + n_elsewhere, wrong + wrong_elsewhere
    ways = sum(
        math.comb(n, k) * math.comb(n_elsewhere, mistakes - k)
        for k in range(wrong, min(n, mistakes) + 1)
        if mistakes - k <= n_elsewhere
    )
    return ways / math.comb(total, mistakes)


def _merge_rare_values(values: Sequence[str]) -> list[str]:
    """The most frequent values, the rest together."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    kept = set(sorted(counts, key=lambda value: (-counts[value], value))[:_MAX_VALUES])
    return [value if value in kept else OTHER for value in values]


def name_bins(values: Float64s, edges: Sequence[float]) -> list[str]:
    """Names of the bins that ascending `edges` make of (n,) values."""
    below = f"below {edges[0]:g}"
    between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    names = [below, *between, f"from {edges[-1]:g}"]
    at = np.searchsorted(np.asarray(edges), values, side="right")
    return [MISSING if math.isnan(value) else names[i] for i, value in zip(at, values.tolist(), strict=True)]
