"""Test sequence: all tests over consecutive windows, up to the first alarm.

A window that raises an alarm, or during which one is open, is a sequence of its own.
"""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.foundation.indices import take
from outstation.ml.drift.detectors import cusum
from outstation.ml.drift.detectors.detector import EARLY_DRIFT_SHARE, NEAR_LIMIT_SHARE, ChartRun, ChartWindows
from outstation.ml.drift.detectors.registry import CHARTS, ChartStates
from outstation.ml.drift.sequential.test_suite import DriftTester, Evidence, SuiteState


class SuiteRun(msgspec.Struct, frozen=True, eq=False):
    """Run over W windows with this `evidence`; while an alarm is open `before` them, W is 1."""

    tester: DriftTester
    before: SuiteState
    evidence: Evidence
    cusum: cusum.CusumSequence
    charts: dict[str, ChartRun]

    @property
    def windows_before_alarm(self) -> int:
        """Number of windows before the first with an open alarm."""
        exceeds = self.cusum.exceeds_limit
        quiet = int(exceeds.argmax()) if any_true(exceeds) else len(exceeds)
        return min(quiet, *(run.windows_before_alarm for run in self.charts.values()))

    def state_after(self, windows: int) -> SuiteState:
        """Return the state after `windows` windows, of which only the last may have an open alarm."""
        before, evidence = self.before, self.evidence[:windows]
        sums, z = self.cusum.state_after(windows), evidence.z[-1]
        ended = before.ended
        if any_true(before.cusum.alarm):
            ended = ended + (before.cusum.alarm & ~sums.alarm).any(0)
        for run in self.charts.values():
            sums = run.open_alarm(sums, windows, z)
        after = SuiteState(
            before.task,
            sums,
            ended,
            ChartStates({name: run.state_after(windows) for name, run in self.charts.items()}),
            np.concatenate([before.recent_scores, evidence.scores])[windows:],
        )
        if self.tester.reference.labels and any_true(sums.alarm) and not any_true(before.open_fields):
            return self._keep_lead_field(after, z)
        return after

    def _keep_lead_field(self, after: SuiteState, z: Float64s) -> SuiteState:
        """Keep only the field that deviates most, if several alarm at once, and reset all others.

        Up to here all were compared with the classes that the model named, and one field may have made these wrong.
        Another field that drifts, too, will be found when classes are assigned by the sound fields.
        """
        subjects = after.layout.subjects
        on = after.cusum.alarm.any(0) & (subjects < after.task.fields)
        if not any_true(on):
            return after
        lead = subjects[np.where(on, np.nan_to_num(np.abs(z)), -1.0).argmax()]
        return after.reset_except(subjects == lead)


def run_tests(tester: DriftTester, before: SuiteState, evidence: Evidence, t: Ints) -> SuiteRun:
    """Run all tests over W windows that began at `t` (W,) epoch µs."""
    open_now, baselines = before.open_fields, tester.reference.baselines
    limit = tester.limits.limit * before.caution

    def run_cusums(z: Float64s) -> cusum.CusumSequence:
        to_clear = tester.reference.task.windows_to_clear
        return before.cusum.run_windows(
            z, evidence.effects, slack=tester.limits.slack, limit=limit, t=t, to_clear=to_clear
        )

    z, ahead = evidence.z, run_cusums(evidence.z)
    held = _find_suspended_tests(tester, ahead, limit, open_now)
    if held is not None:
        # Fields are never held, so what they have gathered stays as it was found.
        z = np.where(held, np.nan, z)
        ahead = run_cusums(z)
    slices, effects = before.layout.slices, evidence.effects
    charts = {
        chart.name: chart.run(
            before.charts[chart.name],
            ChartWindows(
                tester.reference.task,
                baselines[chart.name],
                slices,
                z,
                effects,
                evidence.charts[chart.name],
                before.caution,
                open_now,
                t,
            ),
        )
        for chart in CHARTS
    }
    return SuiteRun(tester, before, evidence, ahead, charts)


def _find_suspended_tests(
    tester: DriftTester, sequence: cusum.CusumSequence, limit: Float64s, open_now: Bools
) -> Bools | None:
    """Return which tests (W, T) wait, as fields that they depend on move; None for none. `limit` is theirs (T,)."""
    layout = tester.reference.layout
    before = np.maximum(*sequence.before.value)[None]
    highest = np.concatenate([before, np.maximum(sequence.values[:-1, 0], sequence.values[:-1, 1])])
    begins = take(highest / limit, layout.field_tests, 1).max(-1)
    moving = open_now | (begins > EARLY_DRIFT_SHARE)
    if not any_true(moving):
        return None
    held = np.zeros(sequence.z.shape, np.bool_)
    near = any_true(open_now) | (begins.max(1) > NEAR_LIMIT_SHARE)
    for detector in layout.detectors:
        waiting = detector.suspended(tester.reference.task, moving, near)
        if waiting is not None:
            held[:, layout[detector.name]] = waiting
    return held
