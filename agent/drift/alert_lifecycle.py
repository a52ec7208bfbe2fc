"""Alert lifecycle: alerts that a closed drift window raises and clears, one open alert per subject and kind.

- A fault clears after three windows without one.
- A drift that was raised in the last windows before a field turns out to be read wrongly followed from that. Its alert
  is withdrawn, and what was gathered on it is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from agent.alerts import Alert, MonitoredAlert, monitoring_kind
from agent.arrays import Bools, Float64s, Ints
from agent.drift.baseline.reference import Reference
from agent.drift.detectors.cusum import WINDOWS_TO_CLEAR
from agent.drift.detectors.detector import JOINT, OUTPUT, SCORE
from agent.drift.faults.faults import MISREAD_FAULTS, Fault
from agent.drift.reporting import alert_text
from agent.drift.reporting import drift_alerts as drifts
from agent.drift.state import DriftState
from agent.drift.testing.test_suite import DriftTester

_DRIFT, _FAULT = 0, 1


class AlertLifecycle:
    """Alerts of one task. Subjects are the fields, in these `units`, then output, score and joint."""

    def __init__(self, shipped: Reference, units: Sequence[str]) -> None:
        self.shipped, self.units = shipped, units
        self.subjects = (*shipped.fields, OUTPUT, SCORE, JOINT)

    def update_faults(self, state: DriftState, faults: tuple[Fault | None, ...]) -> tuple[DriftState, list[Alert]]:
        now = np.array([fault is not None for fault in faults])
        if not (now.any() or state.faulty.any()):
            return state, []
        clear_count = np.where(state.faulty & ~now, state.clear_count + 1, 0)
        faulty = (state.faulty | now) & (clear_count < WINDOWS_TO_CLEAR)
        raised = state.raised_counts.copy()
        raised[: len(faults), _FAULT] += now & ~state.faulty
        misread = np.array([fault is not None and fault.name in MISREAD_FAULTS for fault in faults])
        after, out = self._withdraw_misread(state, misread & ~state.misread)
        for field in np.flatnonzero(faulty != state.faulty).tolist():
            fault = faults[field]
            if fault is not None:
                sentence = alert_text.fault_sentence(
                    self.shipped.fields[field], fault, field, state.open_summary, self.shipped
                )
                evidence = {"fault": fault.name} | ({"detail": fault.detail} if fault.detail else {})
                out.append(self._build_alert(state, "fault", field, raised, sentence, evidence))
            else:
                out.append(self.build_cleared_alert(state, "fault", field))
        misread = (state.misread | misread) & faulty
        return replace(after, faulty=faulty, misread=misread, clear_count=clear_count, raised_counts=raised), out

    def update_drifts(
        self, before: DriftState, after: DriftState, effects: Float64s, tester: DriftTester
    ) -> tuple[DriftState, list[Alert]]:
        """Return the state `after` the window with its drift alerts; `effects` (T,) are those of its tests."""
        fields = len(self.shipped.fields)
        was, is_now = before.suite.open_subjects, after.suite.open_subjects
        if (was == is_now).all():
            return after, []
        raised, raised_in = after.raised_counts.copy(), np.where(is_now & ~was, before.index, after.raised_window)
        raised[:, _DRIFT] += is_now & ~was
        earlier = [self.subjects[subject] for subject in np.flatnonzero(was[:fields])]
        now = drifts.AlarmContext(after.suite, tester, before.open_summary, effects, before.t)
        out = []
        for subject in np.flatnonzero(was != is_now).tolist():
            if is_now[subject]:
                words = drifts.build_text(subject, now, self.units, self.shipped)
                # While most fields are sound they give the class, so another drift stands by itself.
                follows = bool(self.shipped.labels) and 2 * len(earlier) >= fields
                sentence = words.sentence + (alert_text.misclassification_note(earlier) if follows else "")
                evidence = words.evidence | {"site": tester.reference.digest, "after": earlier}
                out.append(self._build_alert(before, "drift", subject, raised, sentence, evidence))
            else:
                out.append(self.build_cleared_alert(before, "drift", subject))
        return replace(after, raised_counts=raised, raised_window=raised_in), out

    def build_cleared_alert(self, state: DriftState, kind: MonitoredAlert, subject: int, sentence: str = "") -> Alert:
        name = self.subjects[subject]
        sentence = sentence or alert_text.cleared_sentence(name, kind)
        return self._build_alert(state, kind, subject, state.raised_counts, sentence)

    def _withdraw_misread(self, state: DriftState, newly_misread: Bools) -> tuple[DriftState, list[Alert]]:
        """Withdraw drifts that follow from fields (F,) that were just found to be read wrongly."""
        if not newly_misread.any():
            return state, []
        late = state.suite.open_subjects & (state.raised_window > state.index - WINDOWS_TO_CLEAR)
        names = [self.shipped.fields[field] for field in np.flatnonzero(newly_misread)]
        out = [
            self.build_cleared_alert(
                state, "drift", subject, alert_text.withdrawn_sentence(self.subjects[subject], names)
            )
            for subject in np.flatnonzero(late).tolist()
        ]
        return replace(state, suite=state.suite.reset_subjects(late)), out

    def _build_alert(
        self,
        state: DriftState,
        alert: MonitoredAlert,
        subject: int,
        raised_counts: Ints,
        sentence: str,
        evidence: dict[str, Any] | None = None,
    ) -> Alert:
        """Return the alert: raised if there is `evidence`, else cleared."""
        name, count = self.subjects[subject], raised_counts[subject, _DRIFT if alert == "drift" else _FAULT]
        kind, window = monitoring_kind(alert, name), {"window": state.index, "rows": list(state.rows)}
        if evidence is None:
            return kind.cleared(sentence, window, field=name, count=count)
        return kind.raised(sentence, window | evidence, field=name, count=count)
