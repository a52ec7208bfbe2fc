"""Alerts of a fleet as notifications follow them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from outstation.fleet.database.incidents import device_status, incident_rows
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import incidents
from outstation.foundation import clock, decoders
from outstation.integrations.notify.alert_source import AlertSource
from outstation.protocol.alerts.incident import Incident, IncidentKey
from outstation.protocol.alerts.kinds import TARGET_FAILS

# Two transactions of PostgreSQL may commit in another order than they numbered their rows.
OVERLAP = 500
_CHUNK = 2000
NOTIFIER_JOB = "notify"


class _Groups(msgspec.Struct, frozen=True):
    groups: tuple[str, ...] = ()


class FleetAlertSource:
    """Incidents of an open fleet database; see `outstation.integrations.notify.alert_source.AlertSource`."""

    def __init__(self, store: FleetStore, fleet: str, *, needs_groups: bool) -> None:
        self._store, self._needs_groups = store, needs_groups
        self.fleet = self.sender = fleet
        self._seen: set[int] | None = None
        self._groups: dict[str, tuple[str, ...]] = {}

    def changed(self, cursor: int | None) -> tuple[int, list[Incident]]:
        if cursor is None:
            with self._store.snapshot() as db:
                self._seen, cursor = set(), incident_rows.last_arrival(db)
            return cursor, self.open_alerts()
        with self._store.snapshot() as db:
            arrivals = incident_rows.list_arrivals(db, cursor - OVERLAP, OVERLAP + _CHUNK)
        if self._seen is None:
            # After a start: what arrived before the cursor was planned.
            self._seen = {rowid for rowid, _ in arrivals if rowid <= cursor}
        new = [(rowid, key) for rowid, key in arrivals if rowid not in self._seen]
        if not new:
            return cursor, []
        cursor = max(cursor, new[-1][0])
        self._seen = {rowid for rowid, _ in arrivals if rowid > cursor - OVERLAP}
        return cursor, [*self.load({json.dumps(key) for _, key in new}).values()]

    def load(self, keys: Iterable[str]) -> dict[str, Incident]:
        now = clock.now_rfc3339()
        loaded = (incidents.load_incident(self._store, decoders.from_json(key, IncidentKey), now=now) for key in keys)
        return {incident.key_text: self._with_groups(incident) for incident in loaded if incident is not None}

    def open_alerts(self) -> list[Incident]:
        if self._needs_groups:
            self._groups = self._load_groups()
        return [*map(self._with_groups, incidents.list_incidents(self._store, now=clock.now_rfc3339()))]

    def report_target(self, target: str, problem: str | None) -> None:
        build = TARGET_FAILS.cleared if problem is None else TARGET_FAILS.raised
        alert = build(problem or f"Notifications to {target} are accepted again.", None, target=target)
        now_us = clock.read().wall_us
        with self._store.transaction() as db:
            changes = [("", None, alert, f"notify/{target}")]
            device_status.add_collector_alerts(db, changes, clock.to_rfc3339(now_us), now_us // 1_000_000)

    def _load_groups(self) -> dict[str, tuple[str, ...]]:
        """Return the groups that each device stated in its newest health message."""
        groups = {}
        with self._store.snapshot() as db:
            for status in device_status.load_status(db):
                try:
                    groups[status.device] = decoders.from_json(status.health or b"{}", _Groups).groups
                except msgspec.MsgspecError:
                    continue
        return groups

    def _with_groups(self, incident: Incident) -> Incident:
        groups = self._groups.get(incident.device)
        return msgspec.structs.replace(incident, groups=groups) if groups else incident


@contextmanager
def open_source(location: Path | str, fleet: str, *, needs_groups: bool) -> Iterator[tuple[FleetStore, AlertSource]]:
    """Open the fleet database for the notifier's own thread."""
    with FleetStore(location) as store:
        yield store, FleetAlertSource(store, fleet, needs_groups=needs_groups)
