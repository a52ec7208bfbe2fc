"""Incident monitor: the leader among the collectors raises and clears the collector's own alerts about devices.

It decides from stored messages alone, so a restarted collector, or another one, comes to the same alerts. Time in which
nobody collected is nobody's silence: silence counts from the start of this collector, from its last pause, and from a
step of its clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from outstation.fleet.database.incidents import device_status
from outstation.fleet.database.incidents.device_status import DeviceStatus
from outstation.fleet.database.ingest import OVER_QUOTA
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.incidents import conditions
from outstation.fleet.incidents.conditions import Certificate, Condition, DeviceView, HealthReport, find_ending
from outstation.fleet.incidents.outliers import OutlierSurvey
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.protocol.alerts.alert import SEVERITY_RANK, Alert, AlertKind
from outstation.protocol.alerts.kinds import (
    CERTIFICATE_ENDS,
    CLOCK_AT_COLLECTOR,
    OVER_QUOTA_AT_COLLECTOR,
    REFUSED_BY_COLLECTOR,
)

POLL_INTERVAL_S = 30.0
# A longer pause between two turns: the collector was suspended, or had no broker or database.
MAX_PAUSE_S = 30.0
MAX_CLOCK_STEP_S = 5.0
_MAX_STORED_AHEAD_US = 86_400_000_000
CERTIFICATE_INTERVAL_S = 6 * 3600.0
# From this number of devices on, one clock that differs from most is more likely the collector's.
MIN_CLOCKS = 3
REFUSALS_OVER_US = 3_600_000_000
_REFUSALS = (REFUSED_BY_COLLECTOR, OVER_QUOTA_AT_COLLECTOR)

AlertKey = tuple[str, str]  # (device, id)
Findings = tuple[AlertKind, Mapping[AlertKey, Condition]]


class IncidentMonitor:
    """`poll` it often: it does its work each half minute, and a small slice of the outlier survey each time."""

    def __init__(self, store: FleetStore, certificates: Callable[[], Iterable[Certificate]] = lambda: ()) -> None:
        self._store, self._certificates = store, certificates
        self._survey = OutlierSurvey(store)
        self._open: dict[AlertKey, Alert] | None = None
        self._watching_since_s = self._last_turn_s = float("-inf")
        self._offset_us = 0
        self._next_s = self._next_certificates_s = 0.0

    def reset(self) -> None:
        """Forget what is open: another collector may have been the leader meanwhile."""
        self._open = None

    def is_open(self, kind: AlertKind, device: str) -> bool:
        """Return True if an alert of a kind is open for a device. Raises StorageError."""
        return any(name == device and is_of_kind(kind, identity) for name, identity in self._load_open())

    def watch(self, now: ClockReading) -> None:
        """Note that this collector collects, leader or not; call it with every turn."""
        stepped = abs(now.offset_us - self._offset_us) > MAX_CLOCK_STEP_S * 1e6
        if now.boot_s - self._last_turn_s > MAX_PAUSE_S or stepped:
            self._watching_since_s = now.boot_s
        self._last_turn_s, self._offset_us = now.boot_s, now.offset_us

    def poll(self, now: ClockReading) -> list[str]:
        """Raise and clear alerts that are due; return the summaries of those raised. Raises StorageError."""
        findings: list[Findings] = []
        self._load_open()
        if (outliers := self._survey.step(now)) is not None:
            findings.append((OutlierSurvey.kind, _by_key(outliers)))
        is_reading_certificates = now.boot_s >= self._next_certificates_s
        if is_reading_certificates:
            # Until it is stored, soon again.
            self._next_certificates_s = now.boot_s + POLL_INTERVAL_S
            ending = find_ending(self._certificates(), now.wall_us)
            findings.append((CERTIFICATE_ENDS, _by_key(ending)))
        if now.boot_s >= self._next_s:
            self._next_s = now.boot_s + POLL_INTERVAL_S
            findings += [*self._check_devices(now), *self._check_refusals(now)]
        raised = self._apply(findings, now) if findings else []
        if outliers is not None:
            self._survey.mark_stored()
        if is_reading_certificates:
            self._next_certificates_s = now.boot_s + CERTIFICATE_INTERVAL_S
        return raised

    def _load_open(self) -> dict[AlertKey, Alert]:
        if self._open is None:
            with self._store.snapshot() as db:
                self._open = {(device, alert.id): alert for device, alert in device_status.load_open_alerts(db)}
        return self._open

    def _check_refusals(self, now: ClockReading) -> list[Findings]:
        """Keep open the alarms that last; `outstation.fleet.collector.refusal_alarm` decides what is raised."""
        opened = {key: kind for kind in _REFUSALS for key in self._load_open() if is_of_kind(kind, key[1])}
        if not opened:
            return []
        since = clock.to_rfc3339(now.wall_us - REFUSALS_OVER_US)
        recent = {
            (row["device"], (OVER_QUOTA_AT_COLLECTOR if row["reason"] == OVER_QUOTA else REFUSED_BY_COLLECTOR).id)
            for row in self._store.refusals()
            if row["last"] > since
        }
        held = {key: kind for key, kind in opened.items() if (key[0], kind.id) in recent}
        return [
            (kind, {key: Condition(kind, key[0], "", "critical") for key in held if held[key] is kind})
            for kind in _REFUSALS
        ]

    def _check_devices(self, now: ClockReading) -> list[Findings]:
        opened = self._load_open()
        with self._store.snapshot() as db:
            views = [self._view(db, status, now) for status in device_status.load_status(db)]
        findings: list[Findings] = []
        for kind, check in conditions.CHECKS:
            states = ((view, (view.device, kind.id) in opened) for view in views if view.status.is_active)
            held = [condition for view, is_open in states if (condition := check(view, is_open=is_open)) is not None]
            if kind is CLOCK_AT_COLLECTOR:
                held = _blame_own_clock(held, sum(view.newest is not None for view in views))
            findings.append((kind, _by_key(held)))
        return findings

    def _view(self, db: Connection, status: DeviceStatus, now: ClockReading) -> DeviceView:
        health: list[HealthReport] = []
        if status.health is not None and status.received is not None:
            newest = conditions.parse_health(status.health, status.received)
            health = [newest] if newest is not None else []
            if newest is not None and conditions.needs_history(newest) and status.log is not None:
                stored = device_status.load_health(db, status.device, status.log, conditions.BACKLOG_MESSAGES)
                health = [report for each in stored if (report := conditions.parse_health(*each)) is not None]
        watched_s = now.boot_s - self._watching_since_s
        stored_us = clock.parse_rfc3339(status.last_seen or status.enrolled)
        silence_us = now.wall_us - stored_us
        # A time that a collector without a set clock stored, or one whose clock was far ahead, tells nothing.
        is_known = silence_us >= -_MAX_STORED_AHEAD_US and not stored_us < clock.BUILD_FLOOR_US <= now.wall_us
        return DeviceView(status, health, silence_us / 1e6 if is_known else None, watched_s)

    def _apply(self, findings: list[Findings], now: ClockReading) -> list[str]:
        """Raise what is new or worse, and clear the open alerts of each kind whose condition is over."""
        opened = self._load_open()
        changes: list[tuple[str, str | None, Alert, str]] = []
        became, raised = dict(opened), []
        for kind, held in findings:
            for key, condition in held.items():
                known = opened.get(key)
                if known is not None and SEVERITY_RANK[condition.severity] <= SEVERITY_RANK[known.severity]:
                    continue
                alert = replace(
                    kind.raised(condition.summary, None, **condition.names),
                    severity=condition.severity,
                    revision=1 if known is None else known.revision + 1,
                )
                changes.append((condition.device, condition.task, alert, log_name(alert)))
                became[key] = alert
                raised.append(condition.summary)
            for key in [key for key in opened if key not in held and is_of_kind(kind, key[1])]:
                alert = _build_cleared(kind, *key)
                changes.append((key[0], None, alert, log_name(alert)))
                del became[key]
        if changes:
            time, second = clock.to_rfc3339(now.wall_us), now.wall_us // 1_000_000
            with self._store.transaction() as db:
                device_status.add_collector_alerts(db, changes, time, second)
        self._open = became
        return raised


def log_name(alert: Alert) -> str:
    """Return what stands for a log in an alert of the collector, which is in no log of a device."""
    return alert.id.removeprefix("collector/")


def is_of_kind(kind: AlertKind, identity: str) -> bool:
    """Return True if an id belongs to a kind, by the part before the first name in braces."""
    fixed = kind.id.partition("{")[0]
    return identity == kind.id or (fixed != kind.id and identity.startswith(fixed))


def _build_cleared(kind: AlertKind, device: str, identity: str) -> Alert:
    subject = identity.rpartition("/")[2] if "{" in kind.subject else kind.subject
    summary = f"{kind.title}: over, for {device or 'the fleet'}."
    return Alert(kind.alert, subject, "cleared", "info", identity, summary, {})


def _by_key(held: Iterable[Condition]) -> dict[AlertKey, Condition]:
    return {(each.device, each.kind.raised("", None, **each.names).id): each for each in held}


def _blame_own_clock(held: list[Condition], clocks: int) -> list[Condition]:
    """Return one condition of the collector where most clocks contradict it."""
    if len(held) < MIN_CLOCKS or 2 * len(held) <= clocks:
        return held
    summary = (
        f"The clocks of {len(held)} of {clocks} devices contradict the collector's: most likely the collector's own "
        f"clock is wrong. {held[0].summary}"
    )
    return [Condition(CLOCK_AT_COLLECTOR, "", summary, "critical")]
