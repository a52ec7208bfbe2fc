"""Sampling rate watch: the gate with the alerts of subject "rate", of the rate of readings and the speed of signals.

A fault of the rate concerns the rows themselves: while it is open, no field is tested and nothing is learned. Signals
that move faster or slower than the rows' times explain are a drift; fields wait then, too, as the model names wrong
classes. The speed waits while a field's drift is open, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float64s, Ints, any_true
from outstation.foundation.text import format_duration, format_since, format_windows
from outstation.ml.drift.detectors import sampling_rate as rate
from outstation.ml.drift.detectors.cusum import Cusum, CusumSequence
from outstation.ml.drift.detectors.detector import Baseline, round_significant
from outstation.ml.drift.detectors.gate import GateDetector, GateWindows
from outstation.ml.drift.detectors.sampling_rate import RateBaseline, SamplingRateDetector
from outstation.protocol.alerts.alert import Alert, AlertKind, continue_number
from outstation.protocol.alerts.kinds import RATE_DRIFT, RATE_FAULT

SUBJECT = "rate"
CAUSES = {
    "rate": "sampling rate or sensor clock changed",
    "repeated": "its source gives readings again, or a gateway holds the last one",
}


class RateState(msgspec.Struct, frozen=True, eq=False):
    """State: `last_fault` of the last window, and `open_fault`, for which an alert is open."""

    cusum: Cusum = msgspec.field(default_factory=lambda: Cusum.zeros(1))
    last_fault: str = ""
    open_fault: str = ""
    since: int = 0  # epoch µs, of `seen`
    clear_count: int = 0  # windows without a fault, while an alert is open
    raised_counts: Ints = msgspec.field(default_factory=lambda: np.zeros(2, np.int64))  # alerts so far: drift, fault

    @property
    def drifting(self) -> bool:
        return any_true(self.cusum.alarm)

    @property
    def are_open(self) -> tuple[bool, bool]:
        """Open alerts: of drift, of a fault."""
        return self.drifting, bool(self.open_fault)

    @property
    def is_open(self) -> bool:
        return any(self.are_open)

    @property
    def blocks_window(self) -> bool:
        return bool(self.last_fault) or self.is_open


class RateObservation(msgspec.Struct, frozen=True):
    """Rate of one drift window: its `fault` or "", and the score `z` and the logarithm of its speed.

    The mean interval `step_us` is NaN if unknown; `repeated` is a share of rows.
    """

    fault: str
    z: float
    log_speed: float
    step_us: float = math.nan
    repeated: float = 0.0


class RateRun(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Run over W windows; of several only if `before` has no open alert and none has a fault."""

    before: RateState
    observations: Sequence[RateObservation]
    cusum: CusumSequence | None  # None while the speed waits
    limit: float  # of the speed
    open_fault: str  # after the first window
    t: Ints  # (W,)

    @property
    def windows_before_block(self) -> int:
        """Number of windows before the first that is kept out of all other tests."""
        if len(self.t) == 1 or self.cusum is None:
            return 0 if self._first_state.blocks_window else 1
        exceeds = self.cusum.exceeds_limit
        return int(exceeds.argmax()) if any_true(exceeds) else len(exceeds)

    def state_after(self, windows: int) -> RateState:
        return self._first_state if windows == 1 else self._find_state(windows)

    @cached_property
    def _first_state(self) -> RateState:
        return self._find_state(1)

    def _find_state(self, windows: int) -> RateState:
        before, fault, on, t = self.before, self.observations[windows - 1].fault, self.open_fault, self.t[windows - 1]
        cusum = self.cusum.state_after(windows) if self.cusum else before.cusum
        drifts, faulty = any_true(cusum.alarm) and not before.drifting, bool(on) and on != before.open_fault
        goes_on = (bool(fault) and before.last_fault == fault) or on == before.open_fault != ""
        clear_count = before.clear_count + 1 if on and not fault else 0
        raised = before.raised_counts + np.array([drifts, faulty], np.int64)
        return RateState(cusum, fault, on, before.since if goes_on else int(t), clear_count, raised)

    def nearest_shares(self, windows: int) -> Float64s | None:
        return None if self.cusum is None else self.cusum.values[:windows, :, 0].max(1) / self.limit


class SamplingRateWatch(SamplingRateDetector, GateDetector):
    """Gate of the rate of readings and the speed of signals."""

    state_type = RateState
    member = "rate"

    def start(self) -> RateState:
        return RateState()

    def restart(self, state: RateState) -> RateState:
        return RateState(raised_counts=state.raised_counts)

    def observe(self, windows: GateWindows, baseline: Baseline | None) -> list[RateObservation]:
        steps, repeated = windows.step_us.tolist(), windows.repeated.tolist()
        if baseline is None:
            return [RateObservation("", math.nan, math.nan, *both) for both in zip(steps, repeated, strict=True)]
        usual: RateBaseline = baseline.own
        scores = usual.score_speeds(windows.counts[self.name], windows.t)
        return [
            RateObservation(rate.detect_fault(step, share, usual), z, speed, step, share)
            for step, share, z, speed in zip(steps, repeated, *(part.tolist() for part in scores), strict=True)
        ]

    def run(
        self,
        state: RateState,
        observations: Sequence[RateObservation],
        baseline: Baseline,
        t: Ints,
        *,
        fields_drift: bool,
        to_clear: int,
    ) -> RateRun:
        """Run over W windows. The speed counts while no fault is open and no field drifts."""
        first = observations[0]
        clears = not first.fault and state.clear_count + 1 >= to_clear
        on = "" if clears else state.open_fault
        on = on or (first.fault if first.fault == state.last_fault else "")
        cusum, limit = None, float(baseline.own.limit)
        if not (first.fault or on or (fields_drift and not state.drifting)):
            z, speeds = np.array([(each.z, each.log_speed) for each in observations]).T[..., None]
            cusum = state.cusum.run_windows(z, speeds, limit=limit, t=t, to_clear=to_clear)
        return RateRun(state, observations, cusum, limit, on, t)

    def build_alerts(
        self,
        previous: RateState,
        current: RateState,
        observation: RateObservation,
        baseline: Baseline,
        t: tuple[int, int],
        evidence: dict[str, Any],
    ) -> list[Alert]:
        out = []
        if current.open_fault != previous.open_fault and previous.open_fault:
            sentence = f"{SUBJECT}: readings come as they did in this site's reference."
            out.append(RATE_FAULT.cleared(sentence, evidence, count=previous.raised_counts[1]))
        if current.open_fault != previous.open_fault and current.open_fault:
            sentence, numbers = _fault_text(current, observation, baseline.own, t)
            fault = evidence | {"fault": current.open_fault} | numbers
            out.append(RATE_FAULT.raised(sentence, fault, count=current.raised_counts[1]))
        if current.drifting and not previous.drifting:
            sentence, numbers = _speed_text(current, t)
            out.append(RATE_DRIFT.raised(sentence, evidence | numbers, count=current.raised_counts[0]))
        elif previous.drifting and not current.drifting:
            sentence = f"{SUBJECT}: signals move as fast as in this site's reference."
            out.append(RATE_DRIFT.cleared(sentence, evidence, count=previous.raised_counts[0]))
        return out

    def list_open(self, state: RateState) -> list[tuple[AlertKind, int]]:
        alerts = zip((RATE_DRIFT, RATE_FAULT), state.raised_counts.tolist(), state.are_open, strict=True)
        return [(kind, number) for kind, number, is_open in alerts if is_open]

    def continue_numbers(self, state: RateState, other: RateState) -> RateState:
        numbers = zip(state.raised_counts.tolist(), other.raised_counts.tolist(), state.are_open, strict=True)
        raised = [continue_number(number, used, is_open=is_open) for number, used, is_open in numbers]
        return replace(state, raised_counts=np.array(raised, np.int64))

    def build_member(
        self, state: RateState, step_us: float, repeated: float, baseline: Baseline | None
    ) -> dict[str, Any]:
        usual: RateBaseline | None = baseline.own if baseline else None
        name = (
            "fault"
            if state.last_fault or state.open_fault
            else "drift"
            if state.drifting
            else "insufficient"
            if usual is None
            else "ok"
        )
        return {
            "step_us": None if math.isnan(step_us) else round_significant(step_us),
            "usual_us": round_significant(usual.step_us) if usual and usual.step_us else None,
            "repeated": round(repeated, 4),
            "cusum": np.round(state.cusum.value[:, 0], 2).tolist(),
            "limit": round(baseline.own.limit, 2) if baseline else None,
            "state": name,
            "fault": state.last_fault or state.open_fault or None,
        }


def _fault_text(
    current: RateState, observation: RateObservation, usual: RateBaseline, t: tuple[int, int]
) -> tuple[str, dict[str, Any]]:
    step, share = observation.step_us, observation.repeated
    when = f"since {format_since(current.since, t[1])} UTC"
    if current.open_fault == "repeated":
        symptom = f"{share:.0%} of rows repeat the row before in all fields, at most {usual.repeated:.0%} did, {when}"
        return f"{SUBJECT}: {symptom}: {CAUSES['repeated']}.", {
            "since": current.since,
            "share": round_significant(share, 4),
        }
    symptom = f"readings come every {format_duration(step)} instead of {format_duration(usual.step_us)} {when}"
    numbers = {"since": current.since, "step_us": round_significant(step), "usual_us": round_significant(usual.step_us)}
    return f"{SUBJECT}: {symptom}: {CAUSES['rate']}.", numbers


def _speed_text(current: RateState, t: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    side = int(current.cusum.value[:, 0].argmax())
    windows, begin = int(current.cusum.windows[side, 0]), int(current.cusum.since[side, 0])
    factor = math.exp(float(current.cusum.effect[side, 0]) / max(1, windows))
    change = f"signals move {'slower' if factor < 1 else 'faster'} than in this site's reference (about x{factor:.2g})"
    why = "another sampling rate or sensor clock, though the rows' times do not show it"
    numbers = {"test": "pace", "windows": windows, "since": begin, "ratio": round_significant(factor, 4)}
    return f"{SUBJECT}: {change} {format_windows(windows, begin, t[1])}; likely {why}.", numbers
