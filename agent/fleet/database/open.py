"""Factory of the fleet database: SQLite for a path, PostgreSQL for a URL."""

from __future__ import annotations

from pathlib import Path

from agent.fleet.database.interface import Database, is_postgresql
from agent.fleet.database.sqlite import SqliteDatabase


def open_database(location: Path | str, *, read_only: bool = False, partitions: int = 1) -> Database:
    """Open a file, or a `postgresql://` URL; `partitions` applies when a PostgreSQL database has no tables yet."""
    if not is_postgresql(location):
        return SqliteDatabase(Path(location), read_only=read_only)
    # psycopg is an extra, which a fleet with SQLite does without.
    from agent.fleet.database.postgresql import PostgresqlDatabase

    return PostgresqlDatabase(str(location), read_only=read_only, partitions=partitions)
