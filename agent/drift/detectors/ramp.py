"""Whether a change came at once or grows: a step or a slope through the last windows' scores, whichever fits better."""

from __future__ import annotations

import numpy as np

from agent.arrays import Float64s

RAMP_WINDOWS = 16  # remembered
MIN_RAMP_WINDOWS = 4  # a slope this long at least; a shorter one is a step
MIN_RAMP_GAIN = 1.0  # by how much the slope's squared errors, in sd of a window, must be less


def is_ramp(z: Float64s) -> bool:
    """Of the scores of the last windows, oldest first; NaN where there was none."""
    z = z[~np.isnan(z)]
    if len(z) <= MIN_RAMP_WINDOWS:
        return False
    place, begin = np.arange(len(z)), np.arange(len(z))[:, None]
    step = _least_squared_error(z, (place >= begin).astype(np.float64))
    slope = _least_squared_error(z, np.maximum(place - begin[:-MIN_RAMP_WINDOWS] + 1, 0).astype(np.float64))
    return bool(step - slope > MIN_RAMP_GAIN)


def _least_squared_error(z: Float64s, shapes: Float64s) -> float:
    """Least squared error of z (n,) as a multiple of one of `shapes` (m, n)."""
    fits = (shapes @ z) ** 2 / (shapes**2).sum(1)
    return float(z @ z - fits.max())
