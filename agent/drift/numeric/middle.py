"""Medians as numpy has them, to the bit. Its own import numpy.ma, which takes a megabyte and is not used here."""

from __future__ import annotations

import numpy as np

from agent.arrays import Float64s, Ints


def median(values: Float64s | Ints) -> Float64s:
    """Along the first axis, of one value at least; NaN where one is."""
    ordered = np.sort(values, axis=0)
    found = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return np.asarray(np.where(np.isnan(ordered[-1]), np.nan, found))


def nanmedian(values: Float64s) -> Float64s:
    """(T,) of values (K, T), NaN left out."""
    ordered, n = np.sort(values, axis=0), (~np.isnan(values)).sum(0)
    either = np.stack([np.maximum(n - 1, 0) // 2, n // 2])
    return np.asarray(np.take_along_axis(ordered, either, axis=0).sum(0) / 2)
