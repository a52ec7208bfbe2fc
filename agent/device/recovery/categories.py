"""Category texts after damage: no code that a row carries may come to mean another text."""

from __future__ import annotations

import contextlib
import json
import sqlite3

from agent.config import FieldConfig
from agent.device.store.rows import PackedChunk, unpack_chunk

_SELECT_CHUNKS = """
    SELECT n, first_t, time_bytes, CAST(data AS BLOB), crc FROM chunks JOIN streams s ON s.id = stream WHERE s.name = ?
"""


def repair_categories(db: sqlite3.Connection) -> None:
    """Give each code whose text is lost a text that says so, inside the caller's transaction."""
    for name, text in db.execute("SELECT name, fields FROM streams").fetchall():
        try:
            fields = [FieldConfig(name=field, type=kind) for field, kind in json.loads(text)]
        except (ValueError, TypeError):
            continue
        for index, field in enumerate(fields):
            if field.type == "category":
                _repair_field(db, name, fields, index)


def _repair_field(db: sqlite3.Connection, stream: str, fields: list[FieldConfig], index: int) -> None:
    key = (stream, fields[index].name)
    codes = {row[0] for row in db.execute("SELECT code FROM categories WHERE stream = ? AND field = ?", key)}
    largest = max(codes, default=0)
    for row in db.execute(_SELECT_CHUNKS, (stream,)):
        with contextlib.suppress(ValueError):
            largest = max(largest, int(unpack_chunk(PackedChunk(*row), fields).columns[index].max()))
    lost = sorted(set(range(1, largest + 1)) - codes)
    db.executemany(
        "INSERT INTO categories VALUES (?, ?, ?, ?)", [(*key, code, f"lost category {code}") for code in lost]
    )
