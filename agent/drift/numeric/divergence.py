"""Effect sizes between histograms on the same bins, along the last axis. Reported for people, never an alarm.

On autocorrelated readings a fixed threshold on any of these raises false alarms in most windows, and what a value
means moves with the number of rows; alarms come from `cusum` instead.
"""

from __future__ import annotations

import numpy as np

from agent.arrays import Float64s, Ints

MIN_SHARE = 1e-4  # share given to an empty bin, so that PSI stays finite
TINY = 1e-300


def psi(reference: Ints, current: Ints) -> Float64s:
    """Population stability index: sum of (p - q) ln(p / q). Symmetric Kullback-Leibler; Kullback & Leibler (1951)."""
    return _psi(shares(reference), shares(current))


def js(reference: Ints, current: Ints) -> Float64s:
    """Jensen-Shannon distance, base 2: 0 for equal, 1 for disjoint. Endres & Schindelin (2003)."""
    return _js(shares(reference), shares(current))


def ks(reference: Ints, current: Ints) -> Float64s:
    """Largest gap between the cumulative shares: Kolmogorov-Smirnov D, never above the exact one on the raw rows."""
    return np.asarray(np.abs(np.cumsum(shares(reference) - shares(current), axis=-1)).max(-1))


def w1(reference: Ints, current: Ints, bounds: Float64s, sd: Float64s) -> Float64s:
    """Wasserstein-1 distance in units of `sd`, each bin spread evenly between its two of the (bins + 1) `bounds`.

    Source: Vallender (1974); the area between the two piecewise linear cumulative curves.
    """
    return _w1(np.cumsum(shares(current) - shares(reference), axis=-1), bounds, sd)


def compute_all(p: Float64s, q: Float64s, bounds: Float64s, sd: Float64s) -> Float64s:
    """(4, ...): PSI, JS, KS and W1 of shares."""
    apart = np.cumsum(q - p, axis=-1)
    return np.stack([_psi(p, q), _js(p, q), np.abs(apart).max(-1), _w1(apart, bounds, sd)])


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
    if crossing.any():
        steep = np.where(crossing, np.abs(right - left), 1.0)
        height = np.where(crossing, (left**2 + right**2) / (2 * steep), height)
    return np.asarray(_sum(height * (bounds[..., 1:] - bounds[..., :-1])) / np.where(sd > 0, sd, np.inf))


def fold_outer_bins(counts: Ints) -> Ints:
    """(..., 32) of counts (..., 34), what lies outside counted to the outermost."""
    inner = counts[..., 1:-1].copy()
    inner[..., 0] += counts[..., 0]
    inner[..., -1] += counts[..., -1]
    return inner


def shares(counts: Ints) -> Float64s:
    """Of counts along the last axis; none where there are no rows."""
    return np.asarray(counts / np.maximum(1, counts.sum(-1, keepdims=True)), dtype=np.float64)


def _sum(values: Float64s) -> Float64s:
    return np.asarray(values.sum(-1), dtype=np.float64)
