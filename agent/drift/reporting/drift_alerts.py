"""What a drift alert says of its subject: how far it moved, since when, what it probably is, and what it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent import text
from agent.arrays import Float64s
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import correlation, daily_cycle, season
from agent.drift.detectors.ramp import MIN_RAMP_WINDOWS, is_ramp
from agent.drift.detectors.season import SlowTrend
from agent.drift.reporting.drift_message import round_significant
from agent.drift.testing.sequence import EARLY_DRIFT_SHARE
from agent.drift.testing.test_suite import DriftTester, SuiteState
from agent.performance import cbpe

MIN_ACCURACY_CHANGE = 0.01  # smaller changes of the expected accuracy are none
ACCURACY_CHANGE_SDS = 2.0  # sd of it over as many windows
MAX_PAIRS = 3


class AlertText(msgspec.Struct, frozen=True):
    """A sentence without its full stop, and the numbers behind it."""

    sentence: str
    evidence: dict[str, Any]


class AlarmContext(msgspec.Struct, frozen=True):
    """The window that raised an alarm, and all that was known after it."""

    suite: SuiteState
    tester: DriftTester
    window: Summary
    effects: Float64s  # (T,)
    t: tuple[int, int]  # when it began and ended, epoch µs
    slow_trend: SlowTrend = msgspec.field(default_factory=SlowTrend)

    def format_windows(self, windows: int, since: int) -> str:
        return text.format_windows(windows, since, self.t[1])


def build_text(subject: int, context: AlarmContext, units: Sequence[str], shipped: Reference) -> AlertText:
    """Of subject number `subject`; `known` is the shipped reference, which may tell how often a score is right."""
    fields = len(context.tester.reference.fields)
    if subject < fields:
        told = _field_text(subject, context, units[subject])
    else:
        told = (_output_text, _score_text, _joint_text)[subject - fields](context)
    cost, numbers = _describe_accuracy_change(context, shipped)
    # The hour moves means; a gain that is lost is none of its doing.
    hour = _describe_unseen_hour(context) if told.evidence["test"] == "mean" else ""
    return AlertText(f"{told.sentence}{hour}{cost}.", told.evidence | numbers)


def _describe_accuracy_change(context: AlarmContext, shipped: Reference) -> tuple[str, dict[str, Any]]:
    """What the model's certainty says of its accuracy in the last windows, and here before."""
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
    """A reference of part of a day knows nothing of the rest."""
    hours = context.tester.calibration.hours
    hour = (context.t[0] + context.t[1]) // 2 // daily_cycle.HOUR_US % 24
    if hours[hour] or np.count_nonzero(hours) >= daily_cycle.MIN_HOURS:
        return ""
    known = ", ".join(f"{h:02d}" for h in np.flatnonzero(hours))
    return f"; or the time of day: this site's reference knows the hours {known} UTC only, learn it for a day or more"


class FieldChange(msgspec.Struct, frozen=True):
    """What the sums of one field say since the change began: effects averaged over those windows."""

    test: str  # mean | spread: the one that is furthest out
    windows: int
    since: int  # epoch µs
    cusum: float
    shift: float  # of the mean, physical units
    shift_sd: float  # the same in sd of the site's rows
    ratio: float  # of the spread to the site's
    spread_changed: bool  # whether the spread has changed, too: half way to an alarm of its own
    is_ramp: bool

    def to_evidence(self) -> dict[str, Any]:
        numbers = {"cusum": self.cusum, "shift": self.shift, "shift_sd": self.shift_sd, "ratio": self.ratio}
        when = {"windows": self.windows, "since": self.since, "ramp": self.is_ramp}
        return {"test": self.test} | when | {name: round_significant(x, 4) for name, x in numbers.items()}

    def describe(self, unit: str) -> str:
        if self.test == "spread":
            return f"spread {'fell' if self.ratio < 1 else 'rose'} to {self.ratio:.2g} of this site's reference"
        amount = f"{self.shift:+.2g}" + (f" {unit}" if unit else "")
        return f"mean moved by {amount} ({abs(self.shift_sd):.2g} reference sd)"


def _field_text(field: int, context: AlarmContext, unit: str) -> AlertText:
    site, detectors = context.tester.reference, context.suite
    name, fields = site.fields[field], len(site.fields)
    if not detectors.cusum.alarm[:, [field, fields + field]].any():
        windows, since = int(detectors.psi.windows[field]), int(detectors.psi.since[field])
        what = f"values are spread otherwise than in this site's reference {context.format_windows(windows, since)}"
        evidence = {"test": "shape", "windows": windows, "since": since}
        return AlertText(f"{name}: {what}; likely another range, resolution or position", evidence)
    found = measure_change(context, field)
    slow = season.guess_cause(field, context.slow_trend, site.fields) if found.test == "mean" else ""
    why = slow or guess_cause(found, field, site, context.window)
    growing = ", and goes on: a slow ramp" if found.is_ramp else ""
    over = context.format_windows(found.windows, found.since)
    return AlertText(f"{name}: {found.describe(unit)} {over}{growing}; likely {why}", found.to_evidence())


def _output_text(context: AlarmContext) -> AlertText:
    site, shape = context.tester.reference, context.suite.psi
    subject = len(site.fields)
    usual, share = (counts / max(1, int(counts.sum())) for counts in (site.output, context.window.output))
    most = int(np.argmax(np.abs(share - usual)))
    test, windows, since = "shape", int(shape.windows[subject]), int(shape.since[subject])
    sums, answers = context.suite.cusum, context.suite.layout.class_shares
    if (on := sums.alarm[:, answers]).any():
        test, side, most = "share", *(int(one) for one in np.argwhere(on)[0])
        found = (side, answers.start + most)
        windows, since, usual = int(sums.windows[found]), int(sums.since[found]), site.test_mean[answers]
        share = usual + (sums.effect[found] / windows if windows else context.effects[found[1]])
    what = f"{site.labels[most]} is {share[most]:.0%} of the answers, {usual[most]:.0%} in this site's reference"
    evidence = {"test": test, "windows": windows, "since": since}
    evidence |= {
        "label": site.labels[most],
        "share": round_significant(share[most], 4),
        "usual": round_significant(usual[most], 4),
    }
    why = "another use of the machine, or a model that no longer fits"
    return AlertText(f"output: {what}, {context.format_windows(windows, since)}; likely {why}", evidence)


def _score_text(context: AlarmContext) -> AlertText:
    sums, shape, subject = context.suite.cusum, context.suite.psi, len(context.tester.reference.fields) + 1
    labels = bool(context.tester.reference.labels)
    noun = "certainty" if labels else "answers"
    certainty = context.suite.layout.certainty
    at = (int(np.argmax(sums.value[:, certainty])), certainty)
    moved = float(sums.effect[at] / sums.windows[at] if sums.windows[at] else context.effects[certainty])
    if sums.alarm[:, certainty].any():
        test, windows, since = "mean", int(sums.windows[at]), int(sums.since[at])
        unit = "" if labels else " of its reference spread"
        what = f"the model's {noun} {'fell' if moved < 0 else 'rose'} by {abs(moved):.2g}{unit}"
    else:
        test, windows, since = "shape", int(shape.windows[subject]), int(shape.since[subject])
        what = f"the model's {noun} {'is' if labels else 'are'} spread otherwise than in this site's reference"
    evidence = {"test": test, "windows": windows, "since": since, "shift": round_significant(moved, 4)}
    why = "readings unlike those it was made from"
    return AlertText(f"score: {what} {context.format_windows(windows, since)}; likely {why}", evidence)


def _joint_text(context: AlarmContext) -> AlertText:
    sums, fields = context.suite.cusum, context.tester.reference.fields
    pairs = context.suite.layout.pairs
    value = sums.value[:, pairs]
    on = np.flatnonzero(sums.alarm[:, pairs].any(0))
    first = on[np.argsort(-value[:, on].max(0), kind="stable")][:MAX_PAIRS]
    told: list[str] = []
    evidence: list[dict[str, Any]] = []
    for pair in first:
        at = (int(np.argmax(value[:, pair])), pairs.start + int(pair))
        moved = float(sums.effect[at] / max(1, sums.windows[at]))
        names = [fields[i] for i in correlation.field_pairs(len(fields))[pair]]
        told.append(f"{' and '.join(names)} go {'less' if moved < 0 else 'more'} together")
        numbers = {"windows": int(sums.windows[at]), "since": int(sums.since[at])}
        evidence.append({"pair": names, "shift": round_significant(moved, 4), **numbers})
    over = context.format_windows(evidence[0]["windows"], evidence[0]["since"])
    what = f"{', '.join(told)} than in this site's reference {over}, while each by itself is as before"
    why = "a loose mounting, swapped wires or another way of moving"
    return AlertText(f"joint: {what}; likely {why}", {"test": "pairs", "pairs": evidence})


def measure_change(context: AlarmContext, field: int) -> FieldChange:
    """Of a field with an alarm; the effects of the last window stand in for a test without evidence."""
    site, limits, cusum, effects = context.tester.reference, context.tester.limits, context.suite.cusum, context.effects
    fields = len(site.fields)
    mean, spread = (
        max((0, test), (1, test), key=lambda at: float(cusum.value[at])) for test in (field, fields + field)
    )
    on = [at for at in (mean, spread) if cusum.alarm[:, at[1]].any()] or [mean, spread]
    lead = max(on, key=lambda at: float(cusum.value[at]))
    shift, log_ratio = (
        float(cusum.effect[at] / cusum.windows[at] if cusum.windows[at] else effects[at[1]]) for at in (mean, spread)
    )
    sd = float(site.sd[field])
    return FieldChange(
        test="mean" if lead == mean else "spread",
        windows=int(cusum.windows[lead]),
        since=int(cusum.since[lead]),
        cusum=float(cusum.value[lead]),
        shift=shift,
        shift_sd=shift / sd if sd > 0 else 0.0,
        ratio=float(np.exp(log_ratio)),
        spread_changed=bool(cusum.value[spread] > EARLY_DRIFT_SHARE * limits.limit[spread[1]]),
        is_ramp=int(cusum.windows[lead]) >= MIN_RAMP_WINDOWS
        and is_ramp(context.suite.recent_z[:, lead[1]].astype(np.float64)),
    )


def guess_cause(change: FieldChange, field: int, site: Reference, window: Summary) -> str:
    """A guess for a person. A gain scales mean and spread alike; an offset moves the mean alone."""
    if not change.spread_changed:
        return "offset or a new position"
    less = change.ratio < 1
    scale = _fit_mean_scale(field, site, window)
    if scale is None:
        return "gain loss or less movement" if less else "gain rise, noise or more movement"
    if abs(np.log(scale / change.ratio)) < abs(np.log(scale)):
        return "gain loss" if less else "gain rise"
    return "less movement or damping" if less else "noise or more movement"


def _fit_mean_scale(field: int, site: Reference, window: Summary) -> float | None:
    """Slope of the window's class means on the site's, through zero; None where these are near zero and say nothing."""
    found = window.class_sums.moments(site.origin)
    n, mean, usual = found.n[:, field], found.mean[:, field], site.class_mean[:, field]
    weight = n / site.class_sd[:, field] ** 2
    if (weight * usual**2).sum() < n.sum():
        return None
    return max(0.01, float((weight * mean * usual).sum() / (weight * usual**2).sum()))
