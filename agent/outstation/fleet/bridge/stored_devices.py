"""Stored devices: the source of the bridge at the collector, which reads what any collector has verified and stored.

It reads beside the collector, with a connection of its own. A poll reads one line of each device, then the newest
messages of those that sent some: it costs the same whatever the database holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from outstation.fleet.database.dashboard import messages
from outstation.fleet.database.dashboard.messages import DeviceProgress
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents.incidents import IncidentFilter, list_incidents, load_incident
from outstation.foundation import clock
from outstation.integrations.homeassistant.device_state import DeviceReport
from outstation.protocol.alerts.incident import Incident
from outstation.protocol.wire import topics

# Of what a device sent since the last poll, most: older messages of a backlog have newer ones of the same topic.
_MAX_MESSAGES = 300
# Alerts of the collector itself come without a message of the device.
_ALERTS_INTERVAL_S = 20.0
_MAX_ALERTS = 10_000


class StoredDevices:
    """Implements `outstation.integrations.homeassistant.device_state.DeviceSource`."""

    def __init__(self, location: Path | str, *, every_message: bool = False) -> None:
        """Open the database. `every_message`: report each message that comes after the first poll, not the newest ones.

        Raises StorageError, UsageError.
        """
        self._every_message = every_message
        self._store = FleetStore(location, read_only=True)
        self._progress: dict[str, DeviceProgress] = {}
        self._alerts: dict[str, dict[str, Incident]] = {}
        self._incidents: dict[str, Incident] = {}
        self._next_alerts_s = 0.0
        self.devices: frozenset[str] = frozenset()

    def poll(self) -> list[DeviceReport]:
        with self._store.snapshot() as db:
            listed = {each.device: each for each in messages.load_progress(db) if each.is_active}
        self.devices = frozenset(listed)
        changed = {device: each for device, each in listed.items() if self._progress.get(device) != each}
        changed = {device: each for device, each in changed.items() if each.connection or each.log}
        payloads: dict[str, Sequence[bytes]] = {}
        has_alerts = False
        for device, progress in changed.items():
            before = self._progress.get(device)
            if self._every_message and before is not None and progress.log is not None:
                payloads[device], listed[device] = self._load_next(progress, before)
                has_alerts |= any(b'"kind":"alerts"' in payload for payload in payloads[device])
                continue
            newest = self._load_newest(progress, before)
            has_alerts |= any(topics.parse(topic).kind == "alerts" for topic in newest)
            payloads[device] = [*newest.values()]
        alerts, cleared = self._alerts, dict[str, dict[str, Incident]]()
        if has_alerts or time.monotonic() >= self._next_alerts_s:
            alerts, cleared = self._load_alerts()
        reported = {device for device in listed if self._alerts.get(device) != alerts.get(device)} | payloads.keys()
        reports = []
        for device in sorted(reported):
            connection, log = listed[device].connection, listed[device].log
            if connection is not None or log is not None:
                news = (payloads.get(device, ()), alerts.get(device, {}), cleared.get(device, {}))
                reports.append(DeviceReport(device, connection or "offline", *news))
        self._progress, self._alerts = listed, alerts
        return reports

    def close(self) -> None:
        self._store.close()

    def _load_newest(self, progress: DeviceProgress, before: DeviceProgress | None) -> dict[str, bytes]:
        if progress.log is None:
            return {}
        after = before.last_seq if before is not None and before.log == progress.log else 0
        with self._store.snapshot() as db:
            return messages.load_newest_by_topic(db, progress.device, progress.log, after, _MAX_MESSAGES)

    def _load_next(self, progress: DeviceProgress, before: DeviceProgress) -> tuple[list[bytes], DeviceProgress]:
        """Return the next messages, and the progress up to them; the next poll continues there."""
        assert progress.log is not None
        # All of a new log is new.
        after = before.last_seq if before.log == progress.log else 0
        with self._store.snapshot() as db:
            loaded = messages.load_messages(db, progress.device, progress.log, after, _MAX_MESSAGES)
        reached = replace(progress, last_seq=max(loaded)) if len(loaded) == _MAX_MESSAGES else progress
        return [*loaded.values()], reached

    def _load_alerts(self) -> tuple[dict[str, dict[str, Incident]], dict[str, dict[str, Incident]]]:
        """Return the open alerts of each device that nobody muted, oldest first, and those cleared since."""
        self._next_alerts_s = time.monotonic() + _ALERTS_INTERVAL_S
        now = clock.now_rfc3339()
        with self._store.snapshot():
            listed = list_incidents(self._store, IncidentFilter(open=True), now=now, limit=_MAX_ALERTS)
            incidents = {_key(incident): incident for incident in listed if incident.status != "muted"}
            closed = self._incidents.keys() - incidents.keys()
            ends = {key: load_incident(self._store, self._incidents[key].key, now=now) for key in closed}
        alerts: dict[str, dict[str, Incident]] = {}
        cleared: dict[str, dict[str, Incident]] = {}
        for key, incident in incidents.items():
            alerts.setdefault(incident.device, {})[key] = incident
        for key, end in ends.items():
            # Raised again, muted or pruned are no end.
            if end is not None and end.status == "cleared" and _key(end) == key:
                cleared.setdefault(end.device, {})[key] = end
        self._incidents = incidents
        return alerts, cleared


def _key(incident: Incident) -> str:
    return f"{incident.ref}.{incident.raised_seq}"
