"""Bins of any width as an outline over even steps.

A quantile bin may be a hundred times as wide as its neighbour; drawn as they are, the narrow ones hide the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

BIN_COUNT = 44
_TAIL_SHARE = 1 / 32  # of the rows may lie in an outermost bin, whose far end says little of where
_PAD = 0.22


def visible_range(bounds: Sequence[float], histograms: Sequence[Sequence[int]]) -> tuple[float, float]:
    """What to show: from where each histogram begins in earnest to where the last ends, and a margin."""
    inner = [counts for counts in histograms if sum(counts[1:-1])]
    if not inner:
        return bounds[0], bounds[-1]
    low = min(_quantile(bounds, counts, _TAIL_SHARE) for counts in inner)
    high = max(_quantile(bounds, counts, 1 - _TAIL_SHARE) for counts in inner)
    pad = _PAD * (high - low) or max(abs(high), 1.0) * 0.05
    return max(low - pad, bounds[0] - pad / 8), min(high + pad, bounds[-1] + pad / 8)


def rebin(bounds: Sequence[float], counts: Sequence[int], low: float, high: float) -> list[float]:
    """Share of all rows in each of STEPS even steps from `low` to `high`; a bin is spread evenly between its bounds."""
    total = sum(counts)
    if not total:
        return [0.0] * BIN_COUNT
    edges = [low + (high - low) * i / BIN_COUNT for i in range(BIN_COUNT + 1)]
    cumulative = [_cumulative_count(bounds, counts, edge) for edge in edges]
    return [(b - a) / total for a, b in pairwise(cumulative)]


def _cumulative_count(bounds: Sequence[float], counts: Sequence[int], value: float) -> float:
    done = 0.0
    for left, right, count in zip(bounds[:-1], bounds[1:], counts[1:-1], strict=True):
        if value >= right:
            done += count
        elif value > left:
            return done + count * (value - left) / (right - left)
        else:
            break
    return done


def _quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float:
    inner = counts[1:-1]
    wanted = share * sum(inner)
    sums = list(accumulate(inner))
    at = next((i for i, done in enumerate(sums) if done >= wanted and inner[i]), len(inner) - 1)
    before = sums[at] - inner[at]
    return bounds[at] + (bounds[at + 1] - bounds[at]) * (wanted - before) / max(1, inner[at])
