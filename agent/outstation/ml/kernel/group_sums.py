"""Compiled sums of rows by group, and counts of scores by bin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.kernel.library import Library, address


def add(
    library: Library,
    values: Float32s | Float64s,
    origin: Float64s,
    groups: Ints,
    n: Ints,
    total: Float64s,
    squares: Float64s,
) -> tuple[Ints, Float64s, Float64s]:
    """Add `values` (m, D) less their `origin` (D,) to the sums (G, D) of their `groups` (m,); return the new sums."""
    rows, width = values.shape
    values = np.ascontiguousarray(values, None if values.dtype == np.float32 else np.float64)
    origin, groups = _floats(origin), _indices(groups, len(n))
    n, total, squares = np.array(n, np.int64), np.array(total, np.float64), np.array(squares, np.float64)
    if (
        origin.shape != (width,)
        or groups.shape != (rows,)
        or {part.shape[1:] for part in (n, total, squares)} != {(width,)}
        or not len(n) == len(total) == len(squares)
    ):
        raise ValueError("values, groups and sums differ in shape")
    either = (0, address(values)) if values.dtype == np.float32 else (address(values), 0)
    library.add_groups(
        *(rows, width, *either, address(origin), address(groups)),
        *(address(n), address(total), address(squares)),
    )
    return n, total, squares


def count_scores(library: Library, scores: Float64s, edges: Float64s) -> Ints:
    """Count scores (W, n) by bin (W, 32) between the `edges` (31,); NaN is left out."""
    scores, edges = _floats(scores), _floats(edges)
    if edges.shape != (31,):
        raise ValueError("scores are counted between 31 edges")
    bins = np.empty((len(scores), 32), np.int64)
    library.count_scores(len(scores), scores.shape[1], address(scores), address(edges), address(bins))
    return bins


def sum_residuals(
    library: Library,
    values: Float32s,
    classes: Ints,
    mean: Float64s,
    sd: Float64s,
    order: Ints,
    counts: Ints,
    limits: tuple[float, float],
) -> Float64s:
    """Sum products of residuals of `values` (m, F) per group (G, 1 + F, 1 + F), in whole steps; the upper halves hold.

    The first of the fields is always 1. Residuals are from the `mean` of the row's class (C, F), in its `sd`. `order`
    (m,) lists the rows by group, `counts` (G,) how many are in each. `limits` are the largest residual and the steps
    in 1 sd.
    """
    rows, fields = values.shape
    values, mean, sd = np.ascontiguousarray(values, np.float32), _floats(mean), _floats(sd)
    classes, order = _indices(classes, len(mean)), _indices(order, rows)
    counts = np.ascontiguousarray(counts, np.int64)
    if classes.shape != (rows,) or order.shape != (rows,) or mean.shape != sd.shape or mean.shape[1:] != (fields,):
        raise ValueError("values, classes and groups differ in shape")
    if counts.sum() != rows or (counts < 0).any():
        raise ValueError("the groups do not hold each row once")
    width = (fields + 4) // 4 * 4
    bounds, scratch = np.array(limits, np.float64), np.empty(64 * width)
    products = np.zeros((len(counts), width, width))
    library.sum_residuals(
        *(rows, fields, width, address(values), address(classes), address(mean), address(sd), address(order)),
        *(address(counts), address(bounds), address(products), address(scratch)),
    )
    return products[:, : 1 + fields, : 1 + fields]


class WindowNumbers(NamedTuple):
    """Statistics of w model windows, NaN where unknown."""

    mean: Float64s  # (w, F)
    variance: Float64s
    variograms: Float64s  # (w, 2F), or (w, 0) without lags
    correlations: Float64s  # (w, P)


def measure_windows(
    library: Library,
    windows: Float32s,
    floor: Float64s,
    pairs: int,
    lags: tuple[int, int] | None,
    limits: tuple[float, float],
) -> WindowNumbers:
    """Measure model `windows` (w, n, F), NaN missing, whose fields move if their mean square exceeds `floor` (F,).

    `pairs` of fields, by distance; values `lags` rows apart; `limits` are the steps in 1 sd and the largest
    correlation.
    """
    count, rows, fields = windows.shape
    windows, floor = np.ascontiguousarray(windows, np.float32), _floats(floor)
    if floor.shape != (fields,) or not 0 <= pairs <= fields * (fields - 1) // 2 or min(lags or (1,)) < 1 or not rows:
        raise ValueError("fields, pairs and lags of model windows do not agree")
    width = (fields + 10) // 8 * 8
    moments, spread = 2 * fields, 4 * fields if lags else 2 * fields
    out, scratch = np.empty((count, spread + pairs)), np.empty((2 * rows + 1) * width + 4)
    distances, bounds = np.array(lags or (0, 0), np.int64), np.array(limits, np.float64)
    library.measure_windows(
        *(count, rows, fields, width, pairs, address(windows), address(floor), address(distances), address(bounds)),
        *(address(out), address(scratch)),
    )
    return WindowNumbers(out[:, :fields], out[:, fields:moments], out[:, moments:spread], out[:, spread:])


def sum_steps(library: Library, values: Float64s, scale: float, groups: Ints, count: int) -> Ints:
    """Return counts and sums (G, 2X) of `values` (m, X) in steps of 1 / `scale`, by group (m,)."""
    rows, width = values.shape
    if values.strides[1] != values.itemsize or values.dtype != np.float64 or values.strides[0] % values.itemsize:
        values = _floats(values)
    groups = _indices(groups, count)
    if groups.shape != (rows,):
        raise ValueError("values and groups differ in shape")
    sums, scales = np.zeros((count, 2 * width)), np.array([scale])
    stride = values.strides[0] // values.itemsize
    library.add_steps(rows, width, stride, count, address(values), address(scales), address(groups), address(sums))
    return sums.view(np.int64)


def _floats(values: Float64s) -> Float64s:
    return np.ascontiguousarray(values, np.float64)


def _indices(values: Ints, count: int) -> Ints:
    """Return indices for the library. Raises IndexError unless all of them are below `count`."""
    values = np.ascontiguousarray(values, np.int64)
    # Negative numbers are large ones there.
    if len(values) and values.view(np.uint64).max() >= count:
        raise IndexError(f"an index is not below {count}")
    return values
