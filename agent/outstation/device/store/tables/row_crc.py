"""Row checksums: each row of a small table has the CRC-32 of its values, and is read through a view that checks it.

A flipped bit must not become another cursor, count or state. Temporary triggers of each connection write the column
`crc`; the view `checked_TABLE` gives the other columns and fails at a row that is not what was written. Tables `meta`,
`chunks` and `outbox` have checksums of their own.

SQLite puts the constant of `column = constant` into the check, too. So a query may compare for equality only columns
with an index: it would take every other row for a damaged one.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from outstation.device.store.tables import schema

TABLES = (
    *("streams", "quarantined_rows", "categories", "cursors", "task_state", "source_positions", "counters", "alerts"),
    *("clock_segments", "command_counters", "command_answers", "predictions", "labels"),
)
# Too large to be looked through at each opening: damage is found when a row is read.
_LARGE_TABLES = frozenset({"predictions", "quarantined_rows"})


class _RowDamaged(Exception):
    """Raised inside SQLite, which gives it another name: see FUNCTION_FAILED."""


FUNCTION_FAILED = "user-defined function raised exception"


def row_crc(table: str, *values: Any) -> int:
    """Return the CRC-32 of a row of `table`, each value after its type and length."""
    crc = zlib.crc32(table.encode())
    for value in values:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        crc = zlib.crc32(data, zlib.crc32(b"%s %d " % (type(value).__name__.encode(), len(data)), crc))
    return crc


def is_row_intact(table: str, row: Mapping[str, Any]) -> bool:
    """Return True if a row, by column, is what was written."""
    return bool(row["crc"] == row_crc(table, *(row[name] for name in _names(table))))


def install(db: sqlite3.Connection, *, writes: bool) -> None:
    """Give a connection the views and, if it writes, the triggers. Raises sqlite3.Error."""
    db.create_function("row_crc", -1, row_crc, deterministic=True)
    _add_check(db)
    for statement in _views() + (_triggers() if writes else []):
        db.execute(statement)


def find_damage(db: sqlite3.Connection, *, large: bool) -> str | None:
    """Return a sentence about the first table with a damaged row, or None; `large` includes the large tables.

    It needs no views: a connection that only checks has none. Raises sqlite3.Error.
    """
    _add_check(db)
    for table in TABLES:
        if large or table not in _LARGE_TABLES:
            try:
                db.execute(f"SELECT count(*) FROM {table} WHERE {_intact(table)}").fetchone()
            except sqlite3.OperationalError as error:
                if FUNCTION_FAILED not in str(error):
                    raise
                return f"a row of table {table} is not what was written"
    return None


def _add_check(db: sqlite3.Connection) -> None:
    db.create_function("row_intact", -1, _is_intact, deterministic=True)


def _intact(table: str) -> str:
    """Return the condition that a row is what was written."""
    return f"row_intact(crc, '{table}', {', '.join(_names(table))})"


def _is_intact(crc: Any, table: str, *row: Any) -> int:
    if crc != row_crc(table, *row):
        raise _RowDamaged(table)
    return 1


@cache
def _views() -> list[str]:
    views = []
    for table in TABLES:
        rowid = "rowid AS rowid, " if table == "alerts" else ""
        columns = f"{rowid}{', '.join(_names(table))}"
        views.append(f"CREATE TEMP VIEW checked_{table} AS SELECT {columns} FROM main.{table} WHERE {_intact(table)}")
    return views


@cache
def _triggers() -> list[str]:
    triggers = []
    for table in TABLES:
        names = _names(table)
        key = [name for name in names if schema.columns(schema.STEPS)[table][name]] or ["rowid"]
        same = " AND ".join(f"{name} IS new.{name}" for name in key)
        crc = f"row_crc('{table}', {', '.join(f'new.{name}' for name in names)})"
        for event, suffix in (("INSERT", "insert"), (f"UPDATE OF {', '.join(names)}", "update")):
            triggers.append(
                f"CREATE TEMP TRIGGER {table}_{suffix} AFTER {event} ON main.{table} "
                f"BEGIN UPDATE {table} SET crc = {crc} WHERE {same}; END"
            )
    return triggers


def _names(table: str) -> list[str]:
    return [name for name in schema.columns(schema.STEPS)[table] if name != "crc"]
