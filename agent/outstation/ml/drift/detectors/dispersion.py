"""Dispersion detector: offsets of a field that come and go, from model window to model window or between drift windows.

An offset that alternates moves no mean for long: its sums cancel. So how far the means are off is tested, too,
whichever way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.drift.detectors.detector import (
    Alarm,
    AlertText,
    Baseline,
    DriftWindows,
    LearnedWindows,
    ScoreDetector,
    Scores,
    Task,
    find_rare,
    round_significant,
)
from outstation.ml.drift.detectors.moments import (
    VARIANCE_PRIOR,
    MomentsDetector,
    compute_mean_squares,
    compute_test_values,
    find_untested,
    leave_one_out_mean,
    leave_out_rare,
)
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.numeric.sums import GroupMoments

MIN_STEADY_WINDOWS = 3  # of a mean's sum, after which its offset stays


class DispersionDetector(ScoreDetector):
    """Detector of one number of each field.

    For a model over windows of rows, it is how far model windows of one class lie from the usual mean, together. For a
    model that answers each row, it is how far the drift window's mean is off; within the window, `moments` tests the
    spread.
    """

    name = "dispersion"
    budget = false_alarm_budget.DISPERSION_BUDGET
    has_direction = False

    def __init__(self, moments: MomentsDetector) -> None:
        self.moments = moments

    def width(self, task: Task) -> int:
        return task.fields

    def min_sd(self, task: Task) -> float:
        return 0.05

    def subjects(self, task: Task) -> Sequence[int]:
        return list(range(task.fields))

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        mean = leave_one_out_mean(windows.moments, windows.pooled)
        moments = leave_out_rare(windows.moments, find_rare(windows.pooled.n))
        return _measure(task, moments, mean, windows.class_sd)

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        residuals = None if task.windowed else windows.scored.get(self.moments.name)
        if residuals is not None:
            return Scores(np.abs(residuals[:, : task.fields]))
        moments = leave_out_rare(windows.moments, baseline.rare)
        return Scores(_measure(task, moments, baseline.class_mean, baseline.class_sd))

    def describe(self, alarm: Alarm) -> AlertText:
        field, mean = alarm.subject, alarm.for_detector(self.moments.name)
        if (mean.windows[:, field] >= MIN_STEADY_WINDOWS).any():
            # An offset that stays is off in each window, too.
            return self.moments.describe(mean)
        side = int(np.argmax(alarm.value[:, field]))
        windows, since = int(alarm.windows[side, field]), int(alarm.since[side, field])
        change = f"{alarm.fields[field]}: offsets come and go {'less' if side else 'more'} than usual"
        shift = round_significant(alarm.mean_effect(side, field), 4)
        evidence = {"test": self.name, "windows": windows, "since": since, "shift": shift}
        cause = "a loose contact, interference or another way of switching"
        return AlertText(f"{change} {alarm.format_windows(windows, since)}; likely {cause}", evidence)


def _measure(task: Task, moments: GroupMoments, mean: Float64s, sd: Float64s) -> Float64s:
    """Return the number (..., F) of drift windows with moments (..., C, D) against class means and sds."""
    fields = slice(0, task.fields)
    if task.windowed:
        values = np.log(compute_mean_squares(moments, mean, sd)[..., fields] + VARIANCE_PRIOR)
    else:
        values = np.abs(compute_test_values(moments, mean, sd, windowed=False)[0][..., fields])
    return np.where(find_untested(moments, windowed=task.windowed)[..., fields], np.nan, values)
