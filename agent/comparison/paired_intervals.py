"""95 % intervals of what two bundles made of the same windows, from blocks of them: one message each.

Neighbouring windows are alike, and so are neighbouring blocks, though less; devices are not. So blocks count, not
windows, fewer of them where they follow one another; from FEWEST devices on, devices do. Fewer of either say nothing.
What pulls hard comes in bursts, of which few blocks see too few: so the block that pulls hardest counts twice.

Sources: linearized ratios, Cochran (1977), Sampling techniques, chapter 6; Wilson (1927) with the effective number of
answers, Korn & Graubard (1998), for shares; Bonett & Price (2012) for the least doubt in a paired difference; Student's
quantile by Abramowitz & Stegun (1964), 26.7.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.comparison.tally import ComparisonStats
from agent.performance.intervals import Z, wilson
from agent.wire.messages import BundleStats, Moments

Floats = NDArray[np.float64]

# Devices that are enough to count by; blocks of few devices.
MIN_DEVICES, MIN_BLOCKS = 5, 10
# So many windows at most count as one where they all agree, and nothing tells how alike they are.
_MAX_DESIGN_EFFECT = 5.0
_MAX_AUTOCORRELATION = 0.9
# Correlation of a block with the one before, where little is known of it; as if so many had shown it.
_PRIOR_AUTOCORRELATION, _PRIOR_COUNT = 0.4, 4


class ComparisonBlock(msgspec.Struct, frozen=True):
    """The tally of one message, of one device; blocks of a device are given in their order."""

    stats: ComparisonStats
    device: str = ""


class ComparisonEstimate(msgspec.Struct, frozen=True):
    """`value` with its 95 % interval, from `n` windows in `units` blocks or devices (`of`)."""

    value: float
    low: float
    high: float
    n: int
    unit_count: int
    unit_kind: str


def agreement(blocks: Sequence[ComparisonBlock]) -> ComparisonEstimate | None:
    """The share of windows that both answered alike."""
    some = [one for one in blocks if one.stats.n and one.stats.agreeing is not None]
    n = _column(some, lambda tally: tally.n)
    same = _column(some, lambda tally: tally.agreeing or 0)
    return _proportion(same, n, some)


def failure_rate(blocks: Sequence[ComparisonBlock]) -> tuple[float, float, float]:
    """The share of batches in which `beside` failed, and its interval; a batch fails by itself."""
    batches = sum(one.stats.batches for one in blocks)
    errors = sum(one.stats.errors for one in blocks)
    share = errors / batches if batches else 0.0
    return (share, *wilson(share, batches))


def latency_ratio(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Time a window in the new bundle's model, as a multiple of the old one's."""
    pairs = [(one, *_new_and_old(one.stats, new_is_other)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.windows and old.windows]
    # What pulls hardest here is a machine that was busy with other things, which says nothing of either bundle.
    rows = [(one, new.seconds, new.windows, old.seconds, old.windows) for one, new, old in pairs]
    return _mean_ratio(rows, bursts=False)


def error_ratio(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Mean absolute error of the new bundle's values, as a multiple of the old one's."""
    pairs = [(one, *_new_and_old(one.stats, new_is_other)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.abs_error.n and old.abs_error.n]
    return _mean_ratio(
        [
            (one, _moments_sum(new.abs_error), new.abs_error.n, _moments_sum(old.abs_error), old.abs_error.n)
            for one, new, old in pairs
        ]
    )


def labelled_accuracy_gain(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Accuracy of the new bundle less that of the old one, in the same labelled windows."""
    some = [one for one in blocks if sum(one.stats.labelled)]
    sign = 1 if new_is_other else -1
    n = _column(some, lambda tally: sum(tally.labelled))
    gained = sign * _column(some, lambda tally: tally.labelled[2] - tally.labelled[1])
    if not some:
        return None
    total = float(n.sum())
    value = float(gained.sum()) / total
    found = _HalfWidth.from_influences((gained - value * n) / total, some)
    if found is None:
        return None
    changed = [(sum(one.stats.labelled[i] for one in some) + 1) / (total + 2) for i in (1, 2)]
    least = (sum(changed) - (changed[0] - changed[1]) ** 2) / (total + 2)
    half = max(found.half_width, Z * math.sqrt(least))
    return ComparisonEstimate(
        value, max(-1.0, value - half), min(1.0, value + half), int(total), found.unit_count, found.unit_kind
    )


def expected_accuracy_gain(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Accuracy that the new bundle's scores lead to expect, less that of the old one's."""
    pairs = [(one, *_new_and_old(one.stats, new_is_other)) for one in blocks]
    pairs = [(one, new, old) for one, new, old in pairs if new.expected_accuracy.n and old.expected_accuracy.n]
    if not pairs:
        return None
    some = [one for one, _, _ in pairs]
    new_n, old_n = _array([new.expected_accuracy.n for _, new, _ in pairs]), _array([old.expected_accuracy.n for _, _, old in pairs])
    ours, theirs = (
        _array([_moments_sum(new.expected_accuracy) for _, new, _ in pairs]),
        _array([_moments_sum(old.expected_accuracy) for _, _, old in pairs]),
    )
    new_mean, old_mean = ours.sum() / new_n.sum(), theirs.sum() / old_n.sum()
    found = _HalfWidth.from_influences(
        (ours - new_mean * new_n) / new_n.sum() - (theirs - old_mean * old_n) / old_n.sum(), some
    )
    if found is None:
        return None
    value = float(new_mean - old_mean)
    return ComparisonEstimate(
        value, value - found.half_width, value + found.half_width, int(new_n.sum()), found.unit_count, found.unit_kind
    )


class _HalfWidth(msgspec.Struct, frozen=True):
    """Half the width of an interval, from how blocks or devices pull a statistic about; 0 where none does."""

    half_width: float
    unit_count: int
    unit_kind: str

    @classmethod
    def from_influences(
        cls, influences: Floats, blocks: Sequence[ComparisonBlock], *, bursts: bool = True
    ) -> _HalfWidth | None:
        """`pulls` (b,) of the blocks, which come to nothing together. None where there are too few."""
        names = np.array([one.device for one in blocks])
        each = [influences[names == device] for device in sorted(set(names.tolist()))]
        if len(each) >= MIN_DEVICES:
            return cls(_half_width(_array([float(one.sum()) for one in each])), len(each), "devices")
        if len(influences) < MIN_BLOCKS:
            return None
        alike = sum(len(one) * ar1_design_effect(one) for one in each) / len(influences)
        halves = [_half_width(influences, alike, bursts=bursts)]
        size = 2
        while sum(len(one) // size for one in each) >= MIN_DEVICES:
            parts = [part for one in each for part in np.array_split(one, max(1, len(one) // size))]
            halves.append(_half_width(_array([float(part.sum()) for part in parts]), bursts=bursts))
            size *= 2
        return cls(max(halves), len(influences), "blocks")


def _half_width(influences: Floats, design_effect: float = 1.0, *, bursts: bool = False) -> float:
    """Of so many independent pulls; `alike` of which count as one. `bursts`: as if the hardest came once more."""
    units, squares = len(influences), np.square(influences)
    total = float(squares.sum()) + (float(squares.max()) if bursts else 0.0)
    spread = math.sqrt(units / (units - 1) * total * design_effect)
    return student_t_quantile(max(3.0, units / design_effect - 1)) * spread


def ar1_design_effect(values: Floats) -> float:
    """How many blocks count as one, from (b,) in order, as of an AR(1) process.

    Of few the correlation comes out too low, by about (1 + 3r) / b (Kendall 1954), and chance decides: they count as if
    some more had been seen that are alike.
    """
    n = len(values)
    total = float(np.square(values).sum())
    if n < MIN_DEVICES or total <= 0:
        return (1 + _PRIOR_AUTOCORRELATION) / (1 - _PRIOR_AUTOCORRELATION)
    r = float((values[1:] * values[:-1]).sum()) / total
    r = min(
        max((r * n + 1 + _PRIOR_COUNT * _PRIOR_AUTOCORRELATION) / (n - 3 + _PRIOR_COUNT), 0.0), _MAX_AUTOCORRELATION
    )
    return (1 + r) / (1 - r)


def student_t_quantile(degrees_of_freedom: float) -> float:
    """The 97.5 % quantile, of at least 3 degrees of freedom."""
    z, d = Z, degrees_of_freedom
    first = (z**3 + z) / (4 * d)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    return z + first + second + third


def _proportion(hits: Floats, n: Floats, blocks: Sequence[ComparisonBlock]) -> ComparisonEstimate | None:
    if not blocks:
        return None
    total = float(n.sum())
    share = float(hits.sum()) / total
    found = _HalfWidth.from_influences((hits - share * n) / total, blocks)
    if found is None:
        return None
    effective = max(float(found.unit_count), total / _MAX_DESIGN_EFFECT)
    if found.half_width > 0:
        effective = min(total, share * (1 - share) * (Z / found.half_width) ** 2)
    low, high = wilson(share, effective)
    return ComparisonEstimate(share, low, high, int(total), found.unit_count, found.unit_kind)


def _mean_ratio(
    rows: Sequence[tuple[ComparisonBlock, float, int, float, int]], *, bursts: bool = True
) -> ComparisonEstimate | None:
    """Of a mean over another, by their logarithms: (block, sum and number of the new one's, of the old one's)."""
    if not rows:
        return None
    ours, theirs = _array([row[1] for row in rows]), _array([row[3] for row in rows])
    n, m = _array([row[2] for row in rows]), _array([row[4] for row in rows])
    if ours.sum() <= 0 or theirs.sum() <= 0:
        return None
    ratio = float(ours.sum() / n.sum() / (theirs.sum() / m.sum()))
    pulls = ours / ours.sum() - n / n.sum() - theirs / theirs.sum() + m / m.sum()
    found = _HalfWidth.from_influences(pulls, [row[0] for row in rows], bursts=bursts)
    if found is None:
        return None
    factor = math.exp(min(50.0, found.half_width))
    return ComparisonEstimate(ratio, ratio / factor, ratio * factor, int(n.sum()), found.unit_count, found.unit_kind)


def _new_and_old(stats: ComparisonStats, new_is_other: bool) -> tuple[BundleStats, BundleStats]:
    return (stats.other, stats.model) if new_is_other else (stats.model, stats.other)


def _moments_sum(moments: Moments) -> float:
    return moments.n * moments.mean


def _column(blocks: Sequence[ComparisonBlock], getter: Callable[[ComparisonStats], float]) -> Floats:
    return _array([getter(one.stats) for one in blocks])


def _array(values: Sequence[float]) -> Floats:
    return np.array(values, np.float64)
