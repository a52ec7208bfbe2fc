"""95 % intervals for results whose neighbours are alike and whose number is small. Deterministic.

Sources: Wilson (1927) for shares; Rubin (1981), The Bayesian bootstrap, over blocks of neighbours (Künsch 1989), for
everything else; batch means (Schmeiser 1982) for how many results count as one, with Student's quantile by Abramowitz &
Stegun (1964), 26.7.5. The weights come from a counter through
splitmix64 (Steele, Lea, Flood 2014), so that the same labels give the same interval to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.foundation.indices import repeat

Z = 1.959964
REPLICATES = 200
# With fewer results, or fewer of a class, only a share (`wilson`) has an interval.
MIN_RESULTS = 10
NO_INTERVAL = (math.nan, math.nan)
_MAX_AUTOCORRELATION = 0.9
_MIN_GROUPS = 4
_MIN_BLOCKS = 20
# Fewer batches say too little about how much they vary.
_MIN_BATCHES = 4
# Standard errors above 1 from which the variance of batches counts in full, with Student's quantile.
_CLEAR_ERRORS = 2.0
# Variance of a block's weight: more of it lets a replicate rest on a few blocks.
_MAX_SPREAD = 5.0


class Dependence(NamedTuple):
    """Dependence of neighbours: `design_effect` results count as one; blocks of `block` are drawn together.

    `spread` is the variance of a block's weight: more than 1 where too few blocks would be as long as the dependence.
    """

    design_effect: float
    block: int
    spread: float


INDEPENDENT = Dependence(1.0, 2, 1.0)


def wilson(share: float, n: float, z: float = Z) -> tuple[float, float]:
    """Return the interval of a share of `n` results, `n` already divided by the design effect; (0, 1) without any."""
    if n <= 0:
        return 0.0, 1.0
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # Rounding would miss 0 and 1 by a little.
    return 0.0 if share <= 0 else max(0.0, centre - half), 1.0 if share >= 1 else min(1.0, centre + half)


def student_t_quantile(degrees_of_freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, for at least 3 degrees of freedom."""
    z, d = Z, degrees_of_freedom
    first = (z**3 + z) / (4 * d)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    return z + first + second + third


def estimate_design_effect(values: Float64s) -> float:
    """Return how many of (n,) values in order count as one, as of an AR(1) process, beyond chance."""
    n = len(values)
    if n < 10 or not np.isfinite(values).all():
        return 1.0
    # Squares of very large numbers overflow.
    centred = values / (np.abs(values).max() or 1.0)
    centred = centred - centred.mean()
    total = float((centred**2).sum())
    if total <= 0:
        return 1.0
    r = float((centred[1:] * centred[:-1]).sum()) / total + 1 / n - 1 / math.sqrt(n)
    r = min(max(r, 0.0), _MAX_AUTOCORRELATION)
    return (1 + r) / (1 - r)


def estimate_group_effect(sums: Float64s, squares: Float64s, size: int) -> float:
    """Return how many values count as one, by how much means of groups of `size` vary beyond chance.

    `sums` and `squares` (groups,) are those of each group's values. It also sees what neighbours do not show: a person
    or a shift in which many, but not all, values differ. Source: batch means (Schmeiser 1982, Operations Research).
    """
    return max(1.0, _variance_ratio(sums, squares, size) - _ratio_error(len(sums)))


def _ratio_error(groups: int) -> float:
    """Return the standard error of a variance ratio without any correlation."""
    return math.sqrt(2 / max(1, groups - 1))


def _variance_ratio(sums: Float64s, squares: Float64s, size: int) -> float:
    """Return how much means of groups vary, as a multiple of what chance lets expect; 1 if that is unknown."""
    if len(sums) < _MIN_GROUPS or not np.isfinite(squares).all():
        return 1.0
    variance = float(squares.mean()) / size - (float(sums.mean()) / size) ** 2
    if variance <= 0:
        return 1.0
    return float((sums / size).var(ddof=1)) * size / variance


def estimate_dependence(values: Float64s, *, with_quantile: bool = True) -> Dependence:
    """Return the dependence of (n,) values in order: the largest of an AR(1) process and of batch means of any length.

    A session, person or shift that is wrong more often than others shows in batches as long as it, though neighbours
    hardly correlate. The fewer the batches, the more a variance over them must count: where it is clear that batches
    differ, by Student's quantile. Without `with_quantile` it does not: for a test that allows for few results itself.
    """
    n, effect = len(values), estimate_design_effect(values)
    if n < 10 or not np.isfinite(values).all():
        return Dependence(effect, max(1, min(round(2 * effect), n // _MIN_BLOCKS)), 1.0)
    scaled = values / (np.abs(values).max() or 1.0)
    size = 2
    while n // size >= _MIN_BATCHES:
        ratio, error = _variance_ratio(*_sum_groups(scaled, size), size), _ratio_error(n // size)
        if with_quantile and ratio > 1 + _CLEAR_ERRORS * error:
            effect = max(effect, 1 + (student_t_quantile(n // size - 1) / Z) ** 2 * (ratio - 1))
        effect = max(effect, ratio - error)
        size = round(1.5 * size)
    block = max(1, min(round(2 * effect), n // _MIN_BLOCKS))
    block_effect = estimate_group_effect(*_sum_groups(scaled, block), block)
    return Dependence(effect, block, min(max(effect / block_effect, 1.0), _MAX_SPREAD))


def _sum_groups(values: Float64s, size: int) -> tuple[Float64s, Float64s]:
    """Return sums and sums of squares of groups of neighbours (n // size,); the first values make no group."""
    grouped = values[len(values) % size :].reshape(-1, size)
    return grouped.sum(axis=1), (grouped**2).sum(axis=1)


def spread_weights(weights: Float64s, spread: float) -> Float64s:
    """Return exponential weights as Weibull weights of mean 1 and variance `spread`, between 1 and 5."""
    if spread <= 1:
        return weights
    low, high = 1.0, 2.0
    for _ in range(40):
        power = (low + high) / 2
        variance = math.exp(math.lgamma(1 + 2 * power) - 2 * math.lgamma(1 + power)) - 1
        low, high = (power, high) if variance < spread else (low, power)
    return np.asarray(weights**low / math.gamma(1 + low))


def bootstrap_weights(n: int, dependence: Dependence) -> Iterator[Float64s]:
    """Yield REPLICATES weight vectors (n,) with mean 1, constant within blocks."""
    block = max(1, min(dependence.block, n // _MIN_BLOCKS))
    blocks = -(-n // block)
    for first in range(1, REPLICATES * blocks, blocks):
        counter = np.arange(first, first + blocks, dtype=np.uint64)
        z = counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        uniform = ((np.asarray(z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        drawn = repeat(spread_weights(-np.log(uniform), dependence.spread), block)[:n]
        yield np.asarray(drawn / drawn.mean())


def bootstrap(
    statistics: Callable[[Float64s], Sequence[float]], weights: Iterable[Float64s]
) -> list[tuple[float, float]]:
    """Return the percentile interval of each statistic of weights (n,) over replicates.

    NaN for a statistic without a value in most replicates, and for one that is the same in all: a value that did not
    vary says nothing about how much it can.
    """
    bounds = []
    for column in np.array([statistics(vector) for vector in weights]).T:
        known = column[np.isfinite(column)]
        if 2 * len(known) < len(column):
            bounds.append(NO_INTERVAL)
            continue
        low, high = np.quantile(known, [0.025, 0.975])
        flat = high - low <= 1e-9 * max(abs(low), abs(high))
        bounds.append(NO_INTERVAL if flat else (float(low), float(high)))
    return bounds
