"""Variograms: how fast signals move from row to row, which shows another sampling clock where rows' times are nominal.

Each model window gives, per field, how far values a few rows apart differ, relative to the window's variance. A gain or
an offset leaves that unchanged. Signals that move twice as fast differ at one lag as they did at two, so the level at
two lags shows what a change of speed does, and a field's change shows the speed. A clock changes all fields alike, a
fault or noise only one: fields count by how surely they show it, and none for much more than the median one.

Source: Matheron (1963), Principles of geostatistics, Economic Geology 58.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.detectors import class_means
from outstation.ml.drift.detectors.class_means import WeightedMeans
from outstation.ml.drift.numeric.sums import sum_sequentially

MIN_WINDOW_ROWS = 4  # of a model window
MIN_SLOPE = 0.1  # of the logarithms: a field with less, such as noise, does not show speed
MIN_SD = 0.02
SPEED_CLIP = 0.25  # logarithm of speed, from the median: no field counts for more


def lags(window_rows: int) -> tuple[int, int]:
    """Return two lags in rows: long enough that noise does not hide the movement, short against the window."""
    return max(1, window_rows // 16), max(2, window_rows // 8)


def values_width(fields: int, window_rows: int) -> int:
    """Return how many numbers a model window gives: one per field and lag."""
    return 2 * fields if window_rows >= MIN_WINDOW_ROWS else 0


def compute_variograms(windows: Float64s, mean_square: Float64s) -> Float64s:
    """Return variograms (w, `values_width`) of model windows (w, rows, F), at the short lag, then at the long one.

    `mean_square` (w, F) about the mean, NaN where a field does not move. NaN if unknown.
    """
    if not values_width(windows.shape[2], windows.shape[1]):
        return np.empty((len(windows), 0))
    shares = [_mean_square_differences(windows, lag) / mean_square for lag in lags(windows.shape[1])]
    return np.concatenate(shares, axis=1)


def _mean_square_differences(windows: Float64s, lag: int) -> Float64s:
    """(w, F) mean squares of differences; NaN for none."""
    step = windows[:, lag:] - windows[:, :-lag]
    known = np.full(step.shape[::2], step.shape[1])
    missing = np.isnan(step)
    if missing.any():
        step[missing] = 0.0
        known = np.maximum(known - missing.sum(1), 1)
    np.multiply(step, step, out=step)
    squares = sum_sequentially(step.transpose(1, 0, 2)) / known
    return np.where(squares > 0, squares, np.nan)


class Variograms(msgspec.Struct, frozen=True, eq=False):
    """Variograms of classes (..., C) and fields: model windows `n`, mean `level` of both lags, and `slope` between
    them.
    """

    n: Float64s  # (..., C, F)
    level: Float64s
    slope: Float64s

    def weighted_levels(self) -> WeightedMeans:
        return WeightedMeans(self.n, self.level)


def from_sums(sums: Ints) -> Variograms:
    """Return the variograms of counts (..., C, 2 `values_width`)."""
    means = class_means.means_from_sums(sums)
    count = means.mean.shape[-1] // 2
    short, long = means.mean[..., :count], means.mean[..., count:]
    return Variograms(means.weight[..., :count], (short + long) / 2, long - short)


def fit_slopes(variograms: Variograms, window_rows: int) -> Float64s:
    """(F,) how much the level rises with the logarithm of speed, over drift windows (K, C, F)."""
    short, long = lags(window_rows)
    rise = (variograms.n * variograms.slope).sum((0, 1)) / np.maximum(variograms.n.sum((0, 1)), 1)
    return np.asarray(rise / math.log(long / short))


def compute_field_weights(deviations: Float64s, slope: Float64s) -> Float64s:
    """(F,) how surely each field shows speed, over learned windows (K, F): 1 in sum, or zeros."""
    known = ~np.isnan(deviations)
    n = np.maximum(known.sum(0), 1)
    left = np.where(known, deviations, 0.0)
    spread = np.maximum((left**2).sum(0) / n - (left.sum(0) / n) ** 2, MIN_SD**2)
    weights = np.where((slope >= MIN_SLOPE) & (2 * known.sum(0) > len(deviations)), slope**2 / spread, 0.0)
    return np.asarray(weights / max(float(weights.sum()), 1e-12))


def estimate_log_speed(deviations: Float64s, slope: Float64s, weight: Float64s) -> Float64s:
    """Return the logarithm (...,) of how much faster signals move, from deviations of levels (..., F).

    NaN if half of the weight is unknown.
    """
    each = np.where(np.isnan(deviations), 0.0, deviations) / np.maximum(slope, MIN_SLOPE)
    share = np.where(np.isnan(deviations), 0.0, weight)
    total = share.sum(-1)
    order = np.argsort(each, axis=-1)
    reached = np.cumsum(np.take_along_axis(share, order, -1), axis=-1) >= total[..., None] / 2
    at = np.take_along_axis(order, reached.argmax(-1)[..., None], -1)
    middle = np.take_along_axis(each, at, -1)
    drawn = np.clip(each, middle - SPEED_CLIP, middle + SPEED_CLIP)
    known = total > 0.5
    return np.asarray(np.where(known, (share * drawn).sum(-1) / np.where(known, total, 1.0), np.nan))
