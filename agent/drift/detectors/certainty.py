"""Certainty detector: the model's top score within each class; for a model without labels, the values it predicts."""

from __future__ import annotations

import numpy as np

from agent.arrays import Ints
from agent.drift.detectors.class_means import ClassMeanDetector, sum_by_group
from agent.drift.detectors.detector import SCORE, Alarm, AlertText, ClassifiedWindows, Task, round_significant
from agent.drift.numeric import false_alarm_budget


class CertaintyDetector(ClassMeanDetector):
    name = "certainty"
    subject = SCORE
    budget = false_alarm_budget.SCORE_BUDGET
    tests_answers = True

    def width(self, task: Task) -> int:
        return 1

    def min_sd(self, task: Task) -> float:
        return 0.005

    def count(self, task: Task, windows: ClassifiedWindows) -> Ints:
        if windows.top_scores is None:
            return np.zeros((windows.groups.count, 2), np.int64)
        return sum_by_group(windows.top_scores[:, None], windows.groups)

    def describe(self, alarm: Alarm) -> AlertText:
        side = int(np.argmax(alarm.value[:, 0]))
        windows, since, shift = int(alarm.windows[side, 0]), int(alarm.since[side, 0]), alarm.mean_effect(side, 0)
        noun, unit = ("certainty", "") if alarm.labels else ("answers", " of its reference spread")
        change = f"the model's {noun} {'fell' if shift < 0 else 'rose'} by {abs(shift):.2g}{unit}"
        evidence = {"test": "mean", "windows": windows, "since": since, "shift": round_significant(shift, 4)}
        cause = "readings unlike those it was made from"
        return AlertText(f"score: {change} {alarm.format_windows(windows, since)}; likely {cause}", evidence)
