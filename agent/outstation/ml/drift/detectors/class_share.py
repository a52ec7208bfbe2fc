"""Class share detector: how often the model names each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import repeat
from outstation.ml.drift.detectors.detector import (
    OUTPUT,
    Alarm,
    AlertText,
    Baseline,
    DriftWindows,
    LearnedWindows,
    ScoreDetector,
    Scores,
    Task,
    round_significant,
)
from outstation.ml.drift.numeric import false_alarm_budget


class ClassShareDetector(ScoreDetector):
    """Detector of shares of predictions, which a summary counts anyway."""

    name = "class_share"
    budget = false_alarm_budget.CLASS_SHARE_BUDGET
    tests_answers = True
    by_class = False
    # A mode that is seldom on is no odd window.
    winsorized = False

    def width(self, task: Task) -> int:
        return task.labels if task.labels > 1 else 0

    def min_sd(self, task: Task) -> float:
        # One answer more or less is nothing.
        return max(0.02, 1 / task.window)

    def subjects(self, task: Task) -> Sequence[int]:
        return [task.subject(OUTPUT)] * self.width(task)

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        return compute_shares(windows.distributions.output)[..., : self.width(task)]

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        return Scores(compute_shares(windows.distributions.output)[..., : self.width(task)])

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        return repeat(near_alarm[:, None], self.width(task), axis=1)

    def describe(self, alarm: Alarm) -> AlertText:
        side, label = (int(place) for place in np.argwhere(alarm.alarm)[0])
        windows, since = int(alarm.windows[side, label]), int(alarm.since[side, label])
        usual = float(alarm.baseline.mean[label])
        return share_text(alarm, "share", label, usual + alarm.mean_effect(side, label), usual, windows, since)


def compute_shares(counts: Ints) -> Float64s:
    """Return the shares (..., C) of predictions (..., C); NaN without any."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def format_share(label: str, share: float, usual: float) -> tuple[str, dict[str, object]]:
    """Return the words and the evidence of a label with another share than usual."""
    numbers = {"label": label, "share": round_significant(share, 4), "usual": round_significant(usual, 4)}
    return f"{label} is {share:.0%} of the answers, {usual:.0%} in this site's reference", numbers


def share_text(alarm: Alarm, test: str, label: int, share: float, usual: float, windows: int, since: int) -> AlertText:
    """Return the sentence of a label with another share than usual."""
    change, numbers = format_share(alarm.labels[label], share, usual)
    evidence = {"test": test, "windows": windows, "since": since, **numbers}
    cause = "another use of the machine, or a model that no longer fits"
    return AlertText(f"output: {change}, {alarm.format_windows(windows, since)}; likely {cause}", evidence)
