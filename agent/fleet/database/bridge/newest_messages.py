"""Statements on the newest messages of devices; each inside a snapshot."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import Connection

# The newest log of a device is its first live one.
_DEVICES = """
    SELECT d.device, d.state, l.log, l.last_seq, l.latest,
           EXISTS (SELECT 1 FROM keys WHERE device = d.device AND revoked IS NULL AND last_seq IS NULL) AS active
    FROM devices d
    LEFT JOIN logs l ON l.device = d.device
        AND l.rowid = (SELECT min(rowid) FROM logs n WHERE n.device = d.device AND n.live)
"""
_TOPICS = "SELECT seq, topic FROM messages WHERE device = ? AND log = ? AND seq > ? ORDER BY seq DESC LIMIT ?"

_MESSAGES = "SELECT seq, payload FROM messages WHERE device = ? AND log = ? AND seq > ? ORDER BY seq LIMIT ?"


class DeviceProgress(msgspec.Struct, frozen=True):
    """Progress of a device's newest log. `latest`: when its last message arrived; None, as `log`, before the first."""

    device: str
    connection: str | None
    log: str | None
    last_seq: int
    latest: str | None
    is_active: bool


def load_progress(db: Connection) -> list[DeviceProgress]:
    """Return the progress of every enrolled device."""
    return [
        DeviceProgress(device, state, log, last_seq or 0, latest, bool(active))
        for device, state, log, last_seq, latest, active in db.execute(_DEVICES)
        if isinstance(device, str)
    ]


def load_newest_by_topic(db: Connection, device: str, log: str, after: int, limit: int) -> dict[str, bytes]:
    """Return topic → payload of the newest message of each topic, oldest first, among the `limit` newest messages.

    Only messages with seq > `after` count. The topics alone are read first, since payloads are large.
    """
    newest: dict[str, int] = {}
    for seq, topic in db.execute(_TOPICS, (device, log, after, limit)):
        newest.setdefault(topic, seq)
    ordered = sorted(newest.items(), key=lambda entry: entry[1])
    payloads = db.payloads([(device, log, seq) for _, seq in ordered])
    return {topic: bytes(data) for (topic, _), data in zip(ordered, payloads, strict=True) if data is not None}


def load_messages(db: Connection, device: str, log: str, after: int, limit: int) -> dict[int, bytes]:
    """Return seq → payload of the next messages with seq > `after`, in order."""
    return {seq: bytes(payload) for seq, payload in db.execute(_MESSAGES, (device, log, after, limit))}
