"""Copying of a SQLite fleet database to PostgreSQL, a few thousand rows at a time, so that it can be continued.

The source takes no other write meanwhile. The target notes with each part what it has, in a table that goes at the end;
if the source changed since, copying begins anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.store import FleetStore
from outstation.foundation.errors import StorageError, UsageError

PROGRESS_TABLE = "migration_progress"
_CREATE_PROGRESS = f"CREATE TABLE {PROGRESS_TABLE} (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
_PUT_PROGRESS = f"""
    INSERT INTO {PROGRESS_TABLE} VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"""
_HAS_PROGRESS = f"SELECT to_regclass('{PROGRESS_TABLE}') IS NOT NULL"
_TABLES = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"
_COLUMNS = "SELECT name, type, pk FROM pragma_table_info(?) ORDER BY cid"
_HAS_ROWID = "SELECT wr = 0 FROM pragma_table_list(?)"
# A message has up to a megabyte.
_ROWS, _MESSAGES = 5_000, 500
_SOURCE = "source"
# Columns that grow with what a collector or an operator writes.
_NEWEST = (
    *(("messages", "rowid"), ("messages", "received"), ("devices", "last_seen")),
    *(("meta", "value"), ("alerts", "time"), ("labels", "received")),
    *(("verdicts", "given"), ("alert_verdicts", "given")),
)
# Tables with rows as soon as the tables are created.
_INITIAL_ROWS = frozenset({"meta"})


class CopiedTable(msgspec.Struct, frozen=True):
    """A table to copy. `key`: columns of its order; `flags`: places of its BOOLEAN columns; `count`: of its rows."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    flags: tuple[int, ...]
    count: int


def copy(source: FleetStore, target: FleetStore, progress: Callable[[int], None] = lambda _: None) -> dict[str, int]:
    """Copy all rows; return the number of rows by table. Raises StorageError, and UsageError if target has others."""
    with source.transaction() as db:
        tables = [*_describe_tables(db)]
        _begin(target, tables, _fingerprint(db, tables))
        for table in tables:
            _copy_table(db, target, table, progress)
        _require_equal_counts(target, tables)
    return {table.name: table.count for table in tables}


def finish(target: FleetStore) -> None:
    """Forget the progress: the copy is complete and verified."""
    with target.transaction() as into:
        into.execute(f"DROP TABLE IF EXISTS {PROGRESS_TABLE}")


def _describe_tables(db: Connection) -> Iterator[CopiedTable]:
    for (name,) in db.execute(_TABLES).fetchall():
        # Those of the migrations of the SQLite file.
        if name.startswith("_"):
            continue
        columns = db.execute(_COLUMNS, (name,)).fetchall()
        has_rowid = db.execute(_HAS_ROWID, (name,)).fetchone()[0]
        primary = sorted((pk, column) for column, _, pk in columns if pk)
        key = ("rowid",) if has_rowid else tuple(column for _, column in primary)
        flags = tuple(i for i, (_, kind, _) in enumerate(columns) if kind == "BOOLEAN")
        count = db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
        yield CopiedTable(name, tuple(column for column, *_ in columns), key, flags, count)


def _fingerprint(db: Connection, tables: Sequence[CopiedTable]) -> str:
    """Return a digest that changes with every message, key, alert and action of an operator."""
    newest = [db.execute(f"SELECT max({column}) FROM {table}").fetchone()[0] for table, column in _NEWEST]
    text = json.dumps([newest, [(table.name, table.columns, table.count) for table in tables]])
    return hashlib.sha256(text.encode()).hexdigest()


def _begin(target: FleetStore, tables: Sequence[CopiedTable], fingerprint: str) -> None:
    """Empty the target, unless it has a part of this copy. Raises UsageError if it has anything else."""
    with target.transaction() as into:
        is_resumed = into.execute(_HAS_PROGRESS).fetchone()[0]
        if is_resumed and _read_progress(into, _SOURCE) == fingerprint:
            return
        if not is_resumed:
            for table in tables:
                is_empty = into.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone() is None
                if not is_empty and table.name not in _INITIAL_ROWS:
                    problem = f"table {table.name} has rows already; name an empty database"
                    raise UsageError(f"{target.name}: {problem}")
            into.execute(_CREATE_PROGRESS)
        into.execute(f"DELETE FROM {PROGRESS_TABLE}")
        for table in tables:
            into.execute(f"DELETE FROM {table.name}")
        into.execute(_PUT_PROGRESS, (_SOURCE, fingerprint))


def _copy_table(db: Connection, target: FleetStore, table: CopiedTable, progress: Callable[[int], None]) -> None:
    key, columns = (", ".join(f'"{name}"' for name in names) for names in (table.key, table.columns))
    limit = _MESSAGES if table.name == "messages" else _ROWS
    with target.snapshot() as copied:
        text = _read_progress(copied, table.name)
    last = None if text is None else json.loads(text)
    width = len(table.key)
    while True:
        where = "" if last is None else f"WHERE ({key}) > ({', '.join('?' * width)})"
        sql = f"SELECT {key}, {columns} FROM {table.name} {where} ORDER BY {key} LIMIT {limit}"
        rows = db.execute(sql, last or ()).fetchall()
        if not rows:
            return
        last = [*rows[-1][:width]]
        with target.transaction() as into:
            into.bulk_insert(table.name, [_to_target(table, row[width:]) for row in rows])
            into.execute(_PUT_PROGRESS, (table.name, json.dumps(last)))
        progress(len(rows))


def _to_target(table: CopiedTable, row: Row) -> Row:
    """Return a row with its flags as such, which SQLite stores as numbers."""
    for name, value in zip(table.columns, row, strict=True):
        if isinstance(value, str) and ("\0" in value or not _is_text(value)):
            problem = f"column {name} of table {table.name} has text that PostgreSQL cannot store: {value[:80]!r}"
            raise StorageError(f"{problem}; see `outstation fleet audit`, and keep this database in SQLite")
    if not table.flags:
        return row
    values: list[Any] = [*row]
    for place in table.flags:
        values[place] = bool(values[place])
    return tuple(values)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_progress(into: Connection, name: str) -> str | None:
    sql = f"SELECT value FROM {PROGRESS_TABLE} WHERE name = ?"
    (value,) = into.execute(sql, (name,)).fetchone() or (None,)
    return None if value is None else str(value)


def _require_equal_counts(target: FleetStore, tables: Sequence[CopiedTable]) -> None:
    with target.snapshot() as copied:
        for table in tables:
            count = copied.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0]
            if count != table.count:
                problem = (
                    f"table {table.name} has {count} rows, the source {table.count}; empty the database, copy again"
                )
                raise StorageError(f"{target.name}: {problem}")
