"""Category texts after damage: no code that a row carries may come to mean another text."""

from __future__ import annotations

import contextlib
import json
import sqlite3

from agent.config import Field
from agent.device.store.rows import Packed, unpack

_CHUNKS = """
    SELECT n, first_t, time_bytes, CAST(data AS BLOB), crc FROM chunks JOIN streams s ON s.id = stream WHERE s.name = ?
"""


def mend(db: sqlite3.Connection) -> None:
    """Give each code whose text is lost a text that says so, inside the caller's transaction."""
    for name, text in db.execute("SELECT name, fields FROM streams").fetchall():
        try:
            fields = [Field(name=field, type=kind) for field, kind in json.loads(text)]
        except (ValueError, TypeError):
            continue
        for index, field in enumerate(fields):
            if field.type == "category":
                _mend(db, name, fields, index)


def _mend(db: sqlite3.Connection, stream: str, fields: list[Field], index: int) -> None:
    key = (stream, fields[index].name)
    codes = {row[0] for row in db.execute("SELECT code FROM categories WHERE stream = ? AND field = ?", key)}
    largest = max(codes, default=0)
    for row in db.execute(_CHUNKS, (stream,)):
        with contextlib.suppress(ValueError):
            largest = max(largest, int(unpack(Packed(*row), fields).columns[index].max()))
    lost = sorted(set(range(1, largest + 1)) - codes)
    db.executemany(
        "INSERT INTO categories VALUES (?, ?, ?, ?)", [(*key, code, f"lost category {code}") for code in lost]
    )
