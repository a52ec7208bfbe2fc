"""Drift alert text: how far a subject moved, since when, the likely cause, and the cost in accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.summary import Summary, stack_one
from outstation.ml.drift.detectors import daily_cycle
from outstation.ml.drift.detectors.detector import Alarm, AlarmDetector, AlertText, round_significant
from outstation.ml.drift.detectors.registry import CHARTS, SCORED
from outstation.ml.drift.reporting import training_distance
from outstation.ml.drift.sequential.test_suite import DriftTester, SuiteState
from outstation.ml.performance import cbpe

MIN_ACCURACY_CHANGE = 0.01  # smaller changes of the expected accuracy, or of the usual error, are none
# A clock an hour wrong: fields it shows in, their least score, and the share of it that is left at the other hour.
MIN_CLOCK_FIELDS, MIN_CLOCK_SCORE, MAX_CLOCK_SHARE = 2, 2.0, 0.6
ACCURACY_CHANGE_SDS = 2.0  # sd of it over as many windows


class AlarmContext(msgspec.Struct, frozen=True):
    """The window that raised an alarm, and the state after it."""

    suite: SuiteState
    tester: DriftTester
    window: Summary
    effects: Float64s  # (T,)
    t: tuple[int, int]  # when it began and ended, epoch µs

    def alarm(self, detector: str, subject: int, unit: str, role: str) -> Alarm:
        """Return the alarm of one detector, and what its sentence needs."""
        site = self.tester.reference
        return Alarm(
            name=detector,
            fields=site.fields,
            labels=site.labels,
            subject=subject,
            unit=unit,
            role=role,
            further=site.task.further,
            t=self.t,
            moments=self.window.class_sums.moments(site.origin),
            usual=self.tester.expect_class_means(stack_one(self.window), np.array([sum(self.t) // 2]))[0],
            distributions=self.window.distributions,
            sd=site.sd,
            cusum=self.suite.cusum,
            limits=self.tester.limits.limit * self.suite.caution,
            all_effects=self.effects,
            slices=self.suite.layout.slices,
            baselines=site.baselines,
            states=self.suite.charts,
        )


def build_text(
    subject: int, context: AlarmContext, units: Sequence[str], roles: Sequence[str], shipped: Reference
) -> AlertText:
    """Return the text of an alert; the shipped reference may know how often a score is right."""
    unit, role = (names[subject] if subject < len(names) else "" for names in (units, roles))
    detector = _find_alarming_detector(subject, context.suite)
    alert_text = detector.describe(context.alarm(detector.name, subject, unit, role))
    cost, numbers = (
        _describe_accuracy_change(context, shipped)
        if shipped.error is None
        else _describe_error_change(context, shipped)
    )
    # The hour of day moves means; it does not change a gain.
    hour = _describe_hour(context) if alert_text.evidence["test"] in ("mean", "shape") else ""
    unlike, distance = training_distance.describe_training_distance(context.window, shipped)
    return AlertText(f"{alert_text.sentence}{hour}{unlike}{cost}.", alert_text.evidence | numbers | distance)


def _find_alarming_detector(subject: int, suite: SuiteState) -> AlarmDetector:
    """Return the first detector with an open alarm of the subject: a CUSUM, which has an effect, before a chart."""
    on = suite.cusum.alarm.any(0) & (suite.layout.subjects == subject)
    for detector in SCORED:
        if on[suite.layout[detector.name]].any():
            return detector
    charted = ((chart, chart.open_subjects(suite.charts[chart.name])) for chart in CHARTS)
    return next(chart for chart, subjects in charted if subjects is not None and subjects[subject : subject + 1].any())


def _describe_accuracy_change(context: AlarmContext, shipped: Reference) -> tuple[str, dict[str, Any]]:
    """Describe how the accuracy expected from the model's certainty changed."""
    before = context.tester.calibration.accuracy
    if shipped.score_correct is None or before is None:
        return "", {}
    after = cbpe.estimate_accuracy(shipped.score_n, shipped.score_correct, context.suite.recent_scores.sum(0))
    if after is None:
        return "", {}
    usual, expected = before[0], after["accuracy"]
    beyond = _significant_change(before[1], context)
    numbers = {
        "accuracy": {"before": round_significant(usual, 4), "now": expected, "within": round_significant(beyond, 2)}
    }
    if abs(expected - usual) <= beyond:
        return f"; the model's expected accuracy is {expected:.2f}, as usual here ({usual:.2f} ± {beyond:.2f})", numbers
    moved = "fell" if expected < usual else "rose"
    return f"; the model's expected accuracy {moved} from {usual:.2f} to {expected:.2f}", numbers


def _describe_error_change(context: AlarmContext, shipped: Reference) -> tuple[str, dict[str, Any]]:
    """Describe how the error expected from the model's inputs changed."""
    before, error = context.tester.calibration.accuracy, shipped.error
    assert error is not None
    after = None if before is None else error.estimate(context.suite.recent_scores.sum(0))
    if before is None or after is None:
        return "", {}
    usual, expected = before[0] * error.mean, after["mae"]
    beyond = _significant_change(before[1], context) * error.mean
    numbers = {
        "error": {
            "before": round_significant(usual, 4),
            "now": expected,
            "within": round_significant(beyond, 2),
        }
    }
    if abs(expected - usual) <= beyond:
        return f"; the model's expected error is {expected:.3g}, as usual here ({usual:.3g} ± {beyond:.2g})", numbers
    moved = "fell" if expected < usual else "rose"
    return f"; the model's expected error {moved} from {usual:.3g} to {expected:.3g}", numbers


def _significant_change(sd: float, context: AlarmContext) -> float:
    """Return the change that is one, of an estimate with this `sd` over windows of the site."""
    return max(
        MIN_ACCURACY_CHANGE, ACCURACY_CHANGE_SDS * sd * math.sqrt(1 + 1 / context.tester.reference.drift_windows)
    )


def _describe_hour(context: AlarmContext) -> str:
    """Note that the time of day explains a mean: the clock is wrong by an hour, or the hour was never learned."""
    return _describe_clock(context) or _describe_unseen_hour(context)


def _describe_clock(context: AlarmContext) -> str:
    """Note that several fields follow their daily cycle as of an hour before or after."""
    fields = len(context.tester.reference.fields)
    if not context.tester.has_cycle or fields < MIN_CLOCK_FIELDS:
        return ""
    means = context.suite.layout["moments"].start + np.arange(fields)
    window, middle = stack_one(context.window), sum(context.t) // 2
    now, earlier, later = (
        np.nan_to_num(context.tester.compute_evidence(window, np.array([middle + shift])).z[0, means])
        for shift in (0, -daily_cycle.HOUR_US, daily_cycle.HOUR_US)
    )
    moved = np.abs(now) > MIN_CLOCK_SCORE
    if moved.sum() < MIN_CLOCK_FIELDS:
        return ""
    for z, which in ((earlier, "earlier"), (later, "later")):
        if (np.abs(z[moved]) < MAX_CLOCK_SHARE * np.abs(now[moved])).all() and (np.abs(z) < MIN_CLOCK_SCORE).all():
            return f"; or the clock or time zone: all fields fit the daily cycle of an hour {which}"
    return ""


def _describe_unseen_hour(context: AlarmContext) -> str:
    """Note an hour of day that the reference does not cover."""
    hours = context.tester.calibration.hours
    hour = (context.t[0] + context.t[1]) // 2 // daily_cycle.HOUR_US % 24
    if hours[hour] or np.count_nonzero(hours) >= daily_cycle.MIN_HOURS:
        return ""
    known = ", ".join(f"{h:02d}" for h in np.flatnonzero(hours))
    return f"; or the time of day: this site's reference knows the hours {known} UTC only, learn it for a day or more"
