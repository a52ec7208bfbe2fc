"""Incidents: alerts from raising to clearing message. The worst stay; all are counted."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from outstation.evidence.format.contents import WRITE_LIMITS, IncidentRecord, MessageRef
from outstation.foundation import clock
from outstation.protocol.alerts.alert import SEVERITY_RANK
from outstation.protocol.wire.messages import AlertPayload, Severity

_STATE_RANK = {"open": 0, "unknown": 1, "closed": 2}
_CLOCK_STATES = ("synced", "restored", "unsynced")


class IncidentCollector(msgspec.Struct):
    """Worst incidents of the fleet. Messages arrive ordered by device, log and seq.

    `newest_logs` is device → newest log; an alert can be open in that log only. `counts` is (severity, state) → number
    of all incidents, including those that are omitted.
    """

    as_of_us: int
    newest_logs: dict[str, str]
    counts: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    kinds: Counter[str] = msgspec.field(default_factory=Counter)
    omitted: int = 0
    _open: dict[str, IncidentRecord] = msgspec.field(default_factory=dict)
    _current_log: tuple[str, str] = ("", "")
    _worst: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    _sequence: int = 0

    def add(self, body: AlertPayload) -> None:
        if (body.device, body.log) != self._current_log:
            self._close_log()
            self._current_log = (body.device, body.log)
        message = MessageRef(body.device, body.log, body.seq)
        known = self._open.get(body.id)
        if body.state == "raised" and known is None:
            if len(self._open) >= WRITE_LIMITS.open_alerts:
                self._store(self._open.pop(next(iter(self._open))))
            self._open[body.id] = _incident_from_alert(body, message)
        elif body.state == "raised" and known is not None:
            # Raised again with newer numbers: the start stays.
            severity = max(known.severity, body.severity, key=lambda name: SEVERITY_RANK[name])
            self._open[body.id] = msgspec.structs.replace(known, severity=severity)
        elif known is not None:
            clock_state = max(known.clock, body.clock, key=_CLOCK_STATES.index)
            self._store(_close_incident(self._open.pop(body.id), body.time, clock_state, message))

    def add_collector_alerts(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add alerts that the collector raised or cleared itself, oldest first."""
        self._close_log()
        open_alerts: dict[tuple[str, str], IncidentRecord] = {}
        for row in rows:
            key = (row["device"], row["id"])
            if row["state"] == "cleared":
                if (known := open_alerts.pop(key, None)) is not None:
                    self._store(_close_incident(known, row["time"], "synced", None))
                continue
            if key not in open_alerts and len(open_alerts) >= WRITE_LIMITS.open_alerts:
                self._store(open_alerts.pop(next(iter(open_alerts))))
            open_alerts[key] = _incident_from_row(row)
        for incident in open_alerts.values():
            self._store(incident)

    def sort_by_severity(self) -> list[IncidentRecord]:
        """Return the incidents: open before closed, then by severity, then longest first."""
        self._close_log()
        return [entry[-1] for entry in sorted(self._worst, reverse=True)]

    def _close_log(self) -> None:
        device, log = self._current_log
        state = "open" if self.newest_logs.get(device) == log else "unknown"
        for incident in self._open.values():
            self._store(msgspec.structs.replace(incident, state=state))
        self._open.clear()

    def _store(self, incident: IncidentRecord) -> None:
        if incident.seconds is None and incident.state == "open":
            incident = msgspec.structs.replace(incident, seconds=_seconds_between(incident.started, self.as_of_us))
        self.counts[incident.severity, incident.state] += 1
        self.kinds[incident.alert] += 1
        self._sequence += 1
        # The sequence number is unique, so incidents themselves are never compared.
        entry = (
            -_STATE_RANK[incident.state],
            SEVERITY_RANK[incident.severity],
            incident.seconds or 0.0,
            -self._sequence,
            incident,
        )
        if len(self._worst) < WRITE_LIMITS.incidents:
            heapq.heappush(self._worst, entry)
            return
        heapq.heappushpop(self._worst, entry)
        self.omitted += 1


def _incident_from_alert(body: AlertPayload, message: MessageRef) -> IncidentRecord:
    return IncidentRecord(
        device=body.device,
        task=body.task,
        alert=body.alert,
        subject=body.subject,
        severity=body.severity,
        summary=body.summary,
        state="open",
        started=body.time,
        ended=None,
        seconds=None,
        clock=body.clock,
        source="device",
        raised=message,
    )


def _incident_from_row(row: dict[str, Any]) -> IncidentRecord:
    severity: Severity = row["severity"] if row["severity"] in SEVERITY_RANK else "warning"
    return IncidentRecord(
        device=row["device"],
        task=row["task"],
        alert=row["alert"],
        subject=row["subject"],
        severity=severity,
        summary=row["summary"],
        state="open",
        started=row["time"],
        ended=None,
        seconds=None,
        clock="synced",
        source="collector",
    )


def _close_incident(
    incident: IncidentRecord, time: str, clock_state: Any, message: MessageRef | None
) -> IncidentRecord:
    seconds = _seconds_between(incident.started, clock.parse_rfc3339(time))
    changes = {"state": "closed", "ended": time, "seconds": seconds, "clock": clock_state, "cleared": message}
    return msgspec.structs.replace(incident, **changes)


def _seconds_between(start: str, end_us: int) -> float | None:
    """Return the seconds, None if the clock was set back in between so that the end precedes the start."""
    try:
        seconds = (end_us - clock.parse_rfc3339(start)) / 1e6
    except ValueError:
        return None
    return round(seconds, 1) if seconds >= 0 else None
