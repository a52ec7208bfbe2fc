"""Statements on single messages, the newest ones of a device, their keys, gaps and refusals."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.fleet.database.interface import Connection, Row, fetch_dicts

MESSAGE = """
    SELECT device, log, seq, kind, topic, payload, jws, received FROM messages
    WHERE device = ? AND log = ? AND seq = ?"""
NEIGHBOURS = """
    SELECT seq, kind, payload, received FROM messages WHERE device = ? AND log = ? AND seq >= ? AND seq <= ?
    ORDER BY seq"""
NEWEST_MESSAGES = """
    SELECT seq, kind, received FROM messages WHERE device = ? AND log = ? ORDER BY seq DESC LIMIT ?"""
KEY = "SELECT kid, device, key, added, revoked, log, last_seq, made_by FROM keys WHERE kid = ?"
KEYS = "SELECT kid, added, revoked, log, last_seq, made_by FROM keys WHERE device = ? ORDER BY added"
GAPS = "SELECT device, log, first, last, declared FROM gaps WHERE device = ? ORDER BY log, first LIMIT ?"
ALL_GAPS = "SELECT device, log, first, last, declared FROM gaps ORDER BY device, log, first LIMIT ?"
REFUSALS = "SELECT device, reason, count, first, last FROM refusals ORDER BY last DESC LIMIT ?"
MISSING = "SELECT declared, CAST(sum(last - first + 1) AS BIGINT) FROM gaps GROUP BY declared"
LOGS = "SELECT log, last_seq, since, latest, live FROM logs WHERE device = ? ORDER BY rowid DESC LIMIT ?"
TOTALS = "SELECT count(*), CAST(coalesce(sum(last_seq), 0) AS BIGINT), max(latest) FROM logs"


def load_message(db: Connection, device: str, log: str, seq: int) -> dict[str, Any] | None:
    rows = fetch_dicts(db, MESSAGE, device, log, seq)
    return {**rows[0], "payload": to_bytes(rows[0]["payload"])} if rows else None


def load_payload(db: Connection, device: str, log: str, seq: int) -> bytes | None:
    sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
    (payload,) = db.execute(sql, (device, log, seq)).fetchone() or (None,)
    return None if payload is None else to_bytes(payload)


def load_neighbours(db: Connection, device: str, log: str, first: int, last: int) -> list[Row]:
    """Return (seq, kind, payload, received) of the stored messages with these sequence numbers."""
    rows = db.execute(NEIGHBOURS, (device, log, first, last)).fetchall()
    return [(seq, kind, to_bytes(payload), received) for seq, kind, payload, received in rows]


def load_newest_messages(db: Connection, device: str, log: str, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, NEWEST_MESSAGES, device, log, limit)


def load_key(db: Connection, kid: str) -> dict[str, Any] | None:
    rows = fetch_dicts(db, KEY, kid)
    return rows[0] if rows else None


def load_keys(db: Connection, device: str) -> list[dict[str, Any]]:
    return fetch_dicts(db, KEYS, device)


def load_gaps(db: Connection, device: str | None, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, ALL_GAPS, limit) if device is None else fetch_dicts(db, GAPS, device, limit)


def load_refusals(db: Connection, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, REFUSALS, limit)


def load_logs(db: Connection, device: str, limit: int) -> list[dict[str, Any]]:
    return fetch_dicts(db, LOGS, device, limit)


def load_totals(db: Connection) -> tuple[int, int, str | None]:
    """Return the number of logs, the highest sequence numbers added up, and when the last message arrived."""
    logs, seqs, arrived = db.execute(TOTALS).fetchone()
    return int(logs), int(seqs), arrived


def count_missing(db: Connection) -> dict[str, int]:
    """Return how many messages are missing, and how many a device declared as evicted."""
    sums = dict(db.execute(MISSING).fetchall())
    return {"missing": int(sums.get(False, 0)), "evicted": int(sums.get(True, 0))}


def to_bytes(payload: Any) -> bytes:
    """Return a payload as bytes, also of a cell that was changed to another type."""
    return payload if isinstance(payload, bytes) else str(payload).encode(errors="replace")


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
