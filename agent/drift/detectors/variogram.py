"""How fast signals move from row to row, within the class the model names: another sampling clock shows here, where
the rows' times are only nominal.

Of each field and model window: how far apart values are that lie a few rows apart, against the window's variance. A
gain or an offset leaves that as it is. Signals that move twice as fast are as far apart at one lag as they were at two,
so what is usual at two lags tells what a change of speed does, and a field's change tells the speed. A clock changes
all fields alike, a fault or noise one: fields count by how surely they tell it, none for much more than the middle one.

Source: the variogram, Matheron (1963), Principles of geostatistics, Economic Geology 58.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

from agent.arrays import Floats, Ints
from agent.drift.detectors import correlation
from agent.drift.detectors.correlation import Pairs

SHORTEST = 4  # rows of a model window
LEAST_SLOPE = 0.1  # of the logarithms: a field with less, as noise has, tells no speed
LEAST_SD = 0.02
APART = 0.25  # logarithm of speed, from the middle: no field says more


def lags(window_rows: int) -> tuple[int, int]:
    """Rows: long enough that noise does not hide the movement, and short against the window."""
    return max(1, window_rows // 16), max(2, window_rows // 8)


def width(fields: int, window_rows: int) -> int:
    """What a model window tells: of each field at either lag."""
    return 2 * fields if window_rows >= SHORTEST else 0


def of_windows(windows: Floats, square: Floats, floor: Floats) -> Floats:
    """(w, `width`) logarithms in model windows (w, rows, F), at the short lag, then at the long one; NaN where a field
    is not known or does not move.

    `square` (w, F) mean squares about the mean; `floor` (F,) the least of them that is a movement.
    """
    if not width(windows.shape[2], windows.shape[1]):
        return np.empty((len(windows), 0))
    moving = np.where(square > floor, square, np.nan)
    return np.asarray(np.log(np.concatenate([_apart(windows, lag) / moving for lag in lags(windows.shape[1])], axis=1)))


def _apart(windows: Floats, lag: int) -> Floats:
    """(w, F) mean squares of differences; NaN for none."""
    step = windows[:, lag:] - windows[:, :-lag]
    squares = np.einsum("wrf,wrf->wf", step, step) / step.shape[1]
    if np.isnan(squares).any():
        told = ~np.isnan(step)
        known = np.where(told, step, 0.0)
        squares = np.einsum("wrf,wrf->wf", known, known) / np.maximum(told.sum(1), 1)
    return np.where(squares > 0, squares, np.nan)


class Paces(msgspec.Struct, frozen=True, eq=False):
    """Of classes (..., C) and fields: model windows `n`, the mean `level` of both lags and the `slope` between them."""

    n: Floats  # (..., C, F)
    level: Floats
    slope: Floats

    def pairs(self) -> Pairs:
        return Pairs(self.n, self.level)


def measured(whole: Ints) -> Paces:
    """Of sums (..., C, 2 `width`)."""
    found = correlation.measured(whole, whole.shape[-1] // 2, windowed=True)
    count = found.z.shape[-1] // 2
    short, long = found.z[..., :count], found.z[..., count:]
    return Paces(found.weight[..., :count], (short + long) / 2, long - short)


def slopes(found: Paces, window_rows: int) -> Floats:
    """(F,) of drift windows (K, C, F): how much the level rises with the logarithm of speed."""
    short, long = lags(window_rows)
    rise = (found.n * found.slope).sum((0, 1)) / np.maximum(found.n.sum((0, 1)), 1)
    return np.asarray(rise / math.log(long / short))


def weights(apart: Floats, slope: Floats) -> Floats:
    """(F,) how surely each field tells speed, of learned windows (K, F): together 1, or nothing where none does."""
    told = ~np.isnan(apart)
    n = np.maximum(told.sum(0), 1)
    left = np.where(told, apart, 0.0)
    spread = np.maximum((left**2).sum(0) / n - (left.sum(0) / n) ** 2, LEAST_SD**2)
    found = np.where((slope >= LEAST_SLOPE) & (2 * told.sum(0) > len(apart)), slope**2 / spread, 0.0)
    return np.asarray(found / max(float(found.sum()), 1e-12))


def speed(apart: Floats, slope: Floats, weight: Floats) -> Floats:
    """(...,) logarithm of how much faster signals move, from the fields' levels less the usual ones (..., F); NaN where
    half of what tells it is unknown."""
    each = np.where(np.isnan(apart), 0.0, apart) / np.maximum(slope, LEAST_SLOPE)
    share = np.where(np.isnan(apart), 0.0, weight)
    total = share.sum(-1)
    order = np.argsort(each, axis=-1)
    reached = np.cumsum(np.take_along_axis(share, order, -1), axis=-1) >= total[..., None] / 2
    at = np.take_along_axis(order, reached.argmax(-1)[..., None], -1)
    middle = np.take_along_axis(each, at, -1)
    drawn = np.clip(each, middle - APART, middle + APART)
    known = total > 0.5
    return np.asarray(np.where(known, (share * drawn).sum(-1) / np.where(known, total, 1.0), np.nan))
