"""Drift alert text: how far a subject moved, since when, the likely cause, and the cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent import text
from agent.arrays import Float64s
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import daily_cycle
from agent.drift.detectors.class_share import share_text
from agent.drift.detectors.detector import OUTPUT, SCORE, Alarm, AlertText, Detector, round_significant
from agent.drift.detectors.registry import CERTAINTY, CLASS_SHARE, DETECTORS
from agent.drift.detectors.season import SlowTrend
from agent.drift.testing.test_suite import DriftTester, SuiteState
from agent.performance import cbpe

MIN_ACCURACY_CHANGE = 0.01  # smaller changes of the expected accuracy are none
ACCURACY_CHANGE_SDS = 2.0  # sd of it over as many windows


class AlarmContext(msgspec.Struct, frozen=True):
    """The window that raised an alarm, and the state after it."""

    suite: SuiteState
    tester: DriftTester
    window: Summary
    effects: Float64s  # (T,)
    t: tuple[int, int]  # when it began and ended, epoch µs
    slow_trend: SlowTrend = msgspec.field(default_factory=SlowTrend)

    def alarm(self, detector: Detector, subject: int, unit: str = "") -> Alarm:
        """Return the CUSUMs of one detector, and what its sentence needs."""
        site, cusum, place = self.tester.reference, self.suite.cusum, self.suite.layout[detector.name]
        return Alarm(
            fields=site.fields,
            labels=site.labels,
            subject=subject,
            unit=unit,
            value=cusum.value[:, place],
            windows=cusum.windows[:, place],
            effect=cusum.effect[:, place],
            since=cusum.since[:, place],
            alarm=cusum.alarm[:, place],
            limit=self.tester.limits.limit[place],
            effects=self.effects[place],
            t=self.t,
            moments=self.window.class_sums.moments(site.origin),
            baseline=self.tester.baselines[detector.name],
            sd=site.sd,
            recent_z=self.suite.recent_z,
            slow_trend=self.slow_trend,
        )


def build_text(subject: int, context: AlarmContext, units: Sequence[str], shipped: Reference) -> AlertText:
    """Return the text of an alert; the shipped reference may know how often a score is right."""
    unit = units[subject] if subject < len(units) else ""
    on = context.suite.cusum.alarm.any(0) & (context.suite.layout.subjects == subject)
    alarming = (detector for detector in DETECTORS if on[context.suite.layout[detector.name]].any())
    detector = next(alarming, None)
    alert_text = (
        _psi_text(subject, context) if detector is None else detector.describe(context.alarm(detector, subject, unit))
    )
    cost, numbers = _describe_accuracy_change(context, shipped)
    # The hour of day moves means; it does not change a gain.
    hour = _describe_unseen_hour(context) if alert_text.evidence["test"] == "mean" else ""
    return AlertText(f"{alert_text.sentence}{hour}{cost}.", alert_text.evidence | numbers)


def _psi_text(subject: int, context: AlarmContext) -> AlertText:
    """Return the text of a distribution with another shape."""
    site, psi, task = context.tester.reference, context.suite.psi, context.suite.task
    windows, since = int(psi.windows[subject]), int(psi.since[subject])
    period = text.format_windows(windows, since, context.t[1])
    if subject == task.subject(OUTPUT):
        usual, share = (counts / max(1, int(counts.sum())) for counts in (site.output, context.window.output))
        label = int(np.argmax(np.abs(share - usual)))
        alarm = context.alarm(CLASS_SHARE, subject)
        return share_text(alarm, "shape", label, share[label], usual[label], windows, since)
    evidence: dict[str, Any] = {"test": "shape", "windows": windows, "since": since}
    if subject == task.subject(SCORE):
        alarm = context.alarm(CERTAINTY, subject)
        noun = "certainty is" if site.labels else "answers are"
        evidence["shift"] = round_significant(alarm.mean_effect(int(np.argmax(alarm.value[:, 0])), 0), 4)
        sentence = f"score: the model's {noun} spread otherwise than in this site's reference {period}"
        return AlertText(f"{sentence}; likely readings unlike those it was made from", evidence)
    sentence = f"{site.fields[subject]}: values are spread otherwise than in this site's reference {period}"
    return AlertText(f"{sentence}; likely another range, resolution or position", evidence)


def _describe_accuracy_change(context: AlarmContext, shipped: Reference) -> tuple[str, dict[str, Any]]:
    """Describe how the accuracy expected from the model's certainty changed."""
    before = context.tester.calibration.accuracy
    if shipped.score_correct is None or before is None:
        return "", {}
    after = cbpe.estimate_accuracy(shipped.score_n, shipped.score_correct, context.suite.recent_scores.sum(0))
    if after is None:
        return "", {}
    usual, expected = before[0], after["accuracy"]
    beyond = max(
        MIN_ACCURACY_CHANGE, ACCURACY_CHANGE_SDS * before[1] * np.sqrt(1 + 1 / context.tester.reference.drift_windows)
    )
    numbers = {
        "accuracy": {"before": round_significant(usual, 4), "now": expected, "within": round_significant(beyond, 2)}
    }
    if abs(expected - usual) <= beyond:
        return f"; the model's expected accuracy, {expected:.2f}, is within what is usual here ({usual:.2f})", numbers
    moved = "fell" if expected < usual else "rose"
    return f"; the model's expected accuracy {moved} from {usual:.2f} to {expected:.2f}", numbers


def _describe_unseen_hour(context: AlarmContext) -> str:
    """Note an hour of day that the reference does not cover."""
    hours = context.tester.calibration.hours
    hour = (context.t[0] + context.t[1]) // 2 // daily_cycle.HOUR_US % 24
    if hours[hour] or np.count_nonzero(hours) >= daily_cycle.MIN_HOURS:
        return ""
    known = ", ".join(f"{h:02d}" for h in np.flatnonzero(hours))
    return f"; or the time of day: this site's reference knows the hours {known} UTC only, learn it for a day or more"
