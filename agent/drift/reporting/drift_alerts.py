"""What a drift alert says of its subject: how far it moved, since when, what it probably is, and what it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from agent.arrays import Floats
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import correlation, daily_cycle, season
from agent.drift.detectors.ramp import LONGER, is_ramp
from agent.drift.detectors.season import Season
from agent.drift.reporting import words
from agent.drift.reporting.drift_message import short
from agent.drift.testing.sequence import HALF_WAY
from agent.drift.testing.test_suite import Detectors, Tester
from agent.performance import cbpe

TOLD = 0.01  # smaller changes of the expected accuracy are none
SURELY = 2.0  # sd of it over as many windows
MOST_PAIRS = 3


class Words(msgspec.Struct, frozen=True):
    """A sentence without its full stop, and the numbers behind it."""

    sentence: str
    evidence: dict[str, Any]


class Now(msgspec.Struct, frozen=True):
    """The window that raised an alarm, and all that was known after it."""

    detectors: Detectors
    tester: Tester
    window: Summary
    effects: Floats  # (T,)
    t: tuple[int, int]  # when it began and ended, epoch µs
    season: Season = msgspec.field(default_factory=Season)

    def over(self, windows: int, since: int) -> str:
        return words.over(windows, since, self.t[1])


def of(subject: int, now: Now, units: Sequence[str], known: Reference) -> Words:
    """Of subject number `subject`; `known` is the shipped reference, which may tell how often a score is right."""
    fields = len(now.tester.site.fields)
    if subject < fields:
        told = _field(subject, now, units[subject])
    else:
        told = (_output, _score, _joint)[subject - fields](now)
    cost, numbers = _cost(now, known)
    # The hour moves means; a gain that is lost is none of its doing.
    hour = _unseen_hour(now) if told.evidence["test"] == "mean" else ""
    return Words(f"{told.sentence}{hour}{cost}.", told.evidence | numbers)


def _cost(now: Now, known: Reference) -> tuple[str, dict[str, Any]]:
    """What the model's certainty says of its accuracy in the last windows, and here before."""
    before = now.tester.extra.accuracy
    if known.score_correct is None or before is None:
        return "", {}
    after = cbpe.cbpe(known.score_n, known.score_correct, now.detectors.scores.sum(0))
    if after is None:
        return "", {}
    usual, expected = before[0], after["accuracy"]
    beyond = max(TOLD, SURELY * before[1] * np.sqrt(1 + 1 / now.tester.site.drift_windows))
    numbers = {"accuracy": {"before": short(usual, 4), "now": expected, "within": short(beyond, 2)}}
    if abs(expected - usual) <= beyond:
        return f"; the model's expected accuracy, {expected:.2f}, is within what is usual here ({usual:.2f})", numbers
    moved = "fell" if expected < usual else "rose"
    return f"; the model's expected accuracy {moved} from {usual:.2f} to {expected:.2f}", numbers


def _unseen_hour(now: Now) -> str:
    """A reference of part of a day knows nothing of the rest."""
    hours = now.tester.extra.hours
    hour = (now.t[0] + now.t[1]) // 2 // daily_cycle.HOUR_US % 24
    if hours[hour] or np.count_nonzero(hours) >= daily_cycle.HOURS:
        return ""
    known = ", ".join(f"{h:02d}" for h in np.flatnonzero(hours))
    return f"; or the time of day: this site's reference knows the hours {known} UTC only, learn it for a day or more"


class Change(msgspec.Struct, frozen=True):
    """What the sums of one field say since the change began: effects averaged over those windows."""

    test: str  # mean | spread: the one that is furthest out
    windows: int
    since: int  # epoch µs
    cusum: float
    shift: float  # of the mean, physical units
    shift_sd: float  # the same in sd of the site's rows
    ratio: float  # of the spread to the site's
    spread: bool  # whether the spread has changed, too: half way to an alarm of its own
    ramp: bool

    def evidence(self) -> dict[str, Any]:
        numbers = {"cusum": self.cusum, "shift": self.shift, "shift_sd": self.shift_sd, "ratio": self.ratio}
        when = {"windows": self.windows, "since": self.since, "ramp": self.ramp}
        return {"test": self.test} | when | {name: short(x, 4) for name, x in numbers.items()}

    def what(self, unit: str) -> str:
        if self.test == "spread":
            return f"spread {'fell' if self.ratio < 1 else 'rose'} to {self.ratio:.2g} of this site's reference"
        amount = f"{self.shift:+.2g}" + (f" {unit}" if unit else "")
        return f"mean moved by {amount} ({abs(self.shift_sd):.2g} reference sd)"


def _field(field: int, now: Now, unit: str) -> Words:
    site, detectors = now.tester.site, now.detectors
    name, fields = site.fields[field], len(site.fields)
    if not detectors.cusum.on[:, [field, fields + field]].any():
        windows, since = int(detectors.shape.windows[field]), int(detectors.shape.since[field])
        what = f"values are spread otherwise than in this site's reference {now.over(windows, since)}"
        evidence = {"test": "shape", "windows": windows, "since": since}
        return Words(f"{name}: {what}; likely another range, resolution or position", evidence)
    found = change(now, field)
    slow = season.cause(field, now.season, site.fields) if found.test == "mean" else ""
    why = slow or cause(found, field, site, now.window)
    growing = ", and goes on: a slow ramp" if found.ramp else ""
    over = now.over(found.windows, found.since)
    return Words(f"{name}: {found.what(unit)} {over}{growing}; likely {why}", found.evidence())


def _output(now: Now) -> Words:
    site, shape = now.tester.site, now.detectors.shape
    subject = len(site.fields)
    usual, share = (counts / max(1, int(counts.sum())) for counts in (site.output, now.window.output))
    most = int(np.argmax(np.abs(share - usual)))
    test, windows, since = "shape", int(shape.windows[subject]), int(shape.since[subject])
    sums, answers = now.detectors.cusum, now.detectors.places.answers
    if (on := sums.on[:, answers]).any():
        test, side, most = "share", *(int(one) for one in np.argwhere(on)[0])
        found = (side, answers.start + most)
        windows, since, usual = int(sums.windows[found]), int(sums.since[found]), site.test_mean[answers]
        share = usual + (sums.effect[found] / windows if windows else now.effects[found[1]])
    what = f"{site.labels[most]} is {share[most]:.0%} of the answers, {usual[most]:.0%} in this site's reference"
    evidence = {"test": test, "windows": windows, "since": since}
    evidence |= {"label": site.labels[most], "share": short(share[most], 4), "usual": short(usual[most], 4)}
    why = "another use of the machine, or a model that no longer fits"
    return Words(f"output: {what}, {now.over(windows, since)}; likely {why}", evidence)


def _score(now: Now) -> Words:
    sums, shape, subject = now.detectors.cusum, now.detectors.shape, len(now.tester.site.fields) + 1
    labels = bool(now.tester.site.labels)
    noun = "certainty" if labels else "answers"
    certainty = now.detectors.places.certainty
    at = (int(np.argmax(sums.value[:, certainty])), certainty)
    moved = float(sums.effect[at] / sums.windows[at] if sums.windows[at] else now.effects[certainty])
    if sums.on[:, certainty].any():
        test, windows, since = "mean", int(sums.windows[at]), int(sums.since[at])
        unit = "" if labels else " of its reference spread"
        what = f"the model's {noun} {'fell' if moved < 0 else 'rose'} by {abs(moved):.2g}{unit}"
    else:
        test, windows, since = "shape", int(shape.windows[subject]), int(shape.since[subject])
        what = f"the model's {noun} {'is' if labels else 'are'} spread otherwise than in this site's reference"
    evidence = {"test": test, "windows": windows, "since": since, "shift": short(moved, 4)}
    why = "readings unlike those it was made from"
    return Words(f"score: {what} {now.over(windows, since)}; likely {why}", evidence)


def _joint(now: Now) -> Words:
    sums, fields = now.detectors.cusum, now.tester.site.fields
    pairs = now.detectors.places.pairs
    value = sums.value[:, pairs]
    on = np.flatnonzero(sums.on[:, pairs].any(0))
    first = on[np.argsort(-value[:, on].max(0), kind="stable")][:MOST_PAIRS]
    told: list[str] = []
    evidence: list[dict[str, Any]] = []
    for pair in first:
        at = (int(np.argmax(value[:, pair])), pairs.start + int(pair))
        moved = float(sums.effect[at] / max(1, sums.windows[at]))
        names = [fields[i] for i in correlation.pairs(len(fields))[pair]]
        told.append(f"{' and '.join(names)} go {'less' if moved < 0 else 'more'} together")
        numbers = {"windows": int(sums.windows[at]), "since": int(sums.since[at])}
        evidence.append({"pair": names, "shift": short(moved, 4), **numbers})
    over = now.over(evidence[0]["windows"], evidence[0]["since"])
    what = f"{', '.join(told)} than in this site's reference {over}, while each by itself is as before"
    why = "a loose mounting, swapped wires or another way of moving"
    return Words(f"joint: {what}; likely {why}", {"test": "pairs", "pairs": evidence})


def change(now: Now, field: int) -> Change:
    """Of a field with an alarm; the effects of the last window stand in for a test without evidence."""
    site, limits, cusum, effects = now.tester.site, now.tester.limits, now.detectors.cusum, now.effects
    fields = len(site.fields)
    mean, spread = (
        max((0, test), (1, test), key=lambda at: float(cusum.value[at])) for test in (field, fields + field)
    )
    on = [at for at in (mean, spread) if cusum.on[:, at[1]].any()] or [mean, spread]
    lead = max(on, key=lambda at: float(cusum.value[at]))
    shift, log_ratio = (
        float(cusum.effect[at] / cusum.windows[at] if cusum.windows[at] else effects[at[1]]) for at in (mean, spread)
    )
    sd = float(site.sd[field])
    return Change(
        test="mean" if lead == mean else "spread",
        windows=int(cusum.windows[lead]),
        since=int(cusum.since[lead]),
        cusum=float(cusum.value[lead]),
        shift=shift,
        shift_sd=shift / sd if sd > 0 else 0.0,
        ratio=float(np.exp(log_ratio)),
        spread=bool(cusum.value[spread] > HALF_WAY * limits.limit[spread[1]]),
        ramp=int(cusum.windows[lead]) >= LONGER and is_ramp(now.detectors.recent[:, lead[1]].astype(np.float64)),
    )


def cause(found: Change, field: int, site: Reference, window: Summary) -> str:
    """A guess for a person. A gain scales mean and spread alike; an offset moves the mean alone."""
    if not found.spread:
        return "offset or a new position"
    less = found.ratio < 1
    scale = _mean_scale(field, site, window)
    if scale is None:
        return "gain loss or less movement" if less else "gain rise, noise or more movement"
    if abs(np.log(scale / found.ratio)) < abs(np.log(scale)):
        return "gain loss" if less else "gain rise"
    return "less movement or damping" if less else "noise or more movement"


def _mean_scale(field: int, site: Reference, window: Summary) -> float | None:
    """Slope of the window's class means on the site's, through zero; None where these are near zero and say nothing."""
    found = window.classes.moments(site.origin)
    n, mean, usual = found.n[:, field], found.mean[:, field], site.class_mean[:, field]
    weight = n / site.class_sd[:, field] ** 2
    if (weight * usual**2).sum() < n.sum():
        return None
    return max(0.01, float((weight * mean * usual).sum() / (weight * usual**2).sum()))
