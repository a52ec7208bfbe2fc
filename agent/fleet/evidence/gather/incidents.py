"""Incidents: each alert from the message that raised it to the one that cleared it, the worst kept, all counted."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from agent import clock
from agent.fleet.evidence.format.contents import WRITE_LIMITS, Incident, MessageRef
from agent.wire.messages import AlertPayload, Severity

SEVERITY_RANK: dict[str, int] = {"critical": 0, "warning": 1, "info": 2}
_STATE_RANK = {"open": 0, "unknown": 1, "over": 2}
_CLOCK_STATES = ("synced", "restored", "unsynced")


class IncidentCollector(msgspec.Struct):
    """Messages come by device, log and seq. `newest`: the newest log of each device, in which alone alerts are open.

    `counts`: of (severity, state) over all, also those that are left out.
    """

    as_of_us: int
    newest_logs: dict[str, str]
    counts: Counter[tuple[str, str]] = msgspec.field(default_factory=Counter)
    kinds: Counter[str] = msgspec.field(default_factory=Counter)
    omitted: int = 0
    _open: dict[str, Incident] = msgspec.field(default_factory=dict)
    _current_log: tuple[str, str] = ("", "")
    _worst: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    _sequence: int = 0

    def add(self, body: AlertPayload) -> None:
        if (body.device, body.log) != self._current_log:
            self._close_log()
            self._current_log = (body.device, body.log)
        place = MessageRef(body.device, body.log, body.seq)
        known = self._open.get(body.id)
        if body.state == "raised" and known is None:
            if len(self._open) >= WRITE_LIMITS.open_alerts:
                self._store(self._open.pop(next(iter(self._open))))
            self._open[body.id] = _incident_from_alert(body, place)
        elif body.state == "raised" and known is not None:
            # Raised anew, with what is known now; it began when it began.
            self._open[body.id] = msgspec.structs.replace(
                known, severity=_worse_severity(known.severity, body.severity)
            )
        elif known is not None:
            self._store(_close_from_alert(self._open.pop(body.id), body, place))

    def add_collector_alerts(self, rows: Iterable[dict[str, Any]]) -> None:
        """Alerts that the collector raised or cleared itself, oldest first."""
        self._close_log()
        mine: dict[tuple[str, str], Incident] = {}
        for row in rows:
            key = (row["device"], row["id"])
            if row["state"] == "cleared":
                if (known := mine.pop(key, None)) is not None:
                    self._store(_close_incident(known, row["time"], "synced", None))
                continue
            if key not in mine and len(mine) >= WRITE_LIMITS.open_alerts:
                self._store(mine.pop(next(iter(mine))))
            mine[key] = _incident_from_row(row)
        for one in mine.values():
            self._store(one)

    def sort_by_severity(self) -> list[Incident]:
        """Open ones first, then by severity, then the longest."""
        self._close_log()
        return [entry[-1] for entry in sorted(self._worst, reverse=True)]

    def _close_log(self) -> None:
        device, log = self._current_log
        still = "open" if self.newest_logs.get(device) == log else "unknown"
        for one in self._open.values():
            self._store(msgspec.structs.replace(one, state=still))
        self._open.clear()

    def _store(self, incident: Incident) -> None:
        if incident.seconds is None and incident.state == "open":
            incident = msgspec.structs.replace(incident, seconds=_seconds_between(incident.began, self.as_of_us))
        self.counts[incident.severity, incident.state] += 1
        self.kinds[incident.alert] += 1
        self._sequence += 1
        # The last number keeps incidents from being compared.
        entry = (
            -_STATE_RANK[incident.state],
            -SEVERITY_RANK[incident.severity],
            incident.seconds or 0.0,
            -self._sequence,
            incident,
        )
        if len(self._worst) < WRITE_LIMITS.incidents:
            heapq.heappush(self._worst, entry)
            return
        heapq.heappushpop(self._worst, entry)
        self.omitted += 1


def _incident_from_alert(body: AlertPayload, message_ref: MessageRef) -> Incident:
    return Incident(
        device=body.device,
        task=body.task,
        alert=body.alert,
        subject=body.subject,
        severity=body.severity,
        summary=body.summary,
        state="open",
        began=body.time,
        ended=None,
        seconds=None,
        clock=body.clock,
        source="device",
        raised=message_ref,
    )


def _incident_from_row(row: dict[str, Any]) -> Incident:
    severity: Severity = row["severity"] if row["severity"] in SEVERITY_RANK else "warning"
    return Incident(
        device=row["device"],
        task=row["task"],
        alert=row["alert"],
        subject=row["subject"],
        severity=severity,
        summary=row["summary"],
        state="open",
        began=row["time"],
        ended=None,
        seconds=None,
        clock="synced",
        source="collector",
    )


def _close_from_alert(incident: Incident, body: AlertPayload, message_ref: MessageRef) -> Incident:
    return _close_incident(incident, body.time, max(incident.clock, body.clock, key=_CLOCK_STATES.index), message_ref)


def _close_incident(incident: Incident, time: str, clock_state: Any, message_ref: MessageRef | None) -> Incident:
    seconds = _seconds_between(incident.began, clock.parse_rfc3339(time))
    changes = {"state": "over", "ended": time, "seconds": seconds, "clock": clock_state, "cleared": message_ref}
    return msgspec.structs.replace(incident, **changes)


def _seconds_between(begin: str, end_us: int) -> float | None:
    """Seconds; None where the end lies before the beginning, because a clock was set back meanwhile."""
    try:
        seconds = (end_us - clock.parse_rfc3339(begin)) / 1e6
    except ValueError:
        return None
    return round(seconds, 1) if seconds >= 0 else None


def _worse_severity(current: str, other: str) -> str:
    return min(current, other, key=lambda severity: SEVERITY_RANK[severity])
