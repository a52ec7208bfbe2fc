"""Indices and counts of arrays in numpy's own index type, which is 32 bits wide on 32-bit ARM.

`repeat`, `bincount`, `take` and `reduceat` of numpy raise TypeError there for int64 arrays: they cast to the index type
by the rule "safe". An index into an array in memory always fits.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float64s, Ints


def to_index(values: Any) -> NDArray[np.intp]:
    """Return integers in numpy's index type."""
    return np.asarray(values).astype(np.intp, copy=False)


def take(values: NDArray[Any], indices: Any, axis: int) -> NDArray[Any]:
    """Return the slices of `values` along `axis` at `indices`."""
    return values.take(to_index(indices), axis)


def sum_runs(values: NDArray[Any], starts: Any) -> NDArray[Any]:
    """Sum the rows of `values` (n, ...) from each start to the next; the last run ends at n."""
    return np.asarray(np.add.reduceat(values, to_index(starts), axis=0))


def repeat(values: Any, counts: Any, axis: int | None = None) -> NDArray[Any]:
    """Repeat each value, or all slices along `axis`, as often as `counts` gives."""
    return np.repeat(values, to_index(counts), axis)


@overload
def bincount(indices: Any, weights: None = None, minlength: int = 0) -> Ints: ...
@overload
def bincount(indices: Any, weights: Any, minlength: int = 0) -> Float64s: ...
def bincount(indices: Any, weights: Any = None, minlength: int = 0) -> NDArray[Any]:
    """Count each index (n,) as int64, or sum its `weights` (n,) as float64."""
    sums = np.bincount(to_index(indices), weights, minlength)
    return sums.astype(np.int64 if weights is None else np.float64, copy=False)
