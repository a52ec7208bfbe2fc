"""Statements on the present state of devices: last message, newest health message, recent drift windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from outstation.fleet.database.alerts import add_alerts, collector_alert_row
from outstation.fleet.database.interface import Connection, Row
from outstation.protocol.alerts.alert import Alert

# The newest log of a device is its first live one. The newest health message of each, by index health_messages.
_STATUS = """
    SELECT k.device, k.enrolled, k.state, k.last_seen, k.active, k.log, m.payload, m.received
    FROM (
        SELECT d.device, coalesce((SELECT max(added) FROM keys WHERE device = d.device), d.enrolled) AS enrolled,
               d.state, d.last_seen, l.log,
               EXISTS (SELECT 1 FROM keys WHERE device = d.device AND revoked IS NULL AND last_seq IS NULL)
                   AND NOT EXISTS (SELECT 1 FROM retired_devices r WHERE r.device = d.device) AS active,
               (SELECT max(seq) FROM messages h WHERE h.device = d.device AND h.log = l.log AND h.kind = 'health')
                   AS seq
        FROM devices d
        LEFT JOIN logs l ON l.device = d.device
            AND l.rowid = (SELECT min(rowid) FROM logs n WHERE n.device = d.device AND n.live)) k
    LEFT JOIN messages m ON m.device = k.device AND m.log = k.log AND m.seq = k.seq
    ORDER BY k.device
"""
_HEALTH = """
    SELECT payload, received FROM messages WHERE device = ? AND log = ? AND kind = 'health' ORDER BY seq DESC LIMIT ?
"""
_OPEN_ALERTS = """
    SELECT device, alert, subject, severity, id, summary, revision FROM incidents
    WHERE state = 'raised' AND source = 'collector'
"""
_LAST_SEQ = "SELECT max(seq) FROM incidents WHERE device = ? AND log = ? AND source = 'collector'"


class DeviceStatus(msgspec.Struct, frozen=True):
    """A device as the collector knows it: `state` and `last_seen` are None before the first message.

    `enrolled`: when its newest key was.
    `is_active`: it has a key that may sign, and nobody retired it.
    `health`: payload of the newest health message of its newest log, and when it arrived; None before the first.
    """

    device: str
    enrolled: str
    state: str | None
    last_seen: str | None
    is_active: bool
    log: str | None
    health: bytes | None
    received: str | None


def load_status(db: Connection) -> list[DeviceStatus]:
    """Return the status of every enrolled device."""
    rows = db.execute(_STATUS).fetchall()
    return [
        DeviceStatus(
            *(device, enrolled, state, seen, bool(active), log), None if payload is None else bytes(payload), received
        )
        for device, enrolled, state, seen, active, log, payload, received in rows
        if isinstance(device, str)
    ]


def load_health(db: Connection, device: str, log: str, limit: int) -> list[tuple[bytes, str]]:
    """Return (payload, received) of the newest health messages of a log, newest first."""
    return [(bytes(payload), received) for payload, received in db.execute(_HEALTH, (device, log, limit))]


def load_open_alerts(db: Connection) -> list[tuple[str, Alert]]:
    """Return device and alert of each open alert that the collector raised."""
    return [
        (device, Alert(alert, subject, "raised", severity, identity, summary, {}, revision))
        for device, alert, subject, severity, identity, summary, revision in db.execute(_OPEN_ALERTS)
    ]


def add_collector_alerts(db: Connection, alerts: Iterable[Sequence[object]], now: str, second: int) -> None:
    """Add messages (device, task, alert, log name) of the collector; `second` since 1970 orders those of one log."""
    for device, task, alert, log in alerts:
        last = db.execute(_LAST_SEQ, (device, log)).fetchone()[0]
        seq = second if last is None else max(second, last + 1)
        row: Row = collector_alert_row(device, task, alert, log, seq, now)  # type: ignore[arg-type]
        add_alerts(db, [row])
