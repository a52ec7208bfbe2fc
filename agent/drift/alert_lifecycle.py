"""Alerts that a closed drift window raises and clears: one open alert per subject and kind.

- Faults clear after three windows without one.
- A drift that was told in the last windows before a field was found to be read wrongly followed from that: it is
  withdrawn, and what was gathered on it forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Floats, Ints
from agent.drift.baseline.reference import Reference
from agent.drift.detectors.cusum import CALM
from agent.drift.faults.faults import MISREAD, Fault
from agent.drift.reporting import alert_text
from agent.drift.reporting import drift_alerts as drifts
from agent.drift.reporting.alert_text import Alert
from agent.drift.state import State
from agent.drift.testing.test_suite import JOINT, OUTPUT, SCORE, Tester

_DRIFT, _FAULT = 0, 1


class Raising:
    """Of one task: its subjects are the fields, of these `units`, then output, score and joint."""

    def __init__(self, shipped: Reference, units: Sequence[str]) -> None:
        self.shipped, self.units = shipped, units
        self.subjects = (*shipped.fields, OUTPUT, SCORE, JOINT)

    def faults(self, state: State, found: tuple[Fault | None, ...]) -> tuple[State, list[Alert]]:
        now = np.array([fault is not None for fault in found])
        if not (now.any() or state.faulty.any()):
            return state, []
        calm = np.where(state.faulty & ~now, state.calm + 1, 0)
        faulty = (state.faulty | now) & (calm < CALM)
        raised = state.raised.copy()
        raised[: len(found), _FAULT] += now & ~state.faulty
        misread = np.array([fault is not None and fault.name in MISREAD for fault in found])
        after, out = self._withdrawn(state, misread & ~state.misread)
        for field in np.flatnonzero(faulty != state.faulty).tolist():
            fault = found[field]
            if fault is not None:
                sentence = alert_text.fault_sentence(self.shipped.fields[field], fault, field, state.open, self.shipped)
                told = {"fault": fault.name} | ({"detail": fault.detail} if fault.detail else {})
                out.append(self._alert(state, "fault", field, raised, "raised", "critical", sentence, told))
            else:
                out.append(self.cleared(state, "fault", field))
        misread = (state.misread | misread) & faulty
        return replace(after, faulty=faulty, misread=misread, calm=calm, raised=raised), out

    def drifts(self, before: State, after: State, effects: Floats, tester: Tester) -> tuple[State, list[Alert]]:
        """`after` the window; `effects` (T,) of its tests."""
        fields = len(self.shipped.fields)
        was, is_now = before.detectors.open_subjects, after.detectors.open_subjects
        if (was == is_now).all():
            return after, []
        raised, raised_in = after.raised.copy(), np.where(is_now & ~was, before.index, after.raised_in)
        raised[:, _DRIFT] += is_now & ~was
        earlier = [self.subjects[subject] for subject in np.flatnonzero(was[:fields])]
        now = drifts.Now(after.detectors, tester, before.open, effects, before.t, after.season)
        out = []
        for subject in np.flatnonzero(was != is_now).tolist():
            if is_now[subject]:
                words = drifts.of(subject, now, self.units, self.shipped)
                # While most fields are sound they tell the class; then what else drifts does so by itself.
                follows = bool(self.shipped.labels) and 2 * len(earlier) >= fields
                sentence = words.sentence + (alert_text.doubt(earlier) if follows else "")
                evidence = words.evidence | {"site": tester.site.digest, "after": earlier}
                out.append(self._alert(before, "drift", subject, raised, "raised", "warning", sentence, evidence))
            else:
                out.append(self.cleared(before, "drift", subject))
        return replace(after, raised=raised, raised_in=raised_in), out

    def cleared(self, state: State, kind: str, subject: int, sentence: str = "") -> Alert:
        name = self.subjects[subject]
        sentence = sentence or alert_text.cleared_sentence(name, kind)
        return self._alert(state, kind, subject, state.raised, "cleared", "info", sentence, {})

    def _withdrawn(self, state: State, newly: Bools) -> tuple[State, list[Alert]]:
        """Without the drifts that follow from fields (F,) that were just found to be read wrongly."""
        if not newly.any():
            return state, []
        late = state.detectors.open_subjects & (state.raised_in > state.index - CALM)
        names = [self.shipped.fields[field] for field in np.flatnonzero(newly)]
        out = [
            self.cleared(state, "drift", subject, alert_text.withdrawn_sentence(self.subjects[subject], names))
            for subject in np.flatnonzero(late).tolist()
        ]
        return replace(state, detectors=state.detectors.without(late)), out

    def _alert(
        self,
        state: State,
        kind: str,
        subject: int,
        raised: Ints,
        became: str,
        severity: str,
        sentence: str,
        evidence: dict[str, Any],
    ) -> Alert:
        name, count = self.subjects[subject], raised[subject, _DRIFT if kind == "drift" else _FAULT]
        return Alert(
            alert=kind,
            subject=name,
            state=became,
            severity=severity,
            id=f"{name}/{kind}/{count}",
            summary=sentence,
            evidence={"window": state.index, "rows": list(state.rows)} | evidence,
        )
