"""The durable state of notifications: what each target knows and is to know, and messages on their way.

The tables are in the fleet database, or in a file of the device. The ledger has one row for each target and alert that
is open or to be notified; the number of open alerts bounds it. A message is composed once, with a key that depends on
the states of alerts in it alone, and stays until the target has accepted it. While messages of a target wait, its
further changes stay in the ledger, where a newer state replaces an older one: a dead target costs a bounded number of
bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import msgspec

# In SQL that SQLite and PostgreSQL understand; the fleet's schema translates the types.
TABLES = (
    # notified_seq: of the newest message of the alert that the target knows, 0 before the first; pending: what it is to
    # know next. Times are epoch seconds.
    """CREATE TABLE notify_ledger (
        target TEXT NOT NULL, alert TEXT NOT NULL, notified_seq INTEGER NOT NULL, notified_at REAL NOT NULL,
        reminders INTEGER NOT NULL, pending TEXT, pending_since REAL, PRIMARY KEY (target, alert)) WITHOUT ROWID""",
    # body: JSON, as it is sent.
    """CREATE TABLE notify_queue (
        target TEXT NOT NULL, number INTEGER NOT NULL, key TEXT NOT NULL, body BLOB NOT NULL, created REAL NOT NULL,
        attempts INTEGER NOT NULL, PRIMARY KEY (target, number))""",
    # failing_since: of the failures in a row; is_reported: an alert says that it fails. state: digest of the retained
    # document that was composed last.
    """CREATE TABLE notify_targets (
        target TEXT PRIMARY KEY, failures INTEGER NOT NULL, failing_since REAL, next_at REAL NOT NULL, error TEXT,
        is_reported BOOLEAN NOT NULL, sent INTEGER NOT NULL, rejected INTEGER NOT NULL, composed_at REAL NOT NULL,
        sent_at REAL NOT NULL, state TEXT) WITHOUT ROWID""",
    "CREATE TABLE notify_cursor (name TEXT PRIMARY KEY, cursor INTEGER NOT NULL) WITHOUT ROWID",
)
_CURSOR = "alerts"
_UPSERT_LEDGER = """
    INSERT INTO notify_ledger VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (target, alert) DO UPDATE SET
        notified_seq = excluded.notified_seq, notified_at = excluded.notified_at, reminders = excluded.reminders,
        pending = excluded.pending, pending_since = excluded.pending_since"""
_UPSERT_TARGET = """
    INSERT INTO notify_targets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (target) DO UPDATE SET
        failures = excluded.failures, failing_since = excluded.failing_since, next_at = excluded.next_at,
        error = excluded.error, is_reported = excluded.is_reported, sent = excluded.sent,
        rejected = excluded.rejected, composed_at = excluded.composed_at, sent_at = excluded.sent_at,
        state = excluded.state"""
_UPSERT_CURSOR = """
    INSERT INTO notify_cursor VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET cursor = excluded.cursor"""
_NEXT = """
    SELECT target, number, key, body, created, attempts FROM notify_queue WHERE target = ? ORDER BY number LIMIT 1"""
_ADD = """
    INSERT INTO notify_queue SELECT CAST(? AS TEXT), coalesce(max(number), 0) + 1, ?, ?, ?, 0
    FROM notify_queue WHERE target = ?"""
_WAITING = "SELECT target, count(*), min(created) FROM notify_queue GROUP BY target"

LedgerKey = tuple[str, str]  # (target, alert)
Pending = Literal["raised", "cleared", "reminder"]


class QueueConnection(Protocol):
    """A connection inside a transaction."""

    def execute(self, sql: str, values: Any = ..., /) -> Any: ...


class QueueDatabase(Protocol):
    """Database with the tables, for one thread. Raises StorageError."""

    def transaction(self) -> AbstractContextManager[QueueConnection]: ...
    def snapshot(self) -> AbstractContextManager[QueueConnection]: ...


class LedgerEntry(msgspec.Struct):
    """Knowledge of one target about one alert, and what it is to know next."""

    target: str
    alert: str
    notified_seq: int = 0
    notified_at: float = 0.0
    reminders: int = 0
    pending: Pending | None = None
    pending_since: float | None = None


class QueuedMessage(msgspec.Struct, frozen=True):
    target: str
    number: int
    key: str
    body: bytes
    created: float
    attempts: int


class TargetState(msgspec.Struct):
    """The state of a target over restarts; `next_at`: no attempt before it."""

    target: str
    failures: int = 0
    failing_since: float | None = None
    next_at: float = 0.0
    error: str | None = None
    is_reported: bool = False
    sent: int = 0
    rejected: int = 0
    composed_at: float = 0.0
    sent_at: float = 0.0
    state: str | None = None


def load_cursor(db: QueueConnection) -> int | None:
    row = db.execute("SELECT cursor FROM notify_cursor WHERE name = ?", (_CURSOR,)).fetchone()
    (cursor,) = row or (None,)
    return None if cursor is None else int(cursor)


def save_cursor(db: QueueConnection, cursor: int) -> None:
    db.execute(_UPSERT_CURSOR, (_CURSOR, cursor))


def load_ledger(db: QueueConnection) -> dict[LedgerKey, LedgerEntry]:
    """Return the ledger by (target, alert)."""
    rows = db.execute("SELECT * FROM notify_ledger ORDER BY target, alert").fetchall()
    entries = [LedgerEntry(*row) for row in rows]
    return {(entry.target, entry.alert): entry for entry in entries}


def save_entries(db: QueueConnection, entries: Iterable[LedgerEntry]) -> None:
    for entry in entries:
        db.execute(_UPSERT_LEDGER, msgspec.structs.astuple(entry))


def delete_entries(db: QueueConnection, keys: Iterable[LedgerKey]) -> None:
    for key in keys:
        db.execute("DELETE FROM notify_ledger WHERE target = ? AND alert = ?", key)


def load_targets(db: QueueConnection) -> dict[str, TargetState]:
    rows = db.execute("SELECT * FROM notify_targets ORDER BY target").fetchall()
    states = [TargetState(*row) for row in rows]
    # SQLite has no flags of its own.
    return {state.target: msgspec.structs.replace(state, is_reported=bool(state.is_reported)) for state in states}


def save_target(db: QueueConnection, state: TargetState) -> None:
    db.execute(_UPSERT_TARGET, msgspec.structs.astuple(state))


def add_message(db: QueueConnection, target: str, key: str, body: bytes, now_s: float) -> None:
    db.execute(_ADD, (target, key, body, now_s, target))


def next_message(db: QueueConnection, target: str) -> QueuedMessage | None:
    """Return the oldest message of a target."""
    for name, number, key, body, created, attempts in db.execute(_NEXT, (target,)).fetchall():
        return QueuedMessage(name, number, key, bytes(body), created, attempts)
    return None


def delete_message(db: QueueConnection, message: QueuedMessage) -> None:
    db.execute("DELETE FROM notify_queue WHERE target = ? AND number = ?", (message.target, message.number))


def count_attempt(db: QueueConnection, message: QueuedMessage) -> None:
    sql = "UPDATE notify_queue SET attempts = attempts + 1 WHERE target = ? AND number = ?"
    db.execute(sql, (message.target, message.number))


def count_waiting(db: QueueConnection) -> dict[str, tuple[int, float]]:
    """Return the number of waiting messages of each target, and when the oldest was composed."""
    return {target: (int(n), float(created)) for target, n, created in db.execute(_WAITING).fetchall()}


def drop_target(db: QueueConnection, target: str) -> None:
    """Forget a target that the config no longer names."""
    for table in ("notify_ledger", "notify_queue", "notify_targets"):
        db.execute(f"DELETE FROM {table} WHERE target = ?", (target,))


def clear_queue(db: QueueConnection, target: str) -> None:
    """Delete the waiting messages of a target whose newest document replaces the others."""
    db.execute("DELETE FROM notify_queue WHERE target = ?", (target,))
