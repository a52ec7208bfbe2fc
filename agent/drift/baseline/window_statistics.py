"""Model window statistics: mean and log variance of each field, and what detectors measure of the rows."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.drift.detectors.detector import ModelWindows
from agent.drift.detectors.registry import COUNTERS
from agent.drift.numeric.sums import sum_sequentially
from agent.kernel import group_sums
from agent.kernel import library as kernel


class WindowStatistics(msgspec.Struct, frozen=True, eq=False):
    """Statistics of model windows (w, D), NaN where unknown, and what each detector measured of them (w, X).

    For single rows the statistics are the rows' values, and nothing is measured.
    """

    values: Float64s
    measures: dict[str, Float64s]


def compute_statistics(rows: Float64s, starts: Ints, window_rows: int, floor: Float64s) -> WindowStatistics:
    """Compute the statistics of model windows; NaN where half of a window's values are missing.

    `rows` (n, F) in physical units, NaN missing; `starts` (w,) offsets into them; `floor` (F,) the least variance.
    """
    windows = _gather_windows(rows, starts, window_rows)
    if window_rows == 1:
        return WindowStatistics(windows[:, 0], {})
    fields = rows.shape[1]
    if not len(starts):
        return WindowStatistics(np.empty((0, 2 * fields)), {})
    n = np.full((len(starts), fields), window_rows)
    mean, centered, total = _center_windows(windows)
    if np.isnan(mean).any():
        missing = np.isnan(windows)
        n = np.maximum(window_rows - missing.sum(1), 1)
        mean = np.where(missing, 0.0, windows).sum(1) / n
        centered = np.where(missing, 0.0, windows - mean[:, None, :])
        total = (centered**2).sum(1)
    values = np.concatenate([mean, np.log(np.maximum(total / n, floor))], axis=1)
    enough = n * 2 > window_rows
    square = total / window_rows
    if not enough.all():
        values = np.where(np.concatenate([enough, enough], axis=1), values, np.nan)
        square = np.where(enough, square, np.nan)
    shared = ModelWindows(windows, centered, square, floor)
    measured = ((counter.name, counter.measure(shared)) for counter in COUNTERS)
    return WindowStatistics(values, {name: numbers for name, numbers in measured if numbers is not None})


def _center_windows(windows: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    """Return means (w, F), centered values and sums of squares of model windows (w, rows, F) without missing values."""
    rows = windows.shape[1]
    if windows.shape[2] == 1 or not windows.flags.c_contiguous:
        # numpy adds up a contiguous column pairwise.
        mean = windows.sum(1) / rows
        centred = windows - mean[:, None, :]
        return mean, centred, (centred**2).sum(1)
    library = kernel.kernel()
    if library is not None:
        return group_sums.center_windows(library, windows)
    # The same bits, several times as fast: windows side by side are few long rows.
    side_by_side = windows.transpose(1, 0, 2).copy()
    mean = sum_sequentially(side_by_side) / rows
    side_by_side -= mean
    np.multiply(side_by_side, side_by_side, out=side_by_side)
    return mean, windows - mean[:, None, :], sum_sequentially(side_by_side)


def _gather_windows(rows: Float64s, starts: Ints, window_rows: int) -> Float64s:
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
