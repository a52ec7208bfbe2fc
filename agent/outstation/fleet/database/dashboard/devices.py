"""Statements on the present state of devices. Each reads a few rows by an index, however long the history is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from outstation.fleet.database.alerts import OPEN_ALERTS
from outstation.fleet.database.dashboard.messages import to_bytes
from outstation.fleet.database.interface import Connection, Row, fetch_dicts

HEADS = """
    SELECT device, state, last_seen, enrolled FROM devices
    WHERE device NOT IN (SELECT device FROM retired_devices) ORDER BY device"""
ACTIVE_KEYS = "SELECT DISTINCT device FROM keys WHERE revoked IS NULL AND last_seq IS NULL"
NEWEST_LOG = "SELECT log, last_seq, latest FROM logs WHERE device = ? AND live ORDER BY rowid LIMIT 1"
NEWEST_HEALTH = """
    SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND kind = 'health' ORDER BY seq DESC LIMIT 1"""
NEWEST_WINDOW = """
    SELECT state, "to", log, seq FROM drift_windows WHERE task = ? AND device = ? ORDER BY "to" DESC LIMIT 1"""
NEWEST_QUALITY = "SELECT seq FROM quality_messages WHERE device = ? AND log = ? ORDER BY seq DESC LIMIT 1"
NEWEST_CLOCK = "SELECT quality, seq FROM anchors WHERE device = ? AND log = ? ORDER BY seq DESC LIMIT 1"
DEVICE_ALERTS = f"""
    SELECT alert, subject, severity, summary, time, id, task, log, seq, source
    FROM ({OPEN_ALERTS}) open_alerts WHERE device = ? AND source = 'device' ORDER BY time DESC"""
COLLECTOR_ALERTS = f"""
    SELECT device, alert, subject, severity, summary, time, id, task, log, seq, source
    FROM ({OPEN_ALERTS}) open_alerts WHERE source = 'collector' ORDER BY time DESC LIMIT 1000"""
HEALTH_HISTORY = """
    SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND kind = 'health' ORDER BY seq DESC LIMIT ?"""


def load_heads(db: Connection) -> list[Row]:
    """Return (device, state, last seen, enrolled) of every device."""
    return db.execute(HEADS).fetchall()


def load_active(db: Connection) -> set[str]:
    """Return the devices with a key that may sign."""
    return {device for (device,) in db.execute(ACTIVE_KEYS)}


def load_newest_logs(db: Connection, devices: Sequence[str]) -> list[Row | None]:
    """Return (log, last seq, latest arrival) of the newest log of each device."""
    return db.execute_each(NEWEST_LOG, [(device,) for device in devices])


def load_newest_health(db: Connection, logs: Iterable[tuple[str, str]]) -> list[Row | None]:
    """Return (seq, payload) of the newest health message of each (device, log)."""
    rows = db.execute_each(NEWEST_HEALTH, [*logs])
    healths: list[Row | None] = []
    for row in rows:
        seq, payload = row or (0, None)
        healths.append(None if payload is None else (seq, to_bytes(payload)))
    return healths


def load_newest_windows(db: Connection, tasks: Iterable[tuple[str, str]]) -> list[Row | None]:
    """Return (state, end, log, seq) of the newest drift window of each (task, device)."""
    return db.execute_each(NEWEST_WINDOW, [*tasks])


def load_newest_quality(db: Connection, logs: Iterable[tuple[str, str]]) -> list[Row | None]:
    """Return (seq,) of the newest quality message of each (device, log)."""
    return db.execute_each(NEWEST_QUALITY, [*logs])


def load_clocks(db: Connection, logs: Iterable[tuple[str, str]]) -> list[Row | None]:
    """Return (quality, seq) of the newest clock anchor of each (device, log)."""
    return db.execute_each(NEWEST_CLOCK, [*logs])


def load_open_alerts(db: Connection, device: str) -> list[dict[str, Any]]:
    """Return the alerts that a device raised and did not clear, newest first."""
    return fetch_dicts(db, DEVICE_ALERTS, device)


def load_collector_alerts(db: Connection) -> list[dict[str, Any]]:
    """Return the open alerts that the collector raised itself; device '' is the fleet."""
    return fetch_dicts(db, COLLECTOR_ALERTS)


def load_health_history(db: Connection, device: str, log: str, limit: int) -> list[Row]:
    """Return (seq, payload) of the newest health messages, newest first."""
    return db.execute(HEALTH_HISTORY, (device, log, limit)).fetchall()
