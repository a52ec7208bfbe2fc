"""Table meta: single values by name, each with a CRC, so that a flipped bit never becomes another log, seq or plan."""

from __future__ import annotations

import sqlite3
import zlib
from typing import Any

from outstation.foundation.errors import StorageDamaged


def row_crc(key: str, value: str) -> int:
    """Return the CRC-32 of a name and its value, separated by the name's length."""
    return zlib.crc32(f"{len(key)} {key}{value}".encode("utf-8", "surrogateescape"))


def is_intact(row: tuple[Any, ...]) -> bool:
    """Return True if (key, value, crc) is what was written."""
    key, value, crc = row
    return isinstance(key, str) and isinstance(value, str) and crc == row_crc(key, value)


def get(db: sqlite3.Connection, key: str, default: str) -> str:
    """Return a value. Raises StorageDamaged if it is not what was written, sqlite3.Error."""
    row = db.execute("SELECT key, value, crc FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        return default
    _, value, _ = row
    if not is_intact(row):
        raise StorageDamaged(f"{_damage_text(key)}; the agent sets the store aside and salvages it when it starts next")
    return str(value)


def put(db: sqlite3.Connection, key: str, value: str) -> None:
    db.execute("INSERT OR REPLACE INTO meta (key, value, crc) VALUES (?, ?, ?)", (key, value, row_crc(key, value)))


def delete(db: sqlite3.Connection, key: str) -> None:
    db.execute("DELETE FROM meta WHERE key = ?", (key,))


def find_damage(db: sqlite3.Connection) -> str | None:
    """Return a sentence about the first damaged row, or None. Raises sqlite3.Error."""
    try:
        rows = db.execute("SELECT key, value, crc FROM meta")
        return next((_damage_text(key) for key, *rest in rows if not is_intact((key, *rest))), None)
    except sqlite3.OperationalError as error:
        if "Could not decode to UTF-8" not in str(error):
            raise
        return "a row of table meta is not what was written"


def _damage_text(key: object) -> str:
    return f"row {key!r} of table meta is not what was written"
