"""Alerts: the value, the form of a kind, and the two states of the lifecycle, raised and cleared.

This module does not decide when an alert is raised and writes none to the message log. The kinds are in
`outstation.protocol.alerts.kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

# Drift subjects of further outputs begin so, and no field does.
OUTPUT_PREFIX = "output."

MonitoredAlert = Literal["drift", "fault"]
AlertState = Literal["raised", "cleared"]
Severity = Literal["info", "warning", "critical"]
SEVERITY_RANK: Mapping[str, int] = {"info": 1, "warning": 2, "critical": 3}


class Alert(msgspec.Struct, frozen=True):
    """Alert as raised or cleared; both carry the same `id`, which identifies the occurrence.

    An alert that became worse while it was open is raised again with the next `revision`.
    """

    alert: str
    subject: str
    state: AlertState
    severity: Severity
    id: str
    summary: str
    evidence: dict[str, Any]
    revision: int = 1

    def to_body(self, task: str | None = None, **evidence: Any) -> dict[str, Any]:
        """Return the members of an `alerts` message; a task's alert has the task's name before its id."""
        return {
            "alert": self.alert,
            "subject": self.subject,
            "state": self.state,
            "severity": self.severity,
            "id": self.id if task is None else f"{task}/{self.id}",
            "summary": self.summary,
            "evidence": {**evidence, **self.evidence},
        } | ({"revision": self.revision} if self.revision > 1 else {})


class AlertKind(msgspec.Struct, frozen=True):
    """Kind of alert. `subject` and `id` are patterns: a name in braces is filled in when the alert is raised.

    `variants` explains the values that one member of the evidence takes.
    """

    title: str
    alert: str
    subject: str
    id: str
    severity: Severity
    source: Literal["task", "device", "collector"]
    meaning: str
    causes: str
    action: str
    clears: str
    variants: dict[str, str] = {}

    @property
    def is_event(self) -> bool:
        """True if it reports one event: nothing clears it."""
        return self.clears.startswith("Never")

    def raised(self, summary: str, evidence: Mapping[str, Any] | None = None, **names: object) -> Alert:
        return self._build("raised", self.severity, summary, evidence, names)

    def cleared(self, summary: str, evidence: Mapping[str, Any] | None = None, **names: object) -> Alert:
        return self._build("cleared", "info", summary, evidence, names)

    def _build(
        self,
        state: AlertState,
        severity: Severity,
        summary: str,
        evidence: Mapping[str, Any] | None,
        names: Mapping[str, object],
    ) -> Alert:
        subject, identity = self.subject.format_map(names), self.id.format_map(names)
        return Alert(self.alert, subject, state, severity, identity, summary, dict(evidence or {}))


def continue_number(number: int, used: int, *, is_open: bool) -> int:
    """Return the number of alerts so far, above all that were `used` meanwhile. An alert is open under its number.

    An open alert whose successors are in use gets a number of its own.
    """
    return number if used <= number else used + is_open
