"""What watches the rate at which a site's readings come and its signals move: the subject "rate" of a task.

A fault of it is one of the rows themselves, so while it is open no field is tested and nothing is learned. Where
signals move faster or slower than the rows' times explain, that is told as a drift; fields wait then, too, as the model
names wrong classes. And it waits while a field's drift is open, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Floats, Ints
from agent.drift.baseline.summary import Summary
from agent.drift.detectors import sampling_rate as rate
from agent.drift.detectors.cusum import CALM, Course, Cusum
from agent.drift.detectors.sampling_rate import Usual
from agent.drift.reporting.alert_text import Alert
from agent.drift.reporting.drift_message import gravest, short
from agent.drift.reporting.words import amount_of_time, over, since
from agent.drift.testing.test_suite import Detectors, Tester

SUBJECT = "rate"
CAUSES = {
    "rate": "sampling rate or sensor clock changed",
    "repeated": "its source gives readings again, or a gateway holds the last one",
}


class Watch(msgspec.Struct, frozen=True, eq=False):
    """What is remembered. `seen` is the fault of the last window, `on` the one that an alert is open for."""

    cusum: Cusum = msgspec.field(default_factory=lambda: Cusum.zeros(1))
    seen: str = ""
    on: str = ""
    since: int = 0  # epoch µs, of `seen`
    calm: int = 0  # windows without a fault, while an alert is open
    raised: Ints = msgspec.field(default_factory=lambda: np.zeros(2, np.int64))  # alerts so far: drift, fault

    @property
    def drifting(self) -> bool:
        return bool(self.cusum.on.any())


class Tick(msgspec.Struct, frozen=True):
    """What a drift window says: its `fault` or "", the score `z` of its speed and the logarithm `speed`; and its mean
    step, NaN for not known, and share of repeated rows."""

    fault: str
    z: float
    speed: float
    step_us: float = math.nan
    repeated: float = 0.0


def ticks(windows: Summary, middle: Ints, tester: Tester | None) -> list[Tick]:
    """Of stacked windows in the `middle` of times (W,), epoch µs."""
    steps, repeated = windows.ticks.step_us().tolist(), rate.repeated_share(windows).tolist()
    usual = tester.extra.rate if tester else None
    if tester is None or usual is None:
        return [Tick("", math.nan, math.nan, *both) for both in zip(steps, repeated, strict=True)]
    scores = (found.tolist() for found in usual.z(windows, middle, tester.site.drift_windows))
    return [
        Tick(rate.fault(step, share, usual), z, speed, step, share)
        for step, share, z, speed in zip(steps, repeated, *scores, strict=True)
    ]


def after(before: Watch, tick: Tick, tester: Tester | None, fields: Detectors, t: tuple[int, int]) -> Watch:
    """After one more window at `t`; `fields` is what theirs had gathered before it.

    Its pace counts where no fault is open and no field drifts.
    """
    if tester is None or tester.extra.rate is None:
        return before
    drifting = bool(fields.open_fields.any())
    return ticked(before, tick, t[0], fields_drift=drifting, limit=tester.pace_limit)


def ticked(before: Watch, tick: Tick, t: int, *, fields_drift: bool, limit: float) -> Watch:
    """After one more window, begun at `t`."""
    calm = 0 if tick.fault else before.calm + 1
    twice = bool(tick.fault) and before.seen == tick.fault
    on = before.on if before.on and calm < CALM else ""
    on = on or (tick.fault if twice else "")
    held = bool(tick.fault or on) or (fields_drift and not before.drifting)
    cusum = before.cusum
    if not held:
        cusum = _paces(before, [tick], np.array([t]), limit).after(1)
    more = [bool(cusum.on.any()) and not before.drifting, bool(on) and on != before.on]
    raised = before.raised + np.array(more, np.int64)
    began = before.since if twice or on == before.on != "" else t
    return Watch(cusum, tick.fault, on, began, calm if on else 0, raised)


def paces(before: Watch, ticks: Sequence[Tick], tester: Tester, t: Ints) -> Course | None:
    """The sums of the pace over W windows, begun at `t` (W,), while nothing is open; None where it is not watched."""
    return None if tester.extra.rate is None else _paces(before, ticks, t, tester.pace_limit)


def _paces(before: Watch, ticks: Sequence[Tick], t: Ints, limit: float) -> Course:
    z, speeds = np.array([tick.z for tick in ticks]), np.array([tick.speed for tick in ticks])
    return before.cusum.ahead(z[:, None], speeds[:, None], limit=limit, t=t)


def after_quiet(before: Watch, paces: Course | None, windows: int) -> Watch:
    """After so many windows without a fault, while nothing is open or raised."""
    if paces is None:
        return before
    return Watch(paces.after(windows), since=int(paces.t[windows - 1]), raised=before.raised)


def holds(now: Watch) -> bool:
    """Whether the window that led to this is kept out of all other tests, and out of what is learned."""
    return bool(now.seen or now.on or now.drifting)


def relearning(watch: Watch) -> Watch:
    """Where the site's reference is learned anew: with nothing open, and alerts counted on."""
    return Watch(raised=watch.raised)


def alerts(
    before: Watch, now: Watch, tick: Tick, tester: Tester | None, t: tuple[int, int], where: dict[str, Any]
) -> list[Alert]:
    """Raised and cleared by a window at `t`, which is `where`."""
    usual = tester.extra.rate if tester else None
    if tester is None or usual is None:
        return []
    out, evidence = [], where | {"site": tester.site.digest}
    if now.on != before.on and before.on:
        out.append(_cleared("fault", before, "come as they did in this site's reference", evidence))
    if now.on != before.on and now.on:
        sentence, numbers = _fault(now, tick, usual, t)
        told = _alert("fault", "critical", now.raised[1], sentence, evidence | {"fault": now.on} | numbers)
        out.append(told)
    if now.drifting and not before.drifting:
        sentence, numbers = _pace(now, t)
        out.append(_alert("drift", "warning", now.raised[0], sentence, evidence | numbers))
    elif before.drifting and not now.drifting:
        out.append(_cleared("drift", before, "move as fast as in this site's reference", evidence))
    return out


def forgotten(watch: Watch, why: str, evidence: dict[str, Any]) -> list[Alert]:
    """The open alerts, cleared, because what they were against is gone."""
    kinds = [kind for kind, is_open in (("drift", watch.drifting), ("fault", bool(watch.on))) if is_open]
    return [replace(_cleared(kind, watch, "", evidence), summary=f"{SUBJECT}: {why}.") for kind in kinds]


def with_rate(
    numbers: Sequence[dict[str, Any]], now: Watch, sums: Floats, ticks: Sequence[Tick], tester: Tester | None
) -> list[dict[str, Any]]:
    """The members of W drift messages with `rate`, and the state of all that follows.

    `sums` (W, 2) are those of the pace after each window, and `now` what is remembered after the last: in those before
    nothing was open or seen.
    """
    usual = tester.extra.rate if tester else None
    state = "fault" if now.seen or now.on else "drift" if now.drifting else "insufficient" if usual is None else "ok"
    same = {
        "limit": round(tester.pace_limit, 2) if tester and usual else None,
        "state": state,
        "fault": now.seen or now.on or None,
    }
    usual_us = short(usual.step_us) if usual and usual.step_us else None
    told = [
        {
            "step_us": None if math.isnan(tick.step_us) else short(tick.step_us),
            "usual_us": usual_us,
            "repeated": round(tick.repeated, 4),
            "cusum": both,
        }
        | same
        for tick, both in zip(ticks, np.round(sums, 2).tolist(), strict=True)
    ]
    return [
        one | {"rate": rate, "state": gravest({one["state"], state} if usual else {one["state"]})}
        for one, rate in zip(numbers, told, strict=True)
    ]


def _fault(now: Watch, tick: Tick, usual: Usual, t: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    step, share = tick.step_us, tick.repeated
    when = f"since {since(now.since, t[1])} UTC"
    if now.on == "repeated":
        what = f"{share:.0%} of rows repeat the row before in all fields, at most {usual.repeated:.0%} did, {when}"
        return f"{SUBJECT}: {what}: {CAUSES['repeated']}.", {"since": now.since, "share": short(share, 4)}
    what = f"readings come every {amount_of_time(step)} instead of {amount_of_time(usual.step_us)} {when}"
    numbers = {"since": now.since, "step_us": short(step), "usual_us": short(usual.step_us)}
    return f"{SUBJECT}: {what}: {CAUSES['rate']}.", numbers


def _pace(now: Watch, t: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    side = int(now.cusum.value[:, 0].argmax())
    windows, begin = int(now.cusum.windows[side, 0]), int(now.cusum.since[side, 0])
    factor = math.exp(float(now.cusum.effect[side, 0]) / max(1, windows))
    what = f"signals move {'slower' if factor < 1 else 'faster'} than in this site's reference (about x{factor:.2g})"
    why = "another sampling rate or sensor clock, though the rows' times do not show it"
    numbers = {"test": "pace", "windows": windows, "since": begin, "ratio": short(factor, 4)}
    return f"{SUBJECT}: {what} {over(windows, begin, t[1])}; likely {why}.", numbers


def _cleared(kind: str, before: Watch, how: str, evidence: dict[str, Any]) -> Alert:
    what = "readings" if kind == "fault" else "signals"
    sentence = f"{SUBJECT}: {what} {how} for {CALM} windows in a row."
    return replace(
        _alert(kind, "info", before.raised[0 if kind == "drift" else 1], sentence, evidence), state="cleared"
    )


def _alert(kind: str, severity: str, number: int, sentence: str, evidence: dict[str, Any]) -> Alert:
    return Alert(kind, SUBJECT, "raised", severity, f"{SUBJECT}/{kind}/{int(number)}", sentence, evidence)
