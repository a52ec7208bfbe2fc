"""Alert lifecycle: alerts that a closed drift window raises, publishes again and clears.

One alert may be open for each field and kind of fault, and one for each subject's drift.

- An open alert that grows or turns round is published again as its next revision (`escalation`).
- A fault clears after three windows without one. What only a site's reference shows (swapped, reversed, quantized)
  waits for one, or for an operator who has it learned or accepts the readings.
- A drift that was raised in the last windows before a field turns out to be read wrongly followed from that. So does an
  older drift of this field, unless the readings are now far worse than that drift ever was. Its alert is withdrawn, and
  what was gathered on it is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, any_true
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.detectors.cusum import Cusum, windows_to_clear
from outstation.ml.drift.detectors.detector import round_significant
from outstation.ml.drift.faults.faults import KINDS, Fault
from outstation.ml.drift.numeric.escalation import GROWTH, MAX_SCORE, MIN_SCORE
from outstation.ml.drift.reporting import alert_text
from outstation.ml.drift.reporting import drift_alerts as drifts
from outstation.ml.drift.sequential.test_suite import DriftTester
from outstation.ml.drift.state import DriftState
from outstation.protocol.alerts.alert import Alert, MonitoredAlert
from outstation.protocol.alerts.kinds import monitored_names, monitoring_kind

_DRIFT, _FAULT = 0, 1


class AlertLifecycle:
    """Alerts of one task, whose fields have these `units` and `roles`."""

    def __init__(self, shipped: Reference, units: Sequence[str], roles: Sequence[str]) -> None:
        self.shipped, self.units, self.roles = shipped, units, roles
        self.subjects = shipped.task.name_subjects(shipped.fields)

    def update_faults(
        self, state: DriftState, faults: tuple[tuple[Fault, ...], ...], z: Float64s | None
    ) -> tuple[DriftState, list[Alert]]:
        """Return the state with the alerts of a window's `faults`: one per field and kind of fault.

        `z` (T,) are the window's scores, if there is a site's reference.
        """
        before, raised = state.faults, state.raised_counts
        has_site = state.tested_reference is not None
        opened, changes = before.update(
            faults, state.open_summary.rows, raised[: len(faults), _FAULT], has_site=has_site
        )
        if opened is before:
            return state, []
        after, out = self._withdraw_misread(state, opened.misread & ~before.misread, z)
        for field, kind in np.argwhere(changes.raised | changes.escalated | changes.cleared).tolist():
            if changes.cleared[field, kind]:
                sentence = alert_text.fault_cleared_sentence(
                    self.shipped.fields[field], KINDS[kind], windows_to_clear(state.open_summary.rows)
                )
                number = int(before.number[field, kind])
                out.append(self._build_alert(state, "fault", field, number, sentence, kind=KINDS[kind]))
                continue
            fault = next(fault for fault in faults[field] if fault.name == KINDS[kind])
            sentence = alert_text.fault_sentence(
                field, fault, state.open_summary, opened.missing, state.t[1], self.shipped
            )
            evidence: dict[str, Any] = {"fault": fault.name} | ({"detail": fault.detail} if fault.detail else {})
            if changes.escalated[field, kind]:
                published = float(before.escalation.size[field, kind])
                sentence += alert_text.fault_growth_note(fault, published)
                evidence |= {"before": round_significant(published, 3), "now": round_significant(fault.size, 3)}
            number, revision = int(opened.number[field, kind]), int(opened.escalation.revision[field, kind])
            out.append(self._build_alert(state, "fault", field, number, sentence, evidence, revision))
        raised = raised.copy()
        raised[: len(faults), _FAULT] += changes.raised.sum(1)
        return replace(after, faults=opened, raised_counts=raised), out

    def clear_site_faults(self, state: DriftState, reason: str) -> tuple[DriftState, list[Alert]]:
        """Clear faults that no window shows without a site's reference: an operator takes the readings as they are."""
        which = state.faults.open_site_faults
        cleared = []
        for field, kind in np.argwhere(which).tolist():
            sentence = f"{self.subjects[field]}: no longer taken for {KINDS[kind]}: {reason}."
            number = int(state.faults.number[field, kind])
            cleared.append(self._build_alert(state, "fault", field, number, sentence, kind=KINDS[kind]))
        return replace(state, faults=state.faults.drop(which)), cleared

    def update_drifts(
        self, before: DriftState, after: DriftState, z: Float64s, effects: Float64s, tester: DriftTester
    ) -> tuple[DriftState, list[Alert]]:
        """Return the state `after` the window with its drift alerts; `z` and `effects` (T,) are those of its tests."""
        was, is_now = before.suite.open_subjects, after.suite.open_subjects
        if not (any_true(was) or any_true(is_now)):
            return after, []
        tests = after.suite.layout.tests
        sizes = before.drift_sizes.add(z, effects, is_first=not any_true(was)).with_leads(tests, is_now & ~was)
        published = before.drift_escalation.size
        escalation, again = before.drift_escalation.update(was, is_now, sizes.sizes(tests, published), least=MIN_SCORE)
        raised, raised_in = after.raised_counts.copy(), np.where(is_now & ~was, before.index, after.raised_window)
        raised[:, _DRIFT] += is_now & ~was
        out = []
        for subject in np.flatnonzero((was != is_now) | again).tolist():
            number = int(raised[subject, _DRIFT])
            if again[subject]:
                suite = replace(after.suite, cusum=_with_effects(after.suite.cusum, sizes.effect))
                now = drifts.AlarmContext(suite, tester, before.open_summary, effects, before.t)
                size = float(escalation.size[subject])
                note = alert_text.drift_growth_note(float(published[subject]), size)
                evidence = {"before": round_significant(published[subject], 3), "now": round_significant(size, 3)}
                out.append(
                    self._build_drift_alert(
                        before, subject, now, number, note, evidence, int(escalation.revision[subject])
                    )
                )
            elif is_now[subject]:
                now = drifts.AlarmContext(after.suite, tester, before.open_summary, effects, before.t)
                out.append(self._build_drift_alert(before, subject, now, number))
            else:
                out.append(self.build_cleared_alert(before, subject))
        return replace(
            after,
            raised_counts=raised,
            raised_window=raised_in,
            drift_sizes=sizes.with_leads(tests, again),
            drift_escalation=escalation,
        ), out

    def _build_drift_alert(
        self,
        before: DriftState,
        subject: int,
        now: drifts.AlarmContext,
        number: int,
        note: str = "",
        more: dict[str, Any] | None = None,
        revision: int = 1,
    ) -> Alert:
        fields = len(self.shipped.fields)
        earlier = [
            self.subjects[field] for field in np.flatnonzero(before.suite.open_subjects[:fields]) if field != subject
        ]
        words = drifts.build_text(subject, now, self.units, self.roles, self.shipped)
        # While most fields are sound they give the class, so another drift stands by itself, unless all rows together
        # contradict it.
        others = [
            self.subjects[field] for field in np.flatnonzero(now.suite.open_subjects[:fields]) if field != subject
        ]
        causes = others if is_within_classes_only(words.evidence) else earlier if 2 * len(earlier) >= fields else []
        sentence = words.sentence + note + (alert_text.misclassification_note(causes) if self.shipped.labels else "")
        evidence = words.evidence | {"site": now.tester.reference.digest, "after": earlier} | (more or {})
        return self._build_alert(before, "drift", subject, number, sentence, evidence, revision)

    def build_cleared_alert(self, state: DriftState, subject: int, sentence: str = "") -> Alert:
        """Return the end of a drift alert."""
        windows = windows_to_clear(state.window * self.shipped.window_rows)
        sentence = sentence or alert_text.drift_cleared_sentence(self.subjects[subject], windows)
        return self._build_alert(state, "drift", subject, int(state.raised_counts[subject, _DRIFT]), sentence)

    def _withdraw_misread(
        self, state: DriftState, newly_misread: Bools, z: Float64s | None
    ) -> tuple[DriftState, list[Alert]]:
        """Withdraw drifts that follow from fields (F,) that were just found to be read wrongly, by scores `z` (T,)."""
        if not newly_misread.any():
            return state, []
        recent = windows_to_clear(state.open_summary.rows)
        late = state.raised_window > state.index - recent
        # Windows between show another unit less clearly, and may raise the field's own drift long before.
        announced = ~self._has_grown(state, z) | (state.raised_window > state.index - 2 * recent)
        late[: len(newly_misread)] |= newly_misread & announced[: len(newly_misread)]
        late &= state.suite.open_subjects
        names = [self.shipped.fields[field] for field in np.flatnonzero(newly_misread)]
        out = [
            self.build_cleared_alert(state, subject, alert_text.withdrawn_sentence(self.subjects[subject], names))
            for subject in np.flatnonzero(late).tolist()
        ]
        return replace(state, suite=state.suite.reset_subjects(late)), out

    def _has_grown(self, state: DriftState, z: Float64s | None) -> Bools:
        """Return the subjects (F + 3 + H,) whose scores `z` (T,) are far larger than their drift was as published."""
        if z is None:
            return np.zeros(len(self.subjects), np.bool_)
        now = np.minimum(np.abs(np.nan_to_num(z)), MAX_SCORE)
        size = np.array([now[own].max(initial=0.0) for own in state.suite.layout.tests])
        return np.asarray(size > GROWTH * np.maximum(np.abs(state.drift_escalation.size), MIN_SCORE))

    def _build_alert(
        self,
        state: DriftState,
        alert: MonitoredAlert,
        subject: int,
        number: int,
        sentence: str,
        evidence: dict[str, Any] | None = None,
        revision: int = 1,
        kind: str = "",
    ) -> Alert:
        """Return the alert: raised if there is `evidence`, else cleared; `kind` is that of a fault."""
        name = self.subjects[subject]
        monitored, window = monitoring_kind(alert, name), {"window": state.index, "rows": list(state.rows)}
        if evidence is None:
            window |= {"fault": kind} if kind else {}
            return monitored.cleared(sentence, window, **monitored_names(name), count=number)
        built = monitored.raised(sentence, window | evidence, **monitored_names(name), count=number)
        return replace(built, revision=revision)


def is_within_classes_only(evidence: dict[str, Any]) -> bool:
    """Return True if rows of the same class changed, but all rows together less than half as much."""
    if "overall_shift" not in evidence:
        return False
    if evidence["test"] == "spread":
        within, overall = np.log(evidence["ratio"]), np.log(evidence["overall_ratio"])
    else:
        within, overall = evidence["shift"], evidence["overall_shift"]
    return bool(overall * np.sign(within) < abs(within) / 2)


def _with_effects(cusum: Cusum, effect: Float64s) -> Cusum:
    """Return the CUSUMs with the effect (T,) of the newest windows in place of the mean since the change began.

    The first window counts half, as `Alarm.mean_effect` expects.
    """
    return replace(cusum, effect=(cusum.windows - 0.5) * effect)
