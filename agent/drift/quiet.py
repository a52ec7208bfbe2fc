"""Drift windows in which nothing happens: no fault, no alert open or raised. Most are, so these are judged together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from agent.arrays import Bools, Float64s, Ints
from agent.drift import sampling_rate_watch as watch
from agent.drift.detectors.season import SlowTrend
from agent.drift.sampling_rate_watch import RateObservation, SamplingRateWatch
from agent.drift.state import DriftState
from agent.drift.testing import sequence
from agent.drift.testing.test_suite import DriftTester, Evidence, SuiteState


class QuietWindows(msgspec.Struct, frozen=True, eq=False):
    """The next W drift windows: what is remembered after the last, and sums after each."""

    suite: SuiteState
    slow_trend: SlowTrend
    rate_watch: SamplingRateWatch
    cusum_sums: Float64s  # (W, 2, T)
    speed_sums: Float64s  # (W, 2)

    @property
    def windows(self) -> int:
        return len(self.cusum_sums)


def find_quiet_windows(
    state: DriftState,
    tester: DriftTester,
    signs: Bools,
    observations: Sequence[RateObservation],
    evidence: Evidence,
    t: Ints,
) -> QuietWindows | None:
    """Of W windows, begun at `t` (W,), those before the first that has `signs` (W,) of a fault or raises anything; None
    where that is the first one, or something is open."""
    is_open = state.faulty.any() or state.misread.any() or state.rate_watch.open_fault or state.rate_watch.drifting
    if is_open or state.suite.open_subjects.any():
        return None
    faulty = [bool(sign or tick.fault) for sign, tick in zip(signs.tolist(), observations, strict=True)]
    windows = faulty.index(True) if True in faulty else len(faulty)
    if not windows:
        return None
    tests = sequence.run_tests(tester, state.suite, evidence[:windows], t[:windows])
    paces = watch.run_speed_cusum(state.rate_watch, observations[:windows], tester, t[:windows])
    windows = tests.windows_before_alarm
    if paces is not None and paces.exceeds_limit[:windows].any():
        windows = int(paces.exceeds_limit.argmax())
    if not windows:
        return None
    now, before = state.slow_trend, state.rate_watch.cusum.value[:, 0]
    return QuietWindows(
        suite=tests.state_after(windows),
        slow_trend=now.add(evidence.z[:windows, : len(state.fields)], t[:windows]),
        rate_watch=watch.apply_quiet_windows(state.rate_watch, paces, windows),
        cusum_sums=tests.cusum.values[:windows],
        speed_sums=np.tile(before, (windows, 1)) if paces is None else paces.values[:windows, :, 0],
    )
