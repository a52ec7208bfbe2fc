"""Score detectors: the model's certainty within each class, and the accuracy to expect from it without labels.

For a model without labels, the values that it predicts stand for its certainty, and the error to expect from its inputs
for the accuracy. The expected accuracy falls where predictions of every class move a little towards doubt, or towards
classes that the model knows badly, and no other test need notice. A reference without held-out labels has no such
estimate.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints
from outstation.foundation.indices import repeat
from outstation.ml.drift.detectors.class_means import ClassMeanDetector, sum_by_group
from outstation.ml.drift.detectors.detector import (
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
from outstation.ml.drift.numeric import false_alarm_budget


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
    # (32,) of predictions with a top score in each bin, or their error as a share of the usual one; empty if unknown.
    accuracy: Float64s


class ExpectedAccuracyDetector(ScoreDetector):
    """Detector of the share of right answers that a window's top scores promise, or of the error to expect."""

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
        return _measure_promise(windows.distributions.promises, windows.promised)

    def learn(self, task: Task, windows: LearnedWindows, scores: LearnedScores) -> ExpectedAccuracyBaseline:
        return ExpectedAccuracyBaseline(windows.promised)

    def is_valid(self, task: Task, own: ExpectedAccuracyBaseline) -> bool:
        most = 1.0 if task.labels else np.finfo(np.float64).max
        return own.accuracy.ndim == 1 and bool(((own.accuracy >= 0) & (own.accuracy <= most)).all())

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        return Scores(_measure_promise(windows.distributions.promises, baseline.own.accuracy))

    def suspended(self, task: Task, moving: Bools, near_alarm: Bools) -> Bools | None:
        return repeat(near_alarm[:, None], 1, axis=1)

    def describe(self, alarm: Alarm) -> AlertText:
        side = int(np.argmax(alarm.value[:, 0]))
        windows, since, shift = int(alarm.windows[side, 0]), int(alarm.since[side, 0]), alarm.mean_effect(side, 0)
        moved = "fell" if shift < 0 else "rose"
        if alarm.labels:
            change, is_worse = f"the accuracy to expect {moved} by {abs(shift):.2g}", shift < 0
        else:
            change, is_worse = f"the error to expect {moved} by {abs(shift):.0%} of that of held-out data", shift > 0
        test = "accuracy" if alarm.labels else "error"
        evidence = {"test": test, "windows": windows, "since": since, "shift": round_significant(shift, 4)}
        cause = "readings that the model knows less well" if is_worse else "easier readings"
        return AlertText(f"score: {change} {alarm.format_windows(windows, since)}; likely {cause}", evidence)


def _measure_promise(counts: Ints, promised: Float64s) -> Float64s:
    """Return the expected accuracy or error (W, 1) of predictions by bin (W, 32); NaN if unknown."""
    n = counts.sum(-1, keepdims=True)
    if len(promised) != counts.shape[-1]:
        return np.full(n.shape, np.nan)
    total = (counts * promised).sum(-1, keepdims=True)
    return np.asarray(np.where(n > 0, total / np.maximum(n, 1), np.nan))
