"""Pruning: rows of the fleet database that a retention no longer covers, and their removal with a signed statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from outstation.fleet.database.alerts import OPEN_INCIDENTS, merge_incidents
from outstation.fleet.database.interface import Connection, Row, TransactionConflict
from outstation.fleet.database.schema.message_tables import ALERTS, PROJECTED, SHARED
from outstation.fleet.database.store import FleetStore

_FIRST_NEWER = "SELECT min(seq) FROM messages WHERE device = ? AND log = ? AND seq > ? AND received >= ?"
_FIRST_GAP = "SELECT min(first) FROM gaps WHERE device = ? AND log = ? AND NOT declared"
_LAST_BEFORE = "SELECT max(seq), count(*) FROM messages WHERE device = ? AND log = ? AND seq <= ?"
_COUNT = "SELECT count(*) FROM messages WHERE device = ? AND log = ? AND seq <= ?"
_COUNT_ROWS = "SELECT count(*) FROM {} WHERE device = ? AND log = ? AND seq <= ?"
_REMOVED = "SELECT kind, topic, payload, jws FROM messages WHERE device = ? AND log = ? AND seq <= ? ORDER BY seq"
_OPEN_ALERTS = f"""
    SELECT a.* FROM alerts a JOIN ({OPEN_INCIDENTS}) o
        ON o.device = a.device AND o.log = a.log AND o.id = a.id AND o.source = a.source AND o.seq = a.seq
    WHERE a.device = ? AND a.log = ? AND a.seq <= ? AND a.source = 'device' ORDER BY a.seq"""
_ALERTS_OF_LOG = f"SELECT {', '.join(ALERTS.names)} FROM alerts WHERE device = ? AND log = ? AND source = 'device'"
_NEWEST_STATEMENT = "SELECT max(n) FROM retention WHERE device = ?"
_UPSERT_FLOOR = """
    INSERT INTO pruned_logs VALUES (?, ?, ?) ON CONFLICT (device, log) DO UPDATE SET through = excluded.through"""


class StatementRow(msgspec.Struct, frozen=True):
    """A row of table retention."""

    device: str
    n: int
    time: str
    payload: bytes
    jws: str
    state: bytes


class Removal(msgspec.Struct, frozen=True):
    """Messages and rows of a device that are pruned: log → last seq, for messages and for single tables.

    `counts`: stored messages up to there, as the statement counts them. `alerts`: (log, seq) of rows that stay.
    """

    messages: Mapping[str, int]
    tables: Mapping[str, Mapping[str, int]]
    counts: Mapping[str, int]
    alerts: frozenset[tuple[str, int]]


def find_cut(store: FleetStore, device: str, log: str, last_seq: int, floor: int, before: str) -> int:
    """Return the seq up to which all messages of a log arrived before a time; `floor` without such a message.

    The newest message of a log stays, which the next one follows, and so does everything behind a gap that the device
    may still fill.
    """
    with store.snapshot() as db:
        newer = db.execute(_FIRST_NEWER, (device, log, floor, before)).fetchone()[0]
        gap = db.execute(_FIRST_GAP, (device, log)).fetchone()[0]
        bounds = [last_seq - 1, *(seq - 1 for seq in (newer, gap) if seq is not None)]
        last, count = db.execute(_LAST_BEFORE, (device, log, min(bounds))).fetchone()
    return max(floor, last) if count else floor


def count_rows(store: FleetStore, table: str, device: str, log: str, through: int) -> int:
    with store.snapshot() as db:
        return int(db.execute(_COUNT_ROWS.format(table), (device, log, through)).fetchone()[0])


def stream_removed(store: FleetStore, device: str, log: str, through: int) -> Iterator[Row]:
    """Return (kind, topic, payload, jws) of each message up to `through`, in order."""
    return store.stream(_REMOVED, (device, log, through))


def load_open_alerts(store: FleetStore, device: str, through: Mapping[str, int]) -> list[Row]:
    """Return the rows of open alerts of messages up to a seq of each log, without PostgreSQL's row number."""
    with store.snapshot() as db:
        return [tuple(row) for log in sorted(through) for row in db.execute(_OPEN_ALERTS, (device, log, through[log]))]


def remove(store: FleetStore, statement: StatementRow, removal: Removal) -> int:
    """Store a statement and remove what it names in one transaction; return the number of rows.

    Raises TransactionConflict if another process changed it meanwhile.
    """
    device = statement.device
    with store.transaction() as db:
        # Waits for collectors that wrote messages, and lets no other one write until this is done.
        db.lock_table("messages")
        db.lock_devices([device])
        newest = db.execute(_NEWEST_STATEMENT, (device,)).fetchone()[0] or 0
        counts = {log: db.execute(_COUNT, (device, log, seq)).fetchone()[0] for log, seq in removal.messages.items()}
        if newest != statement.n - 1 or counts != removal.counts:
            raise TransactionConflict(f"{store.name}: messages of {device} changed while they were pruned")
        db.execute("UPDATE retention SET state = NULL WHERE device = ?", (device,))
        db.execute("INSERT INTO retention VALUES (?, ?, ?, ?, ?, ?)", msgspec.structs.astuple(statement))
        db.executemany(_UPSERT_FLOOR, [(device, log, seq) for log, seq in removal.messages.items()])
        removed = sum(_delete(db, ("messages", "stamps"), device, removal.messages.items()))
        removed += sum(
            _delete(db, [table for table in PROJECTED if table != "alerts"], device, removal.messages.items())
        )
        removed += _delete_alerts(db, device, removal)
        for table, logs in removal.tables.items():
            removed += sum(_delete(db, (table,), device, logs.items()))
    return removed


def _delete(db: Connection, tables: Iterable[str], device: str, logs: Iterable[tuple[str, int]]) -> Iterator[int]:
    for table in tables:
        source = " AND source = 'device'" if table in SHARED else ""
        for log, seq in logs:
            sql = f"DELETE FROM {table} WHERE device = ? AND log = ? AND seq <= ?{source}"
            yield db.execute(sql, (device, log, seq)).rowcount


def _delete_alerts(db: Connection, device: str, removal: Removal) -> int:
    removed = 0
    for log, through in removal.messages.items():
        sql = "SELECT seq FROM alerts WHERE device = ? AND log = ? AND seq <= ? AND source = 'device'"
        seqs = [seq for (seq,) in db.execute(sql, (device, log, through)) if (log, seq) not in removal.alerts]
        delete = "DELETE FROM alerts WHERE device = ? AND log = ? AND seq = ? AND source = 'device'"
        db.executemany(delete, [(device, log, seq) for seq in seqs])
        removed += len(seqs)
        # An incident is what the rows that stay give.
        db.execute("DELETE FROM incidents WHERE device = ? AND log = ? AND source = 'device'", (device, log))
        merge_incidents(db, db.execute(_ALERTS_OF_LOG, (device, log)).fetchall())
    return removed
