"""PostgreSQL migrations: the statements of `migrations`, translated, and partitions of the large tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from outstation.fleet.database.schema.message_tables import ROWID, TABLES
from outstation.fleet.database.schema.migrations import MIGRATIONS, Migration
from outstation.foundation.errors import UsageError

if TYPE_CHECKING:
    import psycopg

# Text compares byte by byte, as in SQLite: the audit relies on the order, and times are text.
_TYPES = {"INTEGER": "BIGINT", "REAL": "DOUBLE PRECISION", "BLOB": "BYTEA", "TEXT": 'TEXT COLLATE "C"'}
_TYPE = re.compile(rf"(?<=\s)({'|'.join(_TYPES)})\b")
_INSTR = "CREATE FUNCTION instr(BYTEA, BYTEA) RETURNS INTEGER LANGUAGE SQL IMMUTABLE AS 'SELECT position($2 IN $1)'"
# `messages` and those of its tables that grow with every message.
_PARTITIONED_TABLES = {"messages"} | {table.name for table in TABLES.values() if table.is_partitioned}


_NEWEST_MIGRATION = "SELECT coalesce(max(number), 0) FROM migrations"
_HAS_MIGRATIONS = "SELECT to_regclass('migrations') IS NOT NULL"
_MIGRATION_LOCK = "hashtext(current_schema()), hashtext('migrations')"
_CREATE_MIGRATIONS = "CREATE TABLE migrations (number BIGINT PRIMARY KEY, applied TIMESTAMPTZ NOT NULL DEFAULT now())"


def migrate(connection: psycopg.Connection[Any], name: str, partitions: int) -> None:
    """Create or update the tables; concurrent processes take turns. Raises UsageError for a newer version."""
    if _read_version(connection, name) == len(MIGRATIONS):
        return
    # Before the transaction: one that began earlier may not see the tables created while it waited.
    connection.execute(f"SELECT pg_advisory_lock({_MIGRATION_LOCK})")
    try:
        with connection.transaction():
            version = _read_version(connection, name)
            if version == 0:
                connection.execute(_CREATE_MIGRATIONS)
                connection.execute(_INSTR)
            for number, migration in enumerate(MIGRATIONS[version:], version + 1):
                _apply(connection, migration, partitions)
                connection.execute("INSERT INTO migrations (number) VALUES (%s)", (number,))
    finally:
        connection.execute(f"SELECT pg_advisory_unlock({_MIGRATION_LOCK})")


def require_current(connection: psycopg.Connection[Any], name: str) -> None:
    """Raise UsageError unless the tables are those of this version."""
    version = _read_version(connection, name)
    if version == 0:
        raise UsageError(f"{name}: no tables here yet; `outstation fleet enrol DEVICE` creates them")
    if version < len(MIGRATIONS):
        raise UsageError(f"{name}: created by an older version; start `outstation fleet collect` once")


def _apply(connection: psycopg.Connection[Any], migration: Migration, partitions: int) -> None:
    for statement in migration.statements:
        translated = _translate(statement)
        table = re.match(r"CREATE TABLE (\w+)", statement)
        if table is None or table[1] not in _PARTITIONED_TABLES or partitions == 1:
            connection.execute(translated)
            continue
        connection.execute(f"{translated} PARTITION BY HASH (device)")
        for n in range(partitions):
            values = f"FOR VALUES WITH (MODULUS {partitions}, REMAINDER {n})"
            connection.execute(f"CREATE TABLE {table[1]}_{n} PARTITION OF {table[1]} {values}")


def _translate(statement: str) -> str:
    if not statement.startswith(("CREATE TABLE", "CREATE INDEX", "ALTER TABLE")):
        return statement
    text = _TYPE.sub(lambda match: _TYPES[match[1]], statement).replace(" WITHOUT ROWID", "")
    identity = ", rowid BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY"
    return text.replace(ROWID, identity if text.startswith("CREATE TABLE") else ", rowid")


def _read_version(connection: psycopg.Connection[Any], name: str) -> int:
    (exists,) = connection.execute(_HAS_MIGRATIONS).fetchone() or (False,)
    (version,) = (connection.execute(_NEWEST_MIGRATION).fetchone() if exists else None) or (0,)
    if version > len(MIGRATIONS):
        raise UsageError(f"{name}: created by a newer version of outstation; update it on this machine")
    return int(version)
