"""The tables in PostgreSQL: those of `schema`, column for column, and how an older database comes to have them.

A migration is added at the end, never changed, and its twin in `schema`: a test compares what both lead to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from agent.errors import UsageError
from agent.fleet.database import timestamps

if TYPE_CHECKING:
    import psycopg

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL);
INSERT INTO meta VALUES ('keys_version', 0);
CREATE TABLE devices (device TEXT PRIMARY KEY, enrolled TEXT NOT NULL, state TEXT, last_seen TEXT);
CREATE TABLE keys (
    kid TEXT PRIMARY KEY, device TEXT NOT NULL, key TEXT NOT NULL, added TEXT NOT NULL, revoked TEXT, log TEXT,
    through BIGINT);
CREATE INDEX keys_of_device ON keys (device);
CREATE TABLE messages (
    device TEXT NOT NULL, log TEXT NOT NULL, seq BIGINT NOT NULL, kind TEXT NOT NULL, topic TEXT NOT NULL,
    payload BYTEA NOT NULL, jws TEXT NOT NULL, received TEXT NOT NULL, PRIMARY KEY (device, log, seq));
CREATE TABLE logs (
    device TEXT NOT NULL, log TEXT NOT NULL, through BIGINT NOT NULL, since TEXT NOT NULL,
    rowid BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (device, log));
CREATE TABLE gaps (
    device TEXT NOT NULL, log TEXT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL, declared BOOLEAN NOT NULL,
    PRIMARY KEY (device, log, first));
CREATE TABLE ends (device TEXT NOT NULL, log TEXT NOT NULL, last BIGINT NOT NULL, PRIMARY KEY (device, log));
CREATE TABLE results (
    device TEXT NOT NULL, task TEXT NOT NULL, row BIGINT NOT NULL, t BIGINT NOT NULL, label TEXT,
    score DOUBLE PRECISION, value DOUBLE PRECISION, log TEXT NOT NULL, seq BIGINT NOT NULL);
CREATE INDEX results_by_row ON results (device, task, row);
CREATE TABLE drift_windows (
    device TEXT NOT NULL, task TEXT NOT NULL, "window" BIGINT NOT NULL, first BIGINT NOT NULL, last BIGINT NOT NULL,
    "from" TEXT NOT NULL, "to" TEXT NOT NULL, n BIGINT NOT NULL, state TEXT NOT NULL, model TEXT NOT NULL,
    version TEXT NOT NULL, reference TEXT NOT NULL, features TEXT NOT NULL, output TEXT NOT NULL, estimate TEXT,
    log TEXT NOT NULL, seq BIGINT NOT NULL, joint TEXT, PRIMARY KEY (device, log, seq));
CREATE INDEX drift_windows_by_time ON drift_windows (task, device, "to", "from", state);
CREATE TABLE alerts (
    device TEXT NOT NULL, task TEXT, alert TEXT NOT NULL, subject TEXT NOT NULL, state TEXT NOT NULL,
    severity TEXT NOT NULL, summary TEXT NOT NULL, time TEXT NOT NULL, id TEXT NOT NULL, source TEXT NOT NULL,
    log TEXT NOT NULL, seq BIGINT NOT NULL, PRIMARY KEY (device, log, seq, source));
CREATE TABLE quality (
    device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL,
    seq BIGINT NOT NULL, PRIMARY KEY (device, log, seq));
CREATE TABLE refusals (
    device TEXT NOT NULL, reason TEXT NOT NULL, count BIGINT NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
    PRIMARY KEY (device, reason));
CREATE TABLE refused (
    device TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, topic TEXT NOT NULL, payload BYTEA NOT NULL,
    jws TEXT NOT NULL, received TEXT NOT NULL);
CREATE TABLE anchors (
    device TEXT NOT NULL, log TEXT NOT NULL, seq BIGINT NOT NULL, boot BIGINT NOT NULL, segment BIGINT NOT NULL,
    boot_us BIGINT NOT NULL, wall_us BIGINT NOT NULL, quality TEXT NOT NULL, error_us BIGINT, step_us BIGINT NOT NULL,
    believed BOOLEAN NOT NULL, PRIMARY KEY (device, log, seq));
CREATE INDEX anchors_believed ON anchors (device, log, boot, boot_us) WHERE believed;
CREATE TABLE segments (
    device TEXT NOT NULL, log TEXT NOT NULL, boot BIGINT NOT NULL, segment BIGINT NOT NULL, seq BIGINT NOT NULL,
    offset_us BIGINT NOT NULL, vouched BIGINT, PRIMARY KEY (device, log, boot, segment));
CREATE TABLE boots (
    device TEXT NOT NULL, log TEXT NOT NULL, boot BIGINT NOT NULL, last_us BIGINT NOT NULL,
    believed BOOLEAN NOT NULL DEFAULT FALSE, disagree_us BIGINT NOT NULL DEFAULT 0, start_us BIGINT,
    start_error_us BIGINT, PRIMARY KEY (device, log, boot));
CREATE INDEX boots_believed ON boots (device, log, boot) WHERE believed;
CREATE TABLE stamps (
    device TEXT NOT NULL, log TEXT NOT NULL, seq BIGINT NOT NULL, first BIGINT NOT NULL, boot BIGINT NOT NULL,
    segment BIGINT, quality BIGINT NOT NULL, implied BOOLEAN NOT NULL, PRIMARY KEY (device, log, seq, first));
CREATE TABLE metrics (
    device TEXT NOT NULL, task TEXT NOT NULL, time TEXT NOT NULL, metric TEXT NOT NULL, slice TEXT NOT NULL,
    value DOUBLE PRECISION, low DOUBLE PRECISION, high DOUBLE PRECISION, n BIGINT NOT NULL, state TEXT,
    source TEXT NOT NULL, log TEXT NOT NULL, seq BIGINT NOT NULL);
CREATE INDEX metrics_of_task ON metrics (device, task);
CREATE TABLE labels (
    device TEXT NOT NULL, task TEXT NOT NULL, log TEXT NOT NULL, row BIGINT NOT NULL, label TEXT NOT NULL,
    source TEXT NOT NULL, received TEXT NOT NULL, PRIMARY KEY (device, task, log, row));
CREATE TABLE rollouts (
    rollout TEXT PRIMARY KEY, task TEXT NOT NULL, bundle TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    topic TEXT NOT NULL, started TEXT NOT NULL, state TEXT NOT NULL, step BIGINT NOT NULL, plan TEXT NOT NULL);
CREATE TABLE decisions (
    rollout TEXT NOT NULL, n BIGINT NOT NULL, time TEXT NOT NULL, event TEXT NOT NULL, summary TEXT NOT NULL,
    evidence TEXT NOT NULL, payload BYTEA NOT NULL, jws TEXT NOT NULL, PRIMARY KEY (rollout, n));
CREATE TABLE shadows (
    device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, model TEXT NOT NULL, beside TEXT NOT NULL,
    time TEXT NOT NULL, rows_first BIGINT NOT NULL, rows_last BIGINT NOT NULL, batches BIGINT NOT NULL,
    n BIGINT NOT NULL, errors BIGINT NOT NULL, body TEXT NOT NULL, log TEXT NOT NULL, seq BIGINT NOT NULL,
    rowid BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (device, log, seq));
CREATE INDEX shadows_of_rollout ON shadows (rollout, rowid);
CREATE TABLE rollout_devices (
    device TEXT NOT NULL, task TEXT NOT NULL, rollout TEXT NOT NULL, digest TEXT NOT NULL, strategy TEXT NOT NULL,
    phase TEXT NOT NULL, reason TEXT NOT NULL, summary TEXT NOT NULL, numbers TEXT NOT NULL, time TEXT NOT NULL,
    log TEXT NOT NULL, seq BIGINT NOT NULL, PRIMARY KEY (device, log, seq));
CREATE INDEX devices_of_rollout ON rollout_devices (rollout, device);
CREATE TABLE desired (topic TEXT PRIMARY KEY, counter BIGINT NOT NULL, payload BYTEA NOT NULL, jws TEXT NOT NULL);
CREATE FUNCTION instr(BYTEA, BYTEA) RETURNS INTEGER LANGUAGE SQL IMMUTABLE AS 'SELECT position($2 IN $1)';
"""
# The two that grow with every message.
_PARTITIONED_TABLES = ("messages", "results")


def _create_tables(connection: psycopg.Connection[Any], partitions: int) -> None:
    # Byte by byte, as SQLite compares: the audit relies on it, and the times are text.
    tables = _TABLES.replace(" TEXT", ' TEXT COLLATE "C"')
    if partitions > 1:
        for table in _PARTITIONED_TABLES:
            tables = re.sub(rf"(CREATE TABLE {table} \([^;]*\));", r"\1 PARTITION BY HASH (device);", tables)
    for statement in tables.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    for table in _PARTITIONED_TABLES if partitions > 1 else ():
        for n in range(partitions):
            values = f"FOR VALUES WITH (MODULUS {partitions}, REMAINDER {n})"
            connection.execute(f"CREATE TABLE {table}_{n} PARTITION OF {table} {values}")
    connection.execute(timestamps.RESULTS_DATED_VIEW)


MIGRATIONS: tuple[Callable[[psycopg.Connection[Any], int], None], ...] = (_create_tables,)

_NEWEST_MIGRATION = "SELECT coalesce(max(number), 0) FROM migrations"
_HAS_MIGRATIONS = "SELECT to_regclass('migrations') IS NOT NULL"
_MIGRATION_LOCK = "hashtext(current_schema()), hashtext('migrations')"
_CREATE_MIGRATIONS = "CREATE TABLE migrations (number BIGINT PRIMARY KEY, applied TIMESTAMPTZ NOT NULL DEFAULT now())"


def migrate(connection: psycopg.Connection[Any], name: str, partitions: int) -> None:
    """Make the tables, or bring them up to date; who starts at once takes turns. Raises UsageError."""
    if _read_version(connection, name) == len(MIGRATIONS):
        return
    # Before the transaction: one that has begun may not see that the tables were made while it waited.
    connection.execute(f"SELECT pg_advisory_lock({_MIGRATION_LOCK})")
    try:
        with connection.transaction():
            done = _read_version(connection, name)
            if done == 0:
                connection.execute(_CREATE_MIGRATIONS)
            for number, migration in enumerate(MIGRATIONS[done:], done + 1):
                migration(connection, partitions)
                connection.execute("INSERT INTO migrations (number) VALUES (%s)", (number,))
    finally:
        connection.execute(f"SELECT pg_advisory_unlock({_MIGRATION_LOCK})")


def require_current(connection: psycopg.Connection[Any], name: str) -> None:
    """Raises UsageError where the tables are not those of this version."""
    version = _read_version(connection, name)
    if version == 0:
        raise UsageError(f"{name}: no tables here yet; `outstation fleet enrol DEVICE` makes them")
    if version < len(MIGRATIONS):
        raise UsageError(f"{name}: made by an older version; start `outstation fleet collect` once")


def _read_version(connection: psycopg.Connection[Any], name: str) -> int:
    there = connection.execute(_HAS_MIGRATIONS).fetchone()
    row = connection.execute(_NEWEST_MIGRATION).fetchone() if there and there[0] else None
    version = int(row[0]) if row else 0
    if version > len(MIGRATIONS):
        raise UsageError(f"{name}: made by a newer version of outstation; update it here")
    return version
