"""Model window statistics: mean and log variance of each field, and what detectors measure of the rows."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.drift.detectors import correlation, variogram
from outstation.ml.drift.detectors.detector import ModelWindows
from outstation.ml.drift.detectors.registry import COUNTERS
from outstation.ml.drift.numeric.sums import sum_sequentially
from outstation.ml.kernel import group_sums
from outstation.ml.kernel import library as kernel


class WindowStatistics(msgspec.Struct, frozen=True, eq=False):
    """Statistics of model windows (w, D), NaN where unknown, and what each detector measured of them (w, X).

    For single rows the statistics are the rows' values, and nothing is measured.
    """

    values: Float32s | Float64s
    measures: dict[str, Float64s]


def infinities_to_nan(features: Float32s) -> Float64s:
    """Return the values as float64, with infinities as missing values."""
    rows = np.asarray(features, dtype=np.float64)
    return rows if np.isfinite(rows).all() else np.where(np.isfinite(rows), rows, np.nan)


def compute_statistics(rows: Float32s | Float64s, starts: Ints, window_rows: int, floor: Float64s) -> WindowStatistics:
    """Compute the statistics of model windows; NaN where half of a window's values are missing.

    `rows` (n, F) in physical units, NaN missing; `starts` (w,) offsets into them; `floor` (F,) the least variance.
    """
    windows = _gather_windows(rows, starts, window_rows)
    if window_rows == 1:
        return WindowStatistics(windows[:, 0], {})
    fields = rows.shape[1]
    if not len(starts):
        return WindowStatistics(np.empty((0, 2 * fields)), {})
    library = kernel.kernel()
    singles = None if library is None else kernel.to_singles(windows)
    if library is None or singles is None:
        numbers = _measure_by_numpy(windows.astype(np.float64, copy=False), floor)
    else:
        lags = variogram.lags(window_rows) if variogram.values_width(fields, window_rows) else None
        limits = correlation.steps_per_sd(window_rows), correlation.MAX_CORRELATION
        pairs = len(correlation.field_pairs(fields))
        numbers = group_sums.measure_windows(library, singles, floor, pairs, lags, limits)
    values = np.concatenate([numbers.mean, np.log(numbers.variance)], axis=1)
    moments = ModelWindows(numbers.correlations, numbers.variograms)
    measured = ((counter.name, counter.measure(moments)) for counter in COUNTERS)
    return WindowStatistics(values, {name: measures for name, measures in measured if measures is not None})


def _measure_by_numpy(windows: Float64s, floor: Float64s) -> group_sums.WindowNumbers:
    """Measure model windows (w, rows, F): the definition, which the library equals bit by bit."""
    rows = windows.shape[1]
    # Windows side by side are few long rows.
    side_by_side = windows.transpose(1, 0, 2).copy()
    known = np.full(side_by_side.shape[1:], rows)
    missing = np.isnan(side_by_side)
    if missing.any():
        side_by_side[missing] = 0.0
        known -= missing.sum(0)
    n = np.maximum(known, 1)
    mean = sum_sequentially(side_by_side) / n
    side_by_side -= mean
    if missing.any():
        side_by_side[missing] = 0.0
    centered = side_by_side.transpose(1, 0, 2).copy()
    np.multiply(side_by_side, side_by_side, out=side_by_side)
    squares = sum_sequentially(side_by_side)
    enough, mean_square = 2 * known > rows, squares / rows
    moving = np.where(enough & (mean_square > floor), mean_square, np.nan)
    return group_sums.WindowNumbers(
        np.where(enough, mean, np.nan),
        np.where(enough, np.maximum(squares / n, floor), np.nan),
        variogram.compute_variograms(windows, moving),
        correlation.correlate_windows(centered, moving),
    )


def _gather_windows(rows: Float32s | Float64s, starts: Ints, window_rows: int) -> Float32s | Float64s:
    """Return the rows (w, `window_rows`, F) of model windows."""
    if len(starts) and rows.flags.c_contiguous and bool((starts[1:] - starts[:-1] == window_rows).all()):
        # Back to back: no copy.
        begin = int(starts[0])
        return rows[begin : begin + len(starts) * window_rows].reshape(len(starts), window_rows, rows.shape[1])
    return np.asarray(rows[starts[:, None] + np.arange(window_rows)])


def covered_rows(starts: Ints, window_rows: int, begin: int) -> Ints | slice:
    """Return the rows from `begin` on that lie in a model window, each once, in order: what a summary counts."""
    if not len(starts):
        return slice(0, 0)
    begin, end = max(begin, int(starts[0])), int(starts[-1]) + window_rows
    if (np.diff(starts) <= window_rows).all():
        return slice(begin, max(begin, end))
    lies_in_one = np.zeros(end, np.bool_)
    lies_in_one[starts[:, None] + np.arange(window_rows)] = True
    rows = np.flatnonzero(lies_in_one)
    return rows[rows >= begin]
