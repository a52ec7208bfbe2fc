"""Score detectors: the model's certainty within each class, and the accuracy to expect from it without labels.

For a model without labels, the values that it predicts stand for its certainty. The expected accuracy falls where
predictions of every class move a little towards doubt, or towards classes that the model knows badly, and no other test
need notice. A reference without labelled scores has no such estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from agent.arrays import Bools, Float64s, Ints
from agent.drift.detectors.class_means import ClassMeanDetector, sum_by_group
from agent.drift.detectors.detector import (
    SCORE,
    Alarm,
    AlertText,
    Baseline,
    ClassifiedWindows,
    DriftWindows,
    LearnedScores,
    LearnedWindows,
    ScoreDetector,
    Scores,
    Task,
    round_significant,
)
from agent.drift.numeric import false_alarm_budget
from agent.indices import repeat


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


class ExpectedAccuracyBaseline(msgspec.Struct, frozen=True, eq=False):
    accuracy: Float64s  # (32,) of predictions with a top score in each bin; empty if unknown


class ExpectedAccuracyDetector(ScoreDetector):
    """Detector of the share of right answers that a window's top scores promise."""

    name = "expected_accuracy"
    baseline_type = ExpectedAccuracyBaseline
    budget = false_alarm_budget.ACCURACY_BUDGET
    tests_answers = True
    min_limit = 8.0  # a few predictions of a window are seldom normal: doubts come together
    by_class = False

    def width(self, task: Task) -> int:
        return 1

    def subjects(self, task: Task) -> Sequence[int]:
        return [task.subject(SCORE)]

    def min_sd(self, task: Task) -> float:
        return 0.005

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        return _expected_accuracy(windows.distributions.scores, windows.bin_accuracy)

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> ExpectedAccuracyBaseline:
        return ExpectedAccuracyBaseline(windows.bin_accuracy)

    def is_valid(self, task: Task, own: ExpectedAccuracyBaseline) -> bool:
        return own.accuracy.ndim == 1 and bool(((own.accuracy >= 0) & (own.accuracy <= 1)).all())

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        return Scores(_expected_accuracy(windows.distributions.scores, baseline.own.accuracy))

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        return repeat(near_alarm[:, None], 1, axis=1)

    def describe(self, alarm: Alarm) -> AlertText:
        side = int(np.argmax(alarm.value[:, 0]))
        windows, since, shift = int(alarm.windows[side, 0]), int(alarm.since[side, 0]), alarm.mean_effect(side, 0)
        change = f"the accuracy to expect {'fell' if shift < 0 else 'rose'} by {abs(shift):.2g}"
        evidence = {"test": "accuracy", "windows": windows, "since": since, "shift": round_significant(shift, 4)}
        cause = "readings that the model knows less well" if shift < 0 else "easier readings"
        return AlertText(f"score: {change} {alarm.format_windows(windows, since)}; likely {cause}", evidence)


def _expected_accuracy(scores: Ints, bin_accuracy: Float64s) -> Float64s:
    """Return the expected accuracy (W, 1) of predictions by top score (W, 32); NaN if unknown."""
    n = scores.sum(-1, keepdims=True)
    if len(bin_accuracy) != scores.shape[-1]:
        return np.full(n.shape, np.nan)
    right = (scores * bin_accuracy).sum(-1, keepdims=True)
    return np.asarray(np.where(n > 0, right / np.maximum(n, 1), np.nan))
