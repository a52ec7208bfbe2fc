"""Transitions between operating modes that learned windows show.

A machine that changes between modes shows a new one with about the chance that few transitions leave: after n of them,
up to 3 / n at 95 % confidence. Windows within one mode say nothing of the others.

Source: Hanley & Lippman-Hand (1983), If nothing goes wrong, is everything all right?, JAMA 249, for the rule of three.
"""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.numeric.outliers import MIN_SD
from outstation.ml.drift.numeric.sums import median

STEP_SDS = 5.0  # robust sd of the steps between neighboring windows: a larger one is a transition
MIN_SHARE_STEP = 0.5  # twice the least share of a window's predictions that change their class
MIN_TRANSITIONS = 16  # fewer tell too little of the modes
# Share of the changes between modes that are steps. With fewer, windows wander through all states in between, as noise
# with memory does: each window is evidence, and a lack of steps is no reason to learn for longer.
MIN_STEP_SHARE = 0.5


def count_transitions(means: Float64s, output: Ints) -> int:
    """Return the transitions among windows in a row.

    `means` (K, F) in class sd, without a daily cycle; `output` (K, C) predictions of each class. Steps that follow each
    other at once are one transition, which lasts for several windows.
    """
    share = output / np.maximum(output.sum(1, keepdims=True), 1)
    steps = np.concatenate(
        [np.abs(np.diff(means, axis=0)), np.abs(np.diff(share, axis=0)).sum(1, keepdims=True)], axis=1
    )
    least = np.append(np.full(means.shape[1], STEP_SDS * MIN_SD), MIN_SHARE_STEP)
    moved = steps > np.maximum(STEP_SDS * 1.4826 * median(steps), least)
    at = moved.any(1)
    transitions = int(at[:1].sum() + (at[1:] & ~at[:-1]).sum())
    # Out and back once, of one field only, is an odd window.
    columns = np.flatnonzero(moved.any(0))
    return 0 if transitions == 1 and len(columns) == 1 and columns[0] < means.shape[1] > 1 else transitions
