"""Divergences between histograms on the same bins, along the last axis. Reported for people, never an alarm.

On autocorrelated readings a fixed threshold on any of these raises false alarms in most windows, and what a value means
depends on the number of rows. Alarms come from control charts instead.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints, any_true
from outstation.ml.kernel import comparisons
from outstation.ml.kernel import library as kernel

MIN_SHARE = 1e-4  # share given to an empty bin, so that PSI stays finite
TINY = 1e-300
BIN_PRIOR = 0.5  # rows added to each bin, so that an empty one is no proof
NO_CELLS: Ints = np.empty(0, np.int64)


class Distributions(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Counts of rows by coarse bin (..., F, 16), of predictions by class (..., C) and by top score (..., 32), of
    answers of further outputs by cell (..., X), and of predictions by the error to expect (..., 32), or (..., 0).
    """

    bins: Ints
    output: Ints
    scores: Ints
    further: Ints = NO_CELLS
    errors: Ints = NO_CELLS

    @property
    def promises(self) -> Ints:
        """Counts (..., 32) of predictions by the error to expect, if there are any, or by top score."""
        return self.errors if self.errors.shape[-1] else self.scores

    @cached_property
    def smoothed(self) -> tuple[Float64s, Float64s, Float64s]:
        """Shares of each, with half a row added to each bin."""
        return smoothed_shares(self.bins), smoothed_shares(self.output), smoothed_shares(self.scores)


def coarsen_bins(counts: Ints) -> Ints:
    """Return 16 bins of counts (..., 34): values outside count to the outermost of 32 bins, and these two by two."""
    inner = counts[..., 1:-1:2] + counts[..., 2:-1:2]
    inner[..., 0] += counts[..., 0]
    inner[..., -1] += counts[..., -1]
    return inner


def smoothed_shares(counts: Ints) -> Float64s:
    """Return shares along the last axis, of counts with half a row added to each bin."""
    filled: Float64s = np.asarray(counts + BIN_PRIOR, np.float64)
    filled /= filled.sum(-1, keepdims=True)
    return filled


def psi(reference: Ints, current: Ints) -> Float64s:
    """Return the population stability index, the sum of (p - q) ln(p / q): the symmetric Kullback-Leibler divergence.

    Source: Kullback & Leibler (1951), On information and sufficiency, Annals of Mathematical Statistics 22.
    """
    return _psi(shares(reference), shares(current))


def js(reference: Ints, current: Ints) -> Float64s:
    """Return the Jensen-Shannon distance, base 2: 0 for equal, 1 for disjoint.

    Source: Endres & Schindelin (2003), A new metric for probability distributions, IEEE Transactions on Information
    Theory 49.
    """
    return _js(shares(reference), shares(current))


def ks(reference: Ints, current: Ints) -> Float64s:
    """Return the largest gap between cumulative shares: Kolmogorov-Smirnov D, never above the exact one on the rows."""
    return np.asarray(np.abs(np.cumsum(shares(reference) - shares(current), axis=-1)).max(-1))


def w1(reference: Ints, current: Ints, bounds: Float64s, sd: Float64s) -> Float64s:
    """Return the Wasserstein-1 distance in units of `sd`, each bin spread evenly between two of the (bins + 1)
    `bounds`.

    Source: Vallender (1974); the area between the two piecewise linear cumulative curves.
    """
    return _w1(np.cumsum(shares(current) - shares(reference), axis=-1), bounds, sd)


def compute_all(p: Float64s, q: Float64s, bounds: Float64s, sd: Float64s) -> Float64s:
    """Return PSI, JS, KS and W1 (4, ...) of shares."""
    difference = np.cumsum(q - p, axis=-1)
    return np.stack([_psi(p, q), _js(p, q), np.abs(difference).max(-1), _w1(difference, bounds, sd)])


def compare_counts(counts: Ints, reference: Float64s, bounds: Float64s, sd: Float64s) -> Float64s:
    """Return PSI, JS, KS and W1 (M, F, 4) of counts (M, F, 34) against shares of the `reference` (F, 32)."""
    library = kernel.kernel()
    if library is not None:
        return comparisons.compare_shares(library, counts, reference, bounds, sd)
    return np.moveaxis(compute_all(reference, shares(fold_outer_bins(counts)), bounds, sd), 0, -1)


def _psi(p: Float64s, q: Float64s) -> Float64s:
    p, q = np.maximum(p, MIN_SHARE), np.maximum(q, MIN_SHARE)
    return _sum((p - q) * np.log(p / q))


def _js(p: Float64s, q: Float64s) -> Float64s:
    middle = np.maximum((p + q) / 2, TINY)
    surprise = p * np.log2(np.maximum(p, TINY) / middle) + q * np.log2(np.maximum(q, TINY) / middle)
    return np.asarray(np.sqrt(np.maximum(0.0, _sum(surprise) / 2)))


def _w1(right: Float64s, bounds: Float64s, sd: Float64s) -> Float64s:
    left = np.zeros_like(right)
    left[..., 1:] = right[..., :-1]
    height = np.abs(left + right) / 2
    crossing = left * right < 0
    if any_true(crossing):
        steep = np.where(crossing, np.abs(right - left), 1.0)
        height = np.where(crossing, (left**2 + right**2) / (2 * steep), height)
    return np.asarray(_sum(height * (bounds[..., 1:] - bounds[..., :-1])) / np.where(sd > 0, sd, np.inf))


def fold_outer_bins(counts: Ints) -> Ints:
    """Return 32 bins of counts (..., 34): rows outside count to the outermost bin."""
    inner = counts[..., 1:-1].copy()
    inner[..., 0] += counts[..., 0]
    inner[..., -1] += counts[..., -1]
    return inner


def shares(counts: Ints) -> Float64s:
    """Return shares along the last axis; zeros without rows."""
    return np.asarray(counts / np.maximum(1, counts.sum(-1, keepdims=True)), dtype=np.float64)


def _sum(values: Float64s) -> Float64s:
    return np.asarray(values.sum(-1), dtype=np.float64)
