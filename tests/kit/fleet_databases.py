"""Databases behind a fleet's store, for tests that inspect or disturb them."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from outstation.fleet.database.sqlite import SqliteDatabase
from outstation.fleet.database.store import FleetStore

# Values of `request.param` for `fresh_in`.
DATABASES = ("sqlite", "postgresql")


def sqlite_of(store: FleetStore) -> SqliteDatabase:
    assert isinstance(store._database, SqliteDatabase)
    return store._database


def fresh_in(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Callable[[], FleetStore]:
    """Yield a function that creates an empty database of the kind `request.param`."""
    if request.param == "sqlite":
        return lambda: _create(factory.mktemp("db") / "fleet.db")
    url = request.getfixturevalue("postgres_server").create_database()
    FleetStore(url).close()
    return lambda: emptied(url)


def _create(file: Path) -> FleetStore:
    """Create a database. To create its tables takes longer than most tests."""
    file.write_bytes(_make_empty())
    return FleetStore(file)


@cache
def _make_empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        FleetStore(Path(folder) / "fleet.db").close()
        return (Path(folder) / "fleet.db").read_bytes()


def emptied(url: str) -> FleetStore:
    """Empty the tables. Recreating or truncating them takes longer than most tests."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as db:
        names = db.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
        deletes = [f"DELETE FROM {name}" for (name,) in names if name not in ("migrations", "meta")]
        db.execute("; ".join([*deletes, "UPDATE meta SET value = 0"]))
    return FleetStore(url)


def copy_database(source: FleetStore, target: FleetStore) -> None:
    """Copy all rows of a SQLite database into an empty PostgreSQL one."""
    flags = {"declared", "trusted", "implied", "live"}
    with target.transaction() as into:
        sql = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND tablename <> 'migrations'"
        for (table,) in into.execute(sql).fetchall():
            into.execute(f"DELETE FROM {table}")
            with source.snapshot() as db:
                cursor = db.execute(f"SELECT * FROM {table} ORDER BY 1")
                names = [column[0] for column in cursor.description]
                ordered = "rowid" if table in ("logs", "shadows", "results") else "1"
                rows = db.execute(f"SELECT * FROM {table} ORDER BY {ordered}").fetchall()
            taken = [tuple(bool(v) if n in flags else v for n, v in zip(names, row, strict=True)) for row in rows]
            if taken:
                into.bulk_insert(table, taken)


def allow_nulls(file: Path) -> list[str]:
    """Let every column hold NULL, as a damaged record may; return the tables."""
    with contextlib.closing(sqlite3.connect(file)) as raw, raw:
        raw.execute("PRAGMA writable_schema = ON")
        raw.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '') WHERE type = 'table'")
        names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE '%sqlite_%'"
        return [row[0] for row in raw.execute(names)]
