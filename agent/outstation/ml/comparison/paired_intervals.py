"""95 % intervals for the paired comparison of two bundles, from blocks of windows: one block per message.

Neighbouring windows are correlated, and so, less, are neighbouring blocks; devices are independent. Intervals therefore
count blocks, not windows, with an AR(1) design effect within a device. From MIN_DEVICES devices on they count devices.
With fewer blocks or devices than the minimum there is no interval. Influential blocks come in bursts, and a small
sample contains too few of them, so the most influential block counts twice.

Sources: linearized ratios, Cochran (1977), Sampling Techniques, chapter 6; Wilson (1927) with the effective sample
size, Korn & Graubard (1998), for shares; Bonett & Price (2012) for the least width of a paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.comparison.tally import ComparisonStats
from outstation.ml.performance.intervals import Z, student_t_quantile, wilson
from outstation.protocol.wire.messages import BundleStats, Moments

# The fewest devices for intervals over devices; the fewest blocks for intervals over blocks.
MIN_DEVICES, MIN_BLOCKS = 5, 10
# Windows that count as one where all agree, as their correlation is then unknown.
_MAX_DESIGN_EFFECT = 5.0
_MAX_AUTOCORRELATION = 0.9
# Prior for the correlation of neighbouring blocks, worth this many observed blocks.
_PRIOR_AUTOCORRELATION, _PRIOR_COUNT = 0.4, 4


class ComparisonBlock(msgspec.Struct, frozen=True):
    """The statistics of one message of one device. Blocks of a device are passed in their order."""

    stats: ComparisonStats
    device: str = ""


class ComparisonEstimate(msgspec.Struct, frozen=True):
    """`value` with its 95 % interval, from `n` windows in `unit_count` blocks or devices (`unit_kind`)."""

    value: float
    low: float
    high: float
    n: int
    unit_count: int
    unit_kind: str


def agreement(blocks: Sequence[ComparisonBlock]) -> ComparisonEstimate | None:
    compared = [block for block in blocks if block.stats.n and block.stats.agreeing is not None]
    if not compared:
        return None
    n = _column(compared, lambda stats: stats.n)
    hits = _column(compared, lambda stats: stats.agreeing or 0)
    total = float(n.sum())
    share = float(hits.sum()) / total
    width = _HalfWidth.from_influences((hits - share * n) / total, compared)
    if width is None:
        return None
    effective = max(float(width.unit_count), total / _MAX_DESIGN_EFFECT)
    if width.half_width > 0:
        effective = min(total, share * (1 - share) * (Z / width.half_width) ** 2)
    low, high = wilson(share, effective)
    return width.estimate(share, low, high, total)


def failure_rate(blocks: Sequence[ComparisonBlock]) -> tuple[float, float, float]:
    """Return the share of batches in which the other bundle failed, and its interval. Batches are independent."""
    batches = sum(block.stats.batches for block in blocks)
    errors = sum(block.stats.errors for block in blocks)
    share = errors / batches if batches else 0.0
    return (share, *wilson(share, batches))


def latency_ratio(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Return the new bundle's inference time of a window, divided by the old one's."""
    pairs = [(block, *_new_and_old(block.stats, new_is_other)) for block in blocks]
    rows = [
        (block, new.seconds, new.windows, old.seconds, old.windows)
        for block, new, old in pairs
        if new.windows and old.windows
    ]
    # Bursts here come from other load on the machine, which is evidence about neither bundle.
    return _mean_ratio(rows, bursts=False)


def error_ratio(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Return the new bundle's mean absolute error, divided by the old one's."""
    return _moments_ratio(blocks, lambda stats: stats.abs_error, new_is_other)


def expected_error_ratio(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Return the error expected of the new bundle by its inputs (DLE), divided by the old one's."""
    return _moments_ratio(blocks, lambda stats: stats.expected_error, new_is_other)


def labelled_accuracy_gain(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Return the new bundle's accuracy less the old one's, over the same labelled windows."""
    labelled = [block for block in blocks if sum(block.stats.labelled)]
    if not labelled:
        return None
    sign = 1 if new_is_other else -1
    n = _column(labelled, lambda stats: sum(stats.labelled))
    gained = sign * _column(labelled, lambda stats: stats.labelled[2] - stats.labelled[1])
    total = float(n.sum())
    value = float(gained.sum()) / total
    width = _HalfWidth.from_influences((gained - value * n) / total, labelled)
    if width is None:
        return None
    changed = [(sum(block.stats.labelled[i] for block in labelled) + 1) / (total + 2) for i in (1, 2)]
    least_variance = (sum(changed) - (changed[0] - changed[1]) ** 2) / (total + 2)
    half = max(width.half_width, Z * math.sqrt(least_variance))
    return width.estimate(value, max(-1.0, value - half), min(1.0, value + half), total)


def expected_accuracy_gain(blocks: Sequence[ComparisonBlock], *, new_is_other: bool) -> ComparisonEstimate | None:
    """Return the accuracy expected from the new bundle's scores, less that from the old one's."""
    pairs = [(block, *_new_and_old(block.stats, new_is_other)) for block in blocks]
    pairs = [pair for pair in pairs if pair[1].expected_accuracy.n and pair[2].expected_accuracy.n]
    if not pairs:
        return None
    new_n = _array([new.expected_accuracy.n for _, new, _ in pairs])
    old_n = _array([old.expected_accuracy.n for _, _, old in pairs])
    new_sum = _array([_total(new.expected_accuracy) for _, new, _ in pairs])
    old_sum = _array([_total(old.expected_accuracy) for _, _, old in pairs])
    new_mean, old_mean = new_sum.sum() / new_n.sum(), old_sum.sum() / old_n.sum()
    influences = (new_sum - new_mean * new_n) / new_n.sum() - (old_sum - old_mean * old_n) / old_n.sum()
    width = _HalfWidth.from_influences(influences, [block for block, _, _ in pairs])
    if width is None:
        return None
    value = float(new_mean - old_mean)
    return width.estimate(value, value - width.half_width, value + width.half_width, new_n.sum())


class _HalfWidth(msgspec.Struct, frozen=True):
    """Half the width of an interval; 0 if no block or device influences the statistic."""

    half_width: float
    unit_count: int
    unit_kind: str

    def estimate(self, value: float, low: float, high: float, n: float) -> ComparisonEstimate:
        return ComparisonEstimate(value, low, high, int(n), self.unit_count, self.unit_kind)

    @classmethod
    def from_influences(
        cls, influences: Float64s, blocks: Sequence[ComparisonBlock], *, bursts: bool = True
    ) -> _HalfWidth | None:
        """Return the half width from the influence (b,) of each block, which sum to 0. None for too few blocks."""
        names = np.array([block.device for block in blocks])
        by_device = [influences[names == device] for device in sorted(set(names.tolist()))]
        if len(by_device) >= MIN_DEVICES:
            return cls(_half_width(_array([float(part.sum()) for part in by_device])), len(by_device), "devices")
        if len(influences) < MIN_BLOCKS:
            return None
        design_effect = sum(len(part) * ar1_design_effect(part) for part in by_device) / len(influences)
        halves = [_half_width(influences, design_effect, bursts=bursts)]
        size = 2
        while sum(len(part) // size for part in by_device) >= MIN_DEVICES:
            merged = [chunk for part in by_device for chunk in np.array_split(part, max(1, len(part) // size))]
            halves.append(_half_width(_array([float(chunk.sum()) for chunk in merged]), bursts=bursts))
            size *= 2
        return cls(max(halves), len(influences), "blocks")


def _half_width(influences: Float64s, design_effect: float = 1.0, *, bursts: bool = False) -> float:
    """Return the half width from independent influences. `bursts` counts the largest one twice."""
    units, squares = len(influences), np.square(influences)
    total = float(squares.sum()) + (float(squares.max()) if bursts else 0.0)
    spread = math.sqrt(units / (units - 1) * total * design_effect)
    return student_t_quantile(max(3.0, units / design_effect - 1)) * spread


def ar1_design_effect(values: Float64s) -> float:
    """Return how many of the ordered blocks (b,) count as one, under an AR(1) model.

    Small samples underestimate the correlation, by about (1 + 3r) / b (Kendall 1954), and are noisy; the prior
    corrects for both.
    """
    n = len(values)
    total = float(np.square(values).sum())
    if n < MIN_DEVICES or total <= 0:
        return (1 + _PRIOR_AUTOCORRELATION) / (1 - _PRIOR_AUTOCORRELATION)
    r = float((values[1:] * values[:-1]).sum()) / total
    r = (r * n + 1 + _PRIOR_COUNT * _PRIOR_AUTOCORRELATION) / (n - 3 + _PRIOR_COUNT)
    r = min(max(r, 0.0), _MAX_AUTOCORRELATION)
    return (1 + r) / (1 - r)


def _mean_ratio(
    rows: Sequence[tuple[ComparisonBlock, float, int, float, int]], *, bursts: bool = True
) -> ComparisonEstimate | None:
    """Return a ratio of means on the log scale, from (block, new sum, new count, old sum, old count)."""
    if not rows:
        return None
    blocks, *columns = zip(*rows, strict=True)
    new_sum, new_n, old_sum, old_n = map(_array, columns)
    if new_sum.sum() <= 0 or old_sum.sum() <= 0:
        return None
    ratio = float(new_sum.sum() / new_n.sum() / (old_sum.sum() / old_n.sum()))
    influences = new_sum / new_sum.sum() - new_n / new_n.sum() - old_sum / old_sum.sum() + old_n / old_n.sum()
    width = _HalfWidth.from_influences(influences, blocks, bursts=bursts)
    if width is None:
        return None
    factor = math.exp(min(50.0, width.half_width))
    return width.estimate(ratio, ratio / factor, ratio * factor, new_n.sum())


def _moments_ratio(
    blocks: Sequence[ComparisonBlock], getter: Callable[[BundleStats], Moments], new_is_other: bool
) -> ComparisonEstimate | None:
    pairs = [(block, *_new_and_old(block.stats, new_is_other)) for block in blocks]
    rows = [(block, getter(new), getter(old)) for block, new, old in pairs]
    return _mean_ratio([(block, _total(new), new.n, _total(old), old.n) for block, new, old in rows if new.n and old.n])


def _new_and_old(stats: ComparisonStats, new_is_other: bool) -> tuple[BundleStats, BundleStats]:
    return (stats.other, stats.model) if new_is_other else (stats.model, stats.other)


def _total(moments: Moments) -> float:
    return moments.n * moments.mean


def _column(blocks: Sequence[ComparisonBlock], getter: Callable[[ComparisonStats], float]) -> Float64s:
    return _array([getter(block.stats) for block in blocks])


def _array(values: Sequence[float]) -> Float64s:
    return np.array(values, np.float64)
