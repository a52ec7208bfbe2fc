"""Compiled counts of a drift window's rows: bins without sorting, extremes, runs, steps, spikes and sums, in one pass
over each field while it is near the processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.ml.kernel.library import Library, address, to_singles

_BINS, _SIZES, _SINGLE = 34, 64, 5
# After the bins: missing, outside, spikes, longest, the open run; four rows of extremes; then sizes.
_EXTREMES, _SIZE = _BINS + _SINGLE, _BINS + _SINGLE + 4
_PER_FIELD = _SIZE + _SIZES
_NO_ROWS: Float32s = np.empty((0, 0), np.float32)


class RowLimits:
    """Limits of F fields, laid out for the library."""

    def __init__(
        self,
        cuts: Float32s,
        low: Float64s,
        high: Float64s,
        jump: Float64s,
        rest: Sequence[Sequence[float]],
        few_levels: Bools,
        origin: Float64s,
    ) -> None:
        """`cuts` (F, 33); rows beyond `low` or `high` (F,) are far outside; the others are of each field, too.

        Raises ValueError if the shapes differ.
        """
        self.fields = len(low)
        shapes = {part.shape for part in (low, high, jump, few_levels, origin)}
        if shapes != {(self.fields,)} or cuts.shape != (self.fields, _BINS - 1) or len(rest) != self.fields:
            raise ValueError("limits of drift rows do not agree on the number of fields")
        begin = np.cumsum([0, *(len(values) for values in rest)])
        self._arrays = (
            np.ascontiguousarray(cuts, np.float32),
            np.ascontiguousarray(np.stack([low, high, jump], axis=1), np.float64),
            np.array([value for values in rest for value in values], np.float64),
            begin.astype(np.int64),
            few_levels.astype(np.int64),
            np.ascontiguousarray(origin, np.float64),
        )
        self.addresses = tuple(address(part) for part in self._arrays)


class CountedRows(NamedTuple):
    """Counts of W drift windows' rows; sums are of values from their origin."""

    bins: Ints  # (W, F, 34)
    missing: Ints  # (W, F)
    outside: Ints
    spikes: Ints
    longest: Ints
    open_run: Ints
    extreme_values: Float64s  # (W, F, 2, 2)
    extreme_rows: Ints
    sizes: Ints  # (W, F, 64)
    repeated: Ints  # (W,)
    known: Ints  # (W, 1, F)
    total: Float64s
    squares: Float64s


def count(
    library: Library,
    limits: RowLimits,
    rows: Float32s | Float64s,
    before: Float64s,
    last: Float64s,
    run: Ints,
    sums: tuple[Ints, Float64s, Float64s] | None,
) -> CountedRows | None:
    """Count `rows` (W, n, F), n > 0, of which a single window may follow on from the rows `before` (up to 2, F).

    `last` (F,) values before, NaN for none, have lasted for `run` (F,) rows; `sums` begin with these. None if a value
    is not exact as float32: then NumPy counts.
    """
    windows, n, fields = rows.shape
    if fields != limits.fields or last.shape != (fields,) or run.shape != (fields,) or before.shape[1:] != (fields,):
        raise ValueError("drift rows do not have the fields of their limits")
    if n == 0 or len(before) > 2 or (len(before) and windows > 1):
        raise ValueError("drift rows to count are none, or follow on from too many")
    singles, earlier = to_singles(rows), to_singles(before) if len(before) else _NO_ROWS
    if singles is None or earlier is None:
        return None
    last, run = np.ascontiguousarray(last, np.float64), np.ascontiguousarray(run, np.int64)
    columns = windows * fields
    counted = np.empty(columns * _PER_FIELD + windows, np.int64)
    extremes = np.empty((windows, fields, 2, 2))
    shape = (windows, 1, fields)
    known, total, squares = (
        (np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))
        if sums is None
        else (np.array(part, kind).reshape(shape) for part, kind in zip(sums, (np.int64, float, float), strict=True))
    )
    # Four columns, the order keys of one, and its sizes of steps.
    scratch = np.empty(6 * (n + 2), np.float32)
    library.count_rows(
        *(windows, n, fields, len(before), address(singles), address(earlier), address(last), address(run)),
        *(*limits.addresses, address(counted), address(extremes)),
        *(address(known), address(total), address(squares), address(scratch)),
    )
    each = counted[: columns * _PER_FIELD].reshape(windows, fields, _PER_FIELD)
    missing, outside, spikes, longest, open_run = (each[..., _BINS + i] for i in range(_SINGLE))
    return CountedRows(
        bins=each[..., :_BINS],
        missing=missing,
        outside=outside,
        spikes=spikes,
        longest=longest,
        open_run=open_run,
        extreme_values=extremes,
        extreme_rows=each[..., _EXTREMES:_SIZE].reshape(windows, fields, 2, 2),
        sizes=each[..., _SIZE:],
        repeated=counted[columns * _PER_FIELD :],
        known=known,
        total=total,
        squares=squares,
    )
