"""Effect sizes between histograms on the same bins, along the last axis. Reported for people, never an alarm.

On autocorrelated readings a fixed threshold on any of these raises false alarms in most windows, and what a value
means moves with the number of rows; alarms come from `cusum` instead.
"""

from __future__ import annotations

import numpy as np

from agent.drift.codec import Floats, Ints

FLOOR = 1e-4  # share given to an empty bin, so that PSI stays finite


def psi(reference: Ints, current: Ints) -> Floats:
    """Population stability index: sum of (p - q) ln(p / q). Symmetric Kullback-Leibler; Kullback & Leibler (1951)."""
    p, q = np.maximum(_shares(reference), FLOOR), np.maximum(_shares(current), FLOOR)
    return _sum((p - q) * np.log(p / q))


def js(reference: Ints, current: Ints) -> Floats:
    """Jensen-Shannon distance, base 2: 0 for equal, 1 for disjoint. Endres & Schindelin (2003)."""
    p, q = _shares(reference), _shares(current)
    middle = (p + q) / 2
    return np.asarray(np.sqrt(np.maximum(0.0, _sum(_surprise(p, middle) + _surprise(q, middle)) / 2)))


def ks(reference: Ints, current: Ints) -> Floats:
    """Largest gap between the cumulative shares: Kolmogorov-Smirnov D, never above the exact one on the raw rows."""
    return np.asarray(np.abs(np.cumsum(_shares(reference) - _shares(current), axis=-1)).max(-1))


def w1(reference: Ints, current: Ints, bounds: Floats, sd: Floats) -> Floats:
    """Wasserstein-1 distance in units of `sd`, each bin spread evenly between its two of the (bins + 1) `bounds`.

    Source: Vallender (1974); the area between the two piecewise linear cumulative curves.
    """
    right = np.cumsum(_shares(current) - _shares(reference), axis=-1)
    left = np.concatenate([np.zeros_like(right[..., :1]), right[..., :-1]], axis=-1)
    crossing = left * right < 0
    steep = np.where(crossing, np.abs(right - left), 1.0)
    height = np.where(crossing, (left**2 + right**2) / (2 * steep), np.abs(left + right) / 2)
    return np.asarray(_sum(height * np.diff(bounds, axis=-1)) / np.where(sd > 0, sd, np.inf))


def _shares(counts: Ints) -> Floats:
    return np.asarray(counts / np.maximum(1, counts.sum(-1, keepdims=True)), dtype=np.float64)


def _surprise(p: Floats, middle: Floats) -> Floats:
    some = p > 0
    return np.where(some, p * np.log2(np.where(some, p, 1.0) / np.where(some, middle, 1.0)), 0.0)


def _sum(values: Floats) -> Floats:
    return np.asarray(values.sum(-1), dtype=np.float64)
