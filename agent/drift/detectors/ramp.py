"""Whether a change came at once or grows: a step or a slope through the last windows' scores, whichever fits better."""

from __future__ import annotations

import numpy as np

from agent.arrays import Floats

WINDOWS = 16  # remembered
LONGER = 4  # a slope this long at least; a shorter one is a step
BETTER = 1.0  # by how much the slope's squared errors, in sd of a window, must be less


def is_ramp(z: Floats) -> bool:
    """Of the scores of the last windows, oldest first; NaN where there was none."""
    z = z[~np.isnan(z)]
    if len(z) <= LONGER:
        return False
    place, begin = np.arange(len(z)), np.arange(len(z))[:, None]
    step = _least(z, (place >= begin).astype(np.float64))
    slope = _least(z, np.maximum(place - begin[:-LONGER] + 1, 0).astype(np.float64))
    return bool(step - slope > BETTER)


def _least(z: Floats, shapes: Floats) -> float:
    """Least squared error of z (n,) as a multiple of one of `shapes` (m, n)."""
    fits = (shapes @ z) ** 2 / (shapes**2).sum(1)
    return float(z @ z - fits.max())
