"""Further output detector: the answers of each further output of a model with several.

It tests the shares of labels, and the accuracy to expect from their scores, or the scores themselves where no
held-out labels are known. It tests where the values of a number lie among the quantiles of the shipped reference, how
far they spread, and the error to expect, where held-out labels tell it. All outputs of a model share one false-alarm
budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.detectors.class_share import ClassShareDetector, compute_shares, format_share
from outstation.ml.drift.detectors.detector import (
    SUBJECTS,
    Alarm,
    AlertText,
    Baseline,
    DriftWindows,
    LearnedWindows,
    Scores,
    Task,
    round_significant,
)
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.outputs.counts import FurtherOutput, median_value, split_outputs, weighted_means
from outstation.protocol.alerts.alert import OUTPUT_PREFIX


class _Test(msgspec.Struct, frozen=True):
    """Test of one output: of the share of a label, or of a weighted mean of the bins of a value or of the error."""

    output: FurtherOutput
    label: str | None = None
    value: int = 0
    is_spread: bool = False

    @property
    def is_error(self) -> bool:
        return self.value == len(self.output.values)


class FurtherOutputDetector(ClassShareDetector):
    """Detector of each label's share and of one or two weighted means of each value of each further output."""

    name = "further_outputs"
    budget = false_alarm_budget.ANSWERS_BUDGET

    def width(self, task: Task) -> int:
        return sum(output.tests for output in task.further)

    def subjects(self, task: Task) -> Sequence[int]:
        first = task.fields + len(SUBJECTS)
        return [first + task.further.index(test.output) for test in _list_tests(task.further)]

    def kinds(self, task: Task) -> Sequence[slice]:
        """Return the shares of all outputs, and their weighted means: each by itself may seem to have a memory."""
        shares = sum(output.shares for output in task.further)
        return [slice(0, shares), slice(shares, self.width(task))]

    def share_budget(self, task: Task) -> float:
        return self.budget * len(task.further) / (1 + len(task.further))

    def learn_values(self, task: Task, windows: LearnedWindows) -> Float64s:
        return _measure(task, windows.distributions.further, windows.output_weights)

    def score(self, task: Task, windows: DriftWindows, baseline: Baseline) -> Scores:
        return Scores(_measure(task, windows.distributions.further, baseline.output_weights))

    def describe(self, alarm: Alarm) -> AlertText:
        tests = _list_tests(alarm.further)
        own = [at for at, test in enumerate(tests) if test.output == _output(alarm)]
        side, at = max(
            ((int(side), own[int(place)]) for side, place in np.argwhere(alarm.alarm[:, own])),
            key=lambda place: float(alarm.value[place] / alarm.limit[place[1]]),
        )
        test, windows, since = tests[at], int(alarm.windows[side, at]), int(alarm.since[side, at])
        usual, shift = float(alarm.baseline.mean[at]), alarm.mean_effect(side, at)
        change, evidence = _describe_change(alarm, test, usual, shift)
        period = {"test": evidence.pop("test"), "output": test.output.name, "windows": windows, "since": since}
        cause = "another use of the machine, readings unlike those it was made from, or a model that no longer fits"
        sentence = (
            f"{OUTPUT_PREFIX}{test.output.name}: {change}, {alarm.format_windows(windows, since)}; likely {cause}"
        )
        return AlertText(sentence, period | evidence)


def _output(alarm: Alarm) -> FurtherOutput:
    return alarm.further[alarm.subject - len(alarm.fields) - len(SUBJECTS)]


def _list_tests(outputs: Sequence[FurtherOutput]) -> list[_Test]:
    """Return the tests in the order of their values: first the shares of all outputs."""
    tests = [_Test(output, label) for output in outputs if output.shares for label in output.labels]
    return tests + [test for output in outputs for test in _list_means(output)]


def _list_means(output: FurtherOutput) -> list[_Test]:
    """Return the tests of weighted means of one output: of each value, then of the error to expect."""
    sides = (False,) if output.labels else (False, True)
    means = [_Test(output, value=value, is_spread=side) for value in range(len(output.values)) for side in sides]
    return [*means, _Test(output, value=len(output.values))] if output.has_error else means


def _describe_change(alarm: Alarm, test: _Test, usual: float, shift: float) -> tuple[str, dict[str, object]]:
    if test.label is not None:
        change, numbers = format_share(test.label, float(np.clip(usual + shift, 0, 1)), usual)
        return change, {"test": "share"} | numbers
    shifted: dict[str, object] = {"shift": round_significant(shift, 4)}
    if test.output.labels:
        noun = "certainty, or the accuracy to expect from it,"
        return f"its {noun} {'fell' if shift < 0 else 'rose'} by {abs(shift):.2g}", {"test": "accuracy"} | shifted
    if test.is_error:
        moved, test_name = "fell" if shift < 0 else "rose", {"test": "error"}
        return f"the error to expect {moved} by {abs(shift):.0%} of that of held-out data", test_name | shifted
    name = test.output.values[test.value]
    if test.is_spread:
        return f"values of {name} spread {'less' if shift < 0 else 'more'} than usual", {"test": "spread"} | shifted
    at = alarm.further.index(test.output)
    now, before = (
        median_value(_bins(alarm.further, counts, at)[test.value], alarm.baseline.output_edges[at][test.value])
        for counts in (alarm.distributions.further, alarm.baseline.distributions.further)
    )
    change = f"values of {name} {'fell' if shift < 0 else 'rose'}: half are above {now:.4g}, {before:.4g} in this "
    medians: dict[str, object] = {"median": round_significant(now, 4), "usual": round_significant(before, 4)}
    return f"{change}site's reference", {"test": "mean"} | shifted | medians


def _bins(outputs: Sequence[FurtherOutput], counts: Ints, number: int) -> Ints:
    output, own = list(split_outputs(outputs, counts))[number]
    return output.split_cells(own)[1]


def _measure(task: Task, counts: Ints, weights: Float64s) -> Float64s:
    """Return the tests' values (W, S) of counts (W, X), by weights (R, 32) of the bins; NaN without answers."""
    shares: list[Float64s] = []
    means: list[Float64s] = []
    for output, own in split_outputs(task.further, counts):
        labels, bins = output.split_cells(own)
        if output.shares:
            shares.append(compute_shares(labels))
        for test in _list_means(output):
            means.append(weighted_means(bins[:, test.value], weights[len(means)])[:, None])
    return np.concatenate([*shares, *means], axis=1) if means else np.empty((len(counts), 0))
