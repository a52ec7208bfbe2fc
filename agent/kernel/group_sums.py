"""Compiled sums of rows by group, and counts of scores by bin."""

from __future__ import annotations

import numpy as np

from agent.arrays import Float64s, Ints
from agent.kernel.library import Library, address


def add(
    library: Library, values: Float64s, origin: Float64s, groups: Ints, n: Ints, total: Float64s, squares: Float64s
) -> tuple[Ints, Float64s, Float64s]:
    """Add `values` (m, D) less their `origin` (D,) to the sums (G, D) of their `groups` (m,); return the new sums."""
    rows, width = values.shape
    values, origin, groups = _floats(values), _floats(origin), _indices(groups, len(n))
    n, total, squares = np.array(n, np.int64), np.array(total, np.float64), np.array(squares, np.float64)
    if (
        origin.shape != (width,)
        or groups.shape != (rows,)
        or {part.shape[1:] for part in (n, total, squares)} != {(width,)}
        or not len(n) == len(total) == len(squares)
    ):
        raise ValueError("values, groups and sums differ in shape")
    library.add_groups(
        *(rows, width, address(values), address(origin), address(groups)),
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
    values: Float64s,
    classes: Ints,
    mean: Float64s,
    sd: Float64s,
    groups: Ints,
    count: int,
    pairs: int,
    limits: tuple[float, float],
) -> Float64s:
    """Sum products of residuals of `values` (m, F) per group (`count`, 1 + 2F + `pairs`), as whole numbers.

    Residuals are from the `mean` of the row's class (C, F), in its `sd`. `limits` are the largest residual and the
    steps in 1 sd.
    """
    rows, fields = values.shape
    values, mean, sd = _floats(values), _floats(mean), _floats(sd)
    classes, groups = _indices(classes, len(mean)), _indices(groups, count)
    if classes.shape != (rows,) or groups.shape != (rows,) or mean.shape != sd.shape or mean.shape[1:] != (fields,):
        raise ValueError("values, classes and groups differ in shape")
    if not 0 <= pairs <= fields * (fields - 1) // 2:
        raise ValueError(f"{fields} fields have no {pairs} pairs")
    bounds, scratch = np.array(limits, np.float64), np.empty(fields)
    out = np.zeros((count, 1 + 2 * fields + pairs))
    library.sum_residuals(
        *(rows, fields, pairs, address(values), address(classes), address(mean), address(sd)),
        *(address(groups), address(bounds), address(out), address(scratch)),
    )
    return out


def _floats(values: Float64s) -> Float64s:
    return np.ascontiguousarray(values, np.float64)


def _indices(values: Ints, count: int) -> Ints:
    """Return indices for the library. Raises IndexError unless all of them are below `count`."""
    values = np.ascontiguousarray(values, np.int64)
    if len(values) and not 0 <= values.min() <= values.max() < count:
        raise IndexError(f"an index is not below {count}")
    return values
