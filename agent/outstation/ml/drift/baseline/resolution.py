"""Sensor resolution: sizes of the steps from row to row, counted by powers of two."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import bincount

SIZE_BINS, MIN_EXPONENT = 64, -40  # sizes below 2**-40 and from 2**23 on count to the outermost
FINEST_SHARE = 0.05  # of steps: the finest size that this share reaches
MIN_COARSER_OCTAVES = 2  # powers of two that are too coarse


def count_sizes(step: Float64s, zero_steps: Bools) -> Ints:
    """Count steps (W, n, F) from row to row by size (W, F, SIZE_BINS), first those of 0; NaN is left out. `zero_steps`
    (W, n, F) are 0.
    """
    windows, _, fields = step.shape
    if not step.size:
        return np.zeros((windows, fields, SIZE_BINS), np.int64)
    # The exponent bits of a float64 stand above its fraction: several times as fast as frexp.
    size = (np.ascontiguousarray(step, np.float64).view(np.int64) >> 52).astype(np.intp, copy=False)
    size &= 0x7FF
    size -= 1022 + MIN_EXPONENT
    np.maximum(size, 1, out=size)
    np.minimum(size, SIZE_BINS - 1, out=size)
    if zero_steps.any():
        size[zero_steps] = 0
    size += SIZE_BINS * np.arange(windows * fields).reshape(windows, 1, fields)
    known = ~np.isnan(step)
    cells = size.ravel() if known.all() else size[known]
    return bincount(cells, minlength=windows * fields * SIZE_BINS).reshape(windows, fields, SIZE_BINS)


class Resolution(msgspec.Struct, frozen=True, eq=False):
    """Resolution at a site: the `finest` common step size (F,), the `sizes` (F, SIZE_BINS) hardly coarser, and their
    `share` (F,) of all steps. `held` (F,): share of steps of 0, as of values that are reported more seldom than rows.
    """

    finest: Ints
    sizes: Bools
    share: Float64s
    held: Float64s

    @classmethod
    def from_steps(cls, steps: Ints) -> Resolution:
        """Derive the resolution from step counts (F, SIZE_BINS)."""
        finest, size = find_finest(steps), np.arange(SIZE_BINS)
        sizes = (size > 0) & (size < (finest + MIN_COARSER_OCTAVES)[:, None])
        total = np.maximum(steps.sum(1), 1)
        return cls(finest, sizes, np.where(sizes, steps, 0).sum(1) / total, steps[:, 0] / total)


def find_finest(steps: Ints) -> Ints:
    """Return the finest common step size (..., F) of step counts (..., F, SIZE_BINS)."""
    moved = steps[..., 1:]
    enough = FINEST_SHARE * np.maximum(moved.sum(-1, keepdims=True), 1)
    return np.asarray((np.cumsum(moved, axis=-1) >= enough).argmax(-1) + 1)


def largest_size(steps: Ints) -> Float64s:
    """Return what the largest step (..., F) of step counts (..., F, SIZE_BINS) reaches at least; 0 without any."""
    largest = np.where(steps > 0, np.arange(SIZE_BINS), 0).max(-1)
    return np.where(largest > 0, np.exp2(largest + MIN_EXPONENT - 1.0), 0.0)


def median_size(steps: Ints) -> Float64s:
    """Return the median step (..., F) of step counts (..., F, SIZE_BINS), rounded to a power of two; 0 if most rest."""
    middle = (np.cumsum(steps, axis=-1) >= steps.sum(-1, keepdims=True) / 2).argmax(-1)
    # Steps of a bin lie below this power of two and not below half of it.
    return np.where(middle > 0, np.exp2(middle + MIN_EXPONENT - 0.5), 0.0)
