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

from agent.arrays import Floats
from agent.performance import intervals, metrics
from agent.performance.metrics import Metric, Pairs, rounded

WORSE, SMALL, OK = "worse", "small", "ok"
LEVEL = 0.05
# A slice whose interval reaches further than this to either side says too little.
_WIDE = 0.15
_FEWEST = 5
FEWEST_MORE = 50
_MORE = ("f1_macro", "f1", "brier", "brier_top")
_FEWEST_NUMBERS = 20
_MOST_VALUES = 20
_EXACT = 2_000
OTHER, MISSING = "other", "missing"


def measure(kind: str, pairs: Pairs, slices: Mapping[str, Sequence[str]], alike: float | None = None) -> list[Metric]:
    """Accuracy, or MAE of numbers, in each slice; then F1 and Brier. `slices`: field → (n,) texts, as `pairs`.

    `alike` results count as one; without it, as many as neighbours tell.
    """
    off = pairs.off(kind)
    if off is None or not len(pairs):
        return []
    alike = intervals.design(off) if alike is None else alike
    found: list[tuple[Metric, float]] = []
    more: list[Metric] = []
    for field in sorted(slices):
        values = np.array(_few(slices[field]))
        for value in sorted(set(values.tolist())):
            inside = values == value
            found.append(_one(kind, f"{field}={value}", off, inside, alike))
            if kind != "regress" and found[-1][0].state != SMALL and inside.sum() >= FEWEST_MORE:
                more += _more(kind, f"{field}={value}", pairs[inside])
    worse = holm([p for _, p in found])
    # Where there is no room for all, what was tested is told first.
    return [*(_judged(metric, bad) for (metric, _), bad in zip(found, worse, strict=True)), *more]


def holm(ps: Sequence[float]) -> list[bool]:
    """Which p-values are significant together; NaN, of what was not tested, never is."""
    tested = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    found = [False] * len(ps)
    for rank, (p, i) in enumerate(tested):
        if p > LEVEL / (len(tested) - rank):
            break
        found[i] = True
    return found


def _one(
    kind: str, name: str, off: Floats, inside: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], alike: float
) -> tuple[Metric, float]:
    n, mean = int(inside.sum()), float(off[inside].mean())
    if kind == "regress":
        half = intervals.Z * math.sqrt(float(off[inside].var()) * alike / max(1, n - 1))
        state = SMALL if n / alike < _FEWEST_NUMBERS else OK
        # Errors that are all the same do not tell how much they vary.
        low, high = (max(0.0, mean - half), mean + half) if n >= intervals.FEWEST and half > 0 else intervals.NONE
        metric = Metric("mae", rounded(mean), rounded(low), rounded(high), n, name, state)
    else:
        low, high = intervals.wilson(1 - mean, n / alike)
        state = SMALL if n / alike < _FEWEST or high - low > 2 * _WIDE else OK
        metric = Metric("accuracy", rounded(1 - mean), rounded(low), rounded(high), n, name, state)
    return metric, _p(kind, off[inside], off[~inside], alike)


def _more(kind: str, name: str, inside: Pairs) -> list[Metric]:
    found = metrics.measure(kind, (), inside)
    return [replace(one, slice=name) for one in found if one.metric in _MORE and not one.slice]


def _judged(metric: Metric, worse: bool) -> Metric:
    return replace(metric, state=WORSE) if worse else metric


def _p(kind: str, inside: Floats, outside: Floats, alike: float) -> float:
    """That chance makes `inside` this much worse; NaN where too few results are in or out of it."""
    a, b = len(inside) / alike, len(outside) / alike
    if min(a, b) < (_FEWEST if kind != "regress" else _FEWEST_NUMBERS):
        return math.nan
    if kind != "regress" and a + b <= _EXACT:
        return _fisher(round(inside.sum() / alike), round(a), round(outside.sum() / alike), round(b))
    spread = float(inside.var() / a + outside.var() / b)
    apart = float(inside.mean() - outside.mean())
    if spread <= 0:
        return 0.0 if apart > 0 else 1.0
    return 0.5 * math.erfc(apart / math.sqrt(2 * spread))


def _fisher(wrong: int, n: int, wrong_elsewhere: int, n_elsewhere: int) -> float:
    """P(at least `wrong` of `n`), all mistakes dealt out at random."""
    total, mistakes = n + n_elsewhere, wrong + wrong_elsewhere
    ways = sum(
        math.comb(n, k) * math.comb(n_elsewhere, mistakes - k)
        for k in range(wrong, min(n, mistakes) + 1)
        if mistakes - k <= n_elsewhere
    )
    return ways / math.comb(total, mistakes)


def _few(values: Sequence[str]) -> list[str]:
    """The most frequent values, the rest together."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    kept = set(sorted(counts, key=lambda value: (-counts[value], value))[:_MOST_VALUES])
    return [value if value in kept else OTHER for value in values]


def binned(values: Floats, edges: Sequence[float]) -> list[str]:
    """Names of the bins that ascending `edges` make of (n,) values."""
    below = f"below {edges[0]:g}"
    between = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    names = [below, *between, f"from {edges[-1]:g}"]
    at = np.searchsorted(np.asarray(edges), values, side="right")
    return [MISSING if math.isnan(value) else names[i] for i, value in zip(at, values.tolist(), strict=True)]
