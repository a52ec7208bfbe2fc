"""What is tested for drift: statistics of each model window, judged against what is normal for its class.

A machine has modes, and their mixture changes all day. So each model window's statistics are compared with those of
the class that the model just named, and only what is left (the residual) is averaged over a drift window. Measured
on smartwatch recordings, a gain of 0.6 on one axis is then found in 2 drift windows instead of never.

For a model over windows of rows, the D = 2F statistics are each field's mean and log-variance; for one that answers
each row (`window_rows` 1), the D = F values themselves. Either way a drift window gives 2F tests: F of the mean, then
F of the spread.
"""

from __future__ import annotations

import msgspec
import numpy as np

from agent.arrays import Float64s, Ints
from agent.drift.detectors import correlation
from agent.drift.detectors import variogram as pace
from agent.drift.numeric.sums import GroupMoments, sum_sequentially

MIN_CLASS_WINDOWS = 8  # model windows: a class seen less often has no reference of its own
# No class is taken to be tighter than this share of the overall spread. At a site, where one misnamed window in a tight
# class would outweigh all others, it is more.
MIN_SD_SHARE, MIN_SITE_SD_SHARE = 0.1, 0.15
MIN_VARIANCE = 1e-4  # smallest variance of residuals told apart, in squared class sd


class ClassStatistics(msgspec.Struct, frozen=True, eq=False):
    """What is normal for each class: `mean` and `sd` of each statistic, (C, D), physical units or log-variance.

    `n` (C, D) counts the model windows behind them; where there are fewer than RARE, mean and sd are those of all
    classes together.
    """

    n: Ints
    mean: Float64s
    sd: Float64s


class WindowStatistics(msgspec.Struct, frozen=True, eq=False):
    """Of model windows: the statistics `values` (w, D), Fisher's `z` (w, P) of pairs of fields, and the `pace` of
    fields (w, 2F); NaN: not known.

    For single rows there is neither `z` (P = 0), as their residuals are multiplied where they are counted, nor `pace`.
    """

    values: Float64s
    fisher_z: Float64s
    log_variogram: Float64s

    def __getitem__(self, index: slice) -> WindowStatistics:
        return WindowStatistics(self.values[index], self.fisher_z[index], self.log_variogram[index])


def compute_statistics(rows: Float64s, starts: Ints, window_rows: int, floor: Float64s) -> WindowStatistics:
    """Of model windows; NaN where half of a window's values are missing.

    `rows` (n, F) in physical units, NaN missing; `starts` (w,) offsets into them; `floor` (F,) the least variance.
    """
    windows = _gather_windows(rows, starts, window_rows)
    if window_rows == 1:
        none = np.empty((len(starts), 0))
        return WindowStatistics(windows[:, 0], none, none)
    fields = rows.shape[1]
    if not len(starts):
        none = np.empty((0, 2 * fields))
        return WindowStatistics(
            none, np.empty((0, len(correlation.field_pairs(fields)))), none[:, : pace.values_width(fields, window_rows)]
        )
    n = np.full((len(starts), fields), window_rows)
    mean, centred, total = _center_windows(windows)
    if np.isnan(mean).any():
        missing = np.isnan(windows)
        n = np.maximum(window_rows - missing.sum(1), 1)
        mean = np.where(missing, 0.0, windows).sum(1) / n
        centred = np.where(missing, 0.0, windows - mean[:, None, :])
        total = (centred**2).sum(1)
    values = np.concatenate([mean, np.log(np.maximum(total / n, floor))], axis=1)
    enough = n * 2 > window_rows
    square = total / window_rows
    if not enough.all():
        values = np.where(np.concatenate([enough, enough], axis=1), values, np.nan)
        square = np.where(enough, square, np.nan)
    return WindowStatistics(
        values,
        correlation.correlate_windows(centred, square, floor),
        pace.compute_log_variogram(windows, square, floor),
    )


def _center_windows(windows: Float64s) -> tuple[Float64s, Float64s, Float64s]:
    """Of model windows (w, rows, F) without missing values: means (w, F), values less these, and squares' sums."""
    rows = windows.shape[1]
    if windows.shape[2] == 1 or not windows.flags.c_contiguous:
        # numpy adds up a column that lies in one piece in pairs.
        mean = windows.sum(1) / rows
        centred = windows - mean[:, None, :]
        return mean, centred, (centred**2).sum(1)
    # The same bits, several times as fast: windows side by side are few long rows to add up.
    side_by_side = windows.transpose(1, 0, 2).copy()
    mean = sum_sequentially(side_by_side) / rows
    side_by_side -= mean
    np.multiply(side_by_side, side_by_side, out=side_by_side)
    return mean, windows - mean[:, None, :], sum_sequentially(side_by_side)


def _gather_windows(rows: Float64s, starts: Ints, window_rows: int) -> Float64s:
    """(w, `window_rows`, F) of model windows."""
    if len(starts) and rows.flags.c_contiguous and bool((starts[1:] - starts[:-1] == window_rows).all()):
        # One after another: no copy.
        begin = int(starts[0])
        return rows[begin : begin + len(starts) * window_rows].reshape(len(starts), window_rows, rows.shape[1])
    return np.asarray(rows[starts[:, None] + np.arange(window_rows)])


def covered_rows(starts: Ints, window_rows: int, begin: int) -> Ints | slice:
    """Rows from `begin` on that lie in a model window, each once, in order: what a summary counts."""
    if not len(starts):
        return slice(0, 0)
    begin, end = max(begin, int(starts[0])), int(starts[-1]) + window_rows
    if (np.diff(starts) <= window_rows).all():
        return slice(begin, max(begin, end))
    lies_in_one = np.zeros(end, np.bool_)
    lies_in_one[starts[:, None] + np.arange(window_rows)] = True
    rows = np.flatnonzero(lies_in_one)
    return rows[rows >= begin]


def fit_class_statistics(moments: GroupMoments, min_sd_share: float = MIN_SD_SHARE) -> ClassStatistics:
    """What is normal, from the moments of each class (C, D)."""
    overall = moments.pooled(0)
    least = 1e-6 * (np.abs(overall.mean) + 1e-6)  # float32 readings tell no more
    overall_sd = np.maximum(np.sqrt(overall.m2 / np.maximum(overall.n, 1)), least)
    rare = moments.n < MIN_CLASS_WINDOWS
    sd = np.maximum(np.sqrt(moments.m2 / np.maximum(moments.n, 1)), min_sd_share * overall_sd)
    return ClassStatistics(moments.n, np.where(rare, overall.mean, moments.mean), np.where(rare, overall_sd, sd))


def compute_test_values(
    moments: GroupMoments, mean: Float64s, sd: Float64s, *, windowed: bool
) -> tuple[Float64s, Float64s]:
    """Test values and effects (..., 2F) of drift windows with moments (..., C, D), against class means and sds.

    A value is a mean residual in class sd (for single rows, the spread's is the log-variance of residuals). An effect
    is the mean shift in physical units, and half the shift in log-variance: exp() of it is the ratio of spreads.
    """
    count = np.maximum(moments.n.sum(-2), 1)
    shift = moments.n * (moments.mean - mean)
    value, effect = (shift / sd).sum(-2) / count, shift.sum(-2) / count
    if windowed:
        fields = value.shape[-1] // 2
        return value, np.concatenate([effect[..., :fields], effect[..., fields:] / 2], axis=-1)
    square = ((moments.m2 + shift * (moments.mean - mean)) / sd**2).sum(-2) / count
    spread = np.log(np.maximum(square - value**2, MIN_VARIANCE))
    return np.concatenate([value, spread], axis=-1), np.concatenate([effect, spread / 2], axis=-1)


def find_untested(moments: GroupMoments, *, windowed: bool) -> np.ndarray:
    """Which of the 2F tests (..., 2F) of drift windows (..., C, D) have nothing behind them."""
    empty = moments.n.sum(-2) == 0
    return empty if windowed else np.concatenate([empty, empty], axis=-1)
