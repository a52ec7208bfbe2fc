"""How fast signals move from row to row, within the class the model names: another sampling clock shows here, where
the rows' times are only nominal.

Of each field and model window, the mean squared step over the variance: a gain or an offset leaves it as it is. A
clock changes it in all fields alike, a fault or noise in one; so what is tested is the middle one of the fields.

Source: von Neumann (1941), Distribution of the ratio of the mean square successive difference to the variance, Annals
of Mathematical Statistics 12.
"""

from __future__ import annotations

import numpy as np

from agent.drift import joint
from agent.drift.codec import Floats, Ints
from agent.drift.joint import Pairs


def of_windows(windows: Floats, square: Floats, floor: Floats) -> Floats:
    """(w, F) logarithms of the ratio in model windows (w, rows, F); NaN where a field is not known or does not move.

    `square` (w, F) mean squares about the mean; `floor` (F,) the least of them that is a movement.
    """
    step = np.diff(windows, axis=1)
    missing = np.isnan(step)
    if missing.any():
        told = np.maximum((~missing).sum(1), 1)
        step = np.where(missing, 0.0, step)
    else:
        told = np.full(square.shape, max(1, step.shape[1]))
    squared = np.einsum("wrf,wrf->wf", step, step) / told
    moving = (square > floor) & (squared > 0)
    return np.log(np.where(moving, squared, np.nan) / np.where(moving, square, np.nan))


def measured(whole: Ints) -> Pairs:
    """What sums (..., C, 2F) say, per class and field."""
    return joint.measured(whole, whole.shape[-1] // 2, windowed=True)


def shift(found: Pairs, usual: Floats) -> Floats:
    """(...,): the middle field's distance from what is `usual` (..., C, F) for the class; NaN where nothing tells.

    Half of it is the logarithm of how much faster a smooth signal moves.
    """
    apart = joint.tests(found, usual)
    known = ~np.isnan(apart)
    none = ~known.any(-1)
    return np.where(none, np.nan, np.nanmedian(np.where(none[..., None], 0.0, apart), axis=-1))
