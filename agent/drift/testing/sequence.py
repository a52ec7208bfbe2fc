"""Test sequence: all tests over consecutive windows, up to the first alarm.

A window that raises an alarm, or during which one is open, is a sequence of its own.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Float64s, Ints
from agent.drift.detectors import cusum, mewma
from agent.drift.detectors.detector import EARLY_DRIFT_SHARE, NEAR_LIMIT_SHARE
from agent.drift.detectors.mewma import Mewma
from agent.drift.detectors.psi import PsiConfirmation
from agent.drift.detectors.registry import CLASS_SHARE, DETECTORS
from agent.drift.testing.test_suite import DriftTester, Evidence, SuiteState


class SuiteRun(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Run over W windows with this `evidence`; while an alarm is open `before` them, W is 1."""

    tester: DriftTester
    before: SuiteState
    evidence: Evidence
    cusum: cusum.CusumSequence
    field_mewma: mewma.MewmaSequence
    class_share_mewma: mewma.MewmaSequence
    t: Ints  # (W,)

    @cached_property
    def psi_states(self) -> list[PsiConfirmation]:
        """PSI state after each window, up to the first with an open alarm."""
        tested = self.evidence.psi_tested
        if self.before.open_fields.any():
            tested = tested.copy()
            tested[:, -2:] = False
        now, states = self.before.psi, []
        for exceeded, window_tested, t in zip(self.evidence.psi_exceeded, tested, self.t.tolist(), strict=True):
            now = now.update(exceeded, window_tested, t)
            states.append(now)
            if now.alarm.any():
                break
        return states

    @property
    def windows_before_alarm(self) -> int:
        """Number of windows before the first with an open alarm."""
        most_means, most_answers = self.tester.calibration.together
        squares = zip(
            self.cusum.exceeds_limit.tolist(),
            self.field_mewma.statistics,
            self.class_share_mewma.statistics,
            strict=True,
        )
        quiet = [not (beyond or means > most_means or answers > most_answers) for beyond, means, answers in squares]
        psi_quiet = len(self.psi_states) - bool(self.psi_states[-1].alarm.any())
        return min(psi_quiet, quiet.index(False) if False in quiet else len(quiet))

    def state_after(self, windows: int) -> SuiteState:
        """Return the state after `windows` windows, of which only the last may have an open alarm."""
        before, evidence, fields = self.before, self.evidence[:windows], len(self.tester.reference.fields)
        z = evidence.z[-1]
        after = SuiteState(
            before.task,
            self.cusum.state_after(windows),
            self.psi_states[windows - 1],
            np.concatenate([before.recent_scores, evidence.scores])[windows:],
            np.concatenate([before.recent_z, evidence.z[:, : 2 * fields].astype(np.float32)])[windows:],
            self.field_mewma.state_after(windows),
            self.class_share_mewma.state_after(windows),
        )
        after = self._open_mewma_alarms(
            after, z, self.field_mewma.statistics[windows - 1], self.class_share_mewma.statistics[windows - 1]
        )
        if self.tester.reference.labels and not before.open_fields.any():
            return self._keep_lead_field(after, z)
        return after

    def _open_mewma_alarms(
        self, after: SuiteState, z: Float64s, field_statistic: float, class_share_statistic: float
    ) -> SuiteState:
        """Open the alarm of the test that moved most, where a MEWMA statistic exceeds its limit; reset that chart."""
        at, (most_means, most_answers) = after.layout, self.tester.calibration.together
        if field_statistic > most_means:
            moved = _open_lead_alarm(after.cusum, after.field_mewma, at.means, z)
            after = replace(after, cusum=moved, field_mewma=Mewma.zeros(at.fields))
        if class_share_statistic > most_answers:
            moved = _open_lead_alarm(after.cusum, after.class_share_mewma, at[CLASS_SHARE.name], z)
            after = replace(after, cusum=moved, class_share_mewma=Mewma.zeros(len(after.class_share_mewma.mean)))
        return after

    def _keep_lead_field(self, after: SuiteState, z: Float64s) -> SuiteState:
        """Keep only the field that deviates most, if several alarm at once, and reset all others.

        Up to here all were compared with the classes that the model named, and one field may have made these wrong.
        Another field that drifts, too, will be found when classes are assigned by the sound fields.
        """
        fields = len(self.tester.reference.fields)
        on = after.cusum.alarm[0, : 2 * fields] | after.cusum.alarm[1, : 2 * fields]
        if not on.any():
            return after
        far = np.where(on, np.nan_to_num(np.abs(z[: 2 * fields])), -1.0)
        lead = int(far.argmax()) % fields
        lead_tests = np.zeros(len(z), np.bool_)
        lead_tests[[lead, fields + lead]] = True
        return after.reset_except(lead_tests)


def run_tests(tester: DriftTester, before: SuiteState, evidence: Evidence, t: Ints) -> SuiteRun:
    """Run all tests over W windows that began at `t` (W,) epoch µs."""
    at, open_now = before.layout, before.open_fields

    def run_cusums(z: Float64s) -> cusum.CusumSequence:
        slack, limit = tester.limits.slack, tester.limits.limit
        return before.cusum.run_windows(z, evidence.effects, slack=slack, limit=limit, t=t)

    z, ahead = evidence.z, run_cusums(evidence.z)
    held = _find_suspended_tests(tester, ahead, open_now)
    if held is not None:
        # Fields are never held, so what they have gathered stays as it was found.
        z = np.where(held, np.nan, z)
        ahead = run_cusums(z)
    means, fields = before.field_mewma, z[:, at.means]
    if open_now.any():
        means, fields = means.reset_except(~open_now), np.where(open_now, np.nan, fields)
    return SuiteRun(
        tester,
        before,
        evidence,
        ahead,
        means.run_windows(fields, evidence.effects[:, at.means], t),
        before.class_share_mewma.run_windows(z[:, at[CLASS_SHARE.name]], evidence.effects[:, at[CLASS_SHARE.name]], t),
        t,
    )


def _find_suspended_tests(tester: DriftTester, sequence: cusum.CusumSequence, open_now: Bools) -> Bools | None:
    """Return which tests (W, T) wait, as fields that they depend on move; None for none."""
    count = len(open_now)
    limit = tester.limits.limit[: 2 * count]
    values = np.concatenate([sequence.before.value[None], sequence.values[:-1]])[:, :, : 2 * count]
    share = (values / limit).max(1)
    begins = np.maximum(share[:, :count], share[:, count:])
    moving = open_now | (begins > EARLY_DRIFT_SHARE)
    if not moving.any():
        return None
    layout, held = tester.reference.layout, np.zeros(sequence.tested.shape, np.bool_)
    near = open_now.any() | (begins.max(1) > NEAR_LIMIT_SHARE)
    for detector in DETECTORS:
        waiting = detector.suspended(tester.reference.task, moving, near)
        if waiting is not None:
            held[:, layout[detector.name]] = waiting
    return held


def _open_lead_alarm(sums: cusum.Cusum, mewma: Mewma, test_slice: slice, z: Float64s) -> cusum.Cusum:
    """Open the alarm of the test of this slice that moved most.

    Among tests that moved much it is the one that deviates most now, as the means are clipped.
    """
    far = np.abs(mewma.mean)
    lead = int(np.where(far >= NEAR_LIMIT_SHARE * far.max(), np.nan_to_num(np.abs(z[test_slice])), -1.0).argmax())
    side = 0 if mewma.mean[lead] > 0 else 1
    return sums.open_alarm(
        side, test_slice.start + lead, int(mewma.windows[lead]), float(mewma.effect[lead]), int(mewma.since[lead])
    )
