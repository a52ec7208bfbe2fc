"""Table meta: single values by their names, each with a CRC: a flipped bit must not become another log, seq or plan."""

from __future__ import annotations

import sqlite3
import zlib
from typing import Any

from agent.errors import StorageDamaged

# All columns there are: a store that is not migrated yet has no CRCs.
_SELECT_ROW = "SELECT * FROM meta WHERE key = ?"


def row_crc(key: str, value: str) -> int:
    """CRC-32 over a name and its value, kept apart by the name's length."""
    return zlib.crc32(f"{len(key)} {key}{value}".encode("utf-8", "surrogateescape"))


def is_intact(row: tuple[Any, ...]) -> bool:
    """Whether (key, value, crc), or (key, value) of an older store, is what was written."""
    key, value, *rest = row
    return isinstance(key, str) and isinstance(value, str) and (not rest or rest[0] == row_crc(key, value))


def get(db: sqlite3.Connection, key: str, default: str) -> str:
    """Raises StorageDamaged where the value is not what was written, sqlite3.Error."""
    row = db.execute(_SELECT_ROW, (key,)).fetchone()
    if row is None:
        return default
    if not is_intact(row):
        raise StorageDamaged(f"{_damage_text(key)}; the agent sets the store aside and salvages it when it starts next")
    return str(row[1])


def put(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta (key, value, crc) VALUES (?, ?, ?)", (key, value, row_crc(key, value)))


def drop(db: sqlite3.Connection, key: str) -> None:
    db.execute("DELETE FROM meta WHERE key = ?", (key,))


def find_damage(db: sqlite3.Connection) -> str | None:
    """What is wrong with the table, in a sentence. Raises sqlite3.Error."""
    try:
        return next((_damage_text(row[0]) for row in db.execute("SELECT * FROM meta") if not is_intact(row)), None)
    except sqlite3.OperationalError as error:
        if "Could not decode to UTF-8" not in str(error):
            raise
        return "a row of table meta is not what was written"


def _damage_text(key: object) -> str:
    return f"row {key!r} of table meta is not what was written"
