"""Statements on table samples: readings that devices sealed to the collectors, around results."""

from __future__ import annotations

from typing import Any

import msgspec

from outstation.fleet.database.dashboard import devices
from outstation.fleet.database.store import FleetStore

COLUMNS = """s.device, s.task, s.stream, s.reason, s.subject, s.row, s.rows_first, s.rows_last, s.digits, s.model,
    s.version, s.digest, s.time, s.log, s.seq"""
# The beginning of a sealed content names the key (`outstation.protocol.transport.sealing`).
HEAD_BYTES = 9
_NEWEST = f"""
    SELECT {COLUMNS}, length(s.sealed), substr(s.sealed, 1, {HEAD_BYTES}) FROM samples s
    WHERE s.device = ?{{}} ORDER BY s.time DESC, s.log, s.seq DESC LIMIT ?"""
_COUNTS = """
    SELECT task, reason, count(*), sum(length(sealed)), min(time), max(time) FROM samples WHERE device = ?
    GROUP BY task, reason ORDER BY task, reason"""


class Sample(msgspec.Struct, frozen=True):
    """A row of table samples, without the sealed readings."""

    device: str
    task: str
    stream: str
    reason: str
    subject: str
    row: int
    rows_first: int
    rows_last: int
    digits: int
    model: str
    version: str
    digest: str
    time: str
    log: str
    seq: int


class SampleCount(msgspec.Struct, frozen=True):
    """Samples of one task and reason."""

    task: str
    reason: str
    samples: int
    bytes: int
    first: str
    last: str


def list_newest(store: FleetStore, device: str, task: str | None, limit: int) -> list[tuple[Sample, int, bytes]]:
    """Return the newest samples, each with its size and its first HEAD_BYTES."""
    where, values = ("", (device, limit)) if task is None else (" AND s.task = ?", (device, task, limit))
    with store.snapshot() as db:
        rows = db.execute(_NEWEST.format(where), values).fetchall()
    return [(Sample(*row[:-2]), row[-2], bytes(row[-1])) for row in rows]


def count(store: FleetStore, device: str) -> list[SampleCount]:
    with store.snapshot() as db:
        return [SampleCount(*row) for row in db.execute(_COUNTS, (device,))]


def load_declaration(store: FleetStore, device: str) -> dict[str, Any] | None:
    """Return member `samples` of the newest health message in the device's newest log; None without consent."""
    with store.snapshot() as db:
        [newest] = devices.load_newest_logs(db, [device])
        health = None if newest is None else devices.load_newest_health(db, [(device, newest[0])])[0]
    if health is None:
        return None
    try:
        members = msgspec.json.decode(health[1])
    except msgspec.MsgspecError:
        return None
    declared = members.get("samples") if isinstance(members, dict) else None
    return declared if isinstance(declared, dict) else None
