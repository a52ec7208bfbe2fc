"""Alerts and the sentences in them: what happened, how much, and what it probably is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.drift.codec import Floats
from agent.drift.cusum import CALM, Cusum, H
from agent.drift.reference import Reference
from agent.drift.summary import Summary, short

CAUSES = {
    "missing": "sensor or cable fault, or its source stopped",
    "stuck": "sensor or cable fault",
    "out_of_range": "wrong unit, wrong sensor or a fault",
    "spikes": "loose contact or interference",
}


@dataclass(frozen=True)
class Alert:
    """`id` is `<subject>/<alert>/<count>`, the same when raised and when cleared."""

    alert: str  # drift | fault
    subject: str
    state: str  # raised | cleared
    severity: str  # info | warning | critical
    id: str
    summary: str
    evidence: dict[str, Any]


def fault_sentence(subject: str, fault: str, field: int, summary: Summary) -> str:
    share = {"missing": summary.missing, "out_of_range": summary.outside}.get(fault, summary.missing)[field]
    what = {
        "missing": f"{share / max(1, summary.rows):.0%} of values are missing",
        "stuck": f"repeats one value for {summary.longest[field]} rows",
        "out_of_range": f"{share / max(1, summary.rows):.0%} of values lie far outside the reference's range",
        "spikes": f"{summary.spikes[field]} lone jumps in {summary.rows} rows",
    }[fault]
    return f"{subject}: {what}: {CAUSES[fault]}."


def cleared_sentence(subject: str, alert: str) -> str:
    what = "no sensor fault" if alert == "fault" else "close to this site's reference"
    return f"{subject}: {what} for {CALM} windows in a row."


def doubt(earlier: Sequence[str]) -> str:
    """What to add where other fields drifted before: statistics are compared within the class the model names."""
    if not earlier:
        return ""
    return f" {', '.join(earlier)} drifted before: the model may name wrong classes since, and this may follow from it."


@dataclass(frozen=True)
class Change:
    """What the sums of one field say since the change began: effects averaged over those windows."""

    test: str  # mean | spread: the one that is furthest out
    windows: int
    cusum: float
    shift: float  # of the mean, physical units
    shift_sd: float  # the same in sd of the site's rows
    ratio: float  # of the spread to the site's
    spread: bool  # whether the spread has changed, too: half way to an alarm of its own

    def evidence(self) -> dict[str, Any]:
        numbers = {"cusum": self.cusum, "shift": self.shift, "shift_sd": self.shift_sd, "ratio": self.ratio}
        return {"test": self.test, "windows": self.windows} | {name: short(x, 4) for name, x in numbers.items()}

    def sentence(self, subject: str, unit: str, cause: str) -> str:
        over = "in one window" if self.windows == 1 else f"over {self.windows} windows"
        if self.test == "spread":
            moved = "fell" if self.ratio < 1 else "rose"
            what = f"spread {moved} to {self.ratio:.2g} of this site's reference {over}"
        else:
            amount = f"{self.shift:+.2g}" + (f" {unit}" if unit else "")
            what = f"mean moved by {amount} ({abs(self.shift_sd):.2g} reference sd) {over}"
        return f"{subject}: {what}; likely {cause}."


def change(cusum: Cusum, field: int, site: Reference, effects: Floats) -> Change:
    """Of a field with an alarm; `effects` (2F,) of the last window stand in for a test without evidence."""
    fields = len(site.fields)
    mean, spread = (
        max((0, test), (1, test), key=lambda at: float(cusum.value[at])) for test in (field, fields + field)
    )
    lead = mean if cusum.value[mean] > cusum.value[spread] else spread
    shift, log_ratio = (
        float(cusum.effect[at] / cusum.windows[at] if cusum.windows[at] else effects[at[1]]) for at in (mean, spread)
    )
    sd = float(site.sd[field])
    return Change(
        test="mean" if lead == mean else "spread",
        windows=int(cusum.windows[lead]),
        cusum=float(cusum.value[lead]),
        shift=shift,
        shift_sd=shift / sd if sd > 0 else 0.0,
        ratio=float(np.exp(log_ratio)),
        spread=bool(cusum.value[spread] > H / 2),
    )


def cause(found: Change, field: int, site: Reference, window: Summary, origin: Floats) -> str:
    """A guess for a person. A gain scales mean and spread alike; an offset moves the mean alone."""
    if not found.spread:
        return "offset or a new position"
    less = found.ratio < 1
    scale = _mean_scale(field, site, window, origin)
    if scale is None:
        return "gain loss or less movement" if less else "gain rise, noise or more movement"
    if abs(np.log(scale / found.ratio)) < abs(np.log(scale)):
        return "gain loss" if less else "gain rise"
    return "less movement or damping" if less else "noise or more movement"


def _mean_scale(field: int, site: Reference, window: Summary, origin: Floats) -> float | None:
    """Slope of the window's class means on the site's, through zero; None where these are near zero and say nothing."""
    found = window.classes.moments(origin)
    n, mean, usual = found.n[:, field], found.mean[:, field], site.class_mean[:, field]
    weight = n / site.class_sd[:, field] ** 2
    if (weight * usual**2).sum() < n.sum():
        return None
    return max(0.01, float((weight * mean * usual).sum() / (weight * usual**2).sum()))
