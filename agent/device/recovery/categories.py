"""Repair of categories: codes in stored rows whose text is lost get a placeholder."""

from __future__ import annotations

import contextlib
import json
import sqlite3

from agent.config import FieldConfig
from agent.device.store.rows import PackedChunk, unpack_chunk

_SELECT_PACKED = """
    SELECT n, first_t, time_bytes, CAST(data AS BLOB), crc, stream, first_row, boot, clock, segment, boot_us
    FROM chunks WHERE stream = (SELECT id FROM streams WHERE name = ?)
"""


def repair_categories(db: sqlite3.Connection) -> None:
    """Give each used code without a text a placeholder, so that it never comes to mean another text."""
    for name, text in db.execute("SELECT name, fields FROM streams").fetchall():
        try:
            fields = [FieldConfig(name=field, type=kind) for field, kind in json.loads(text)]
        except (ValueError, TypeError):
            continue
        for index, field in enumerate(fields):
            if field.type == "category":
                _repair_category_field(db, name, fields, index)


def _repair_category_field(db: sqlite3.Connection, stream: str, fields: list[FieldConfig], index: int) -> None:
    key = (stream, fields[index].name)
    codes = {row[0] for row in db.execute("SELECT code FROM categories WHERE stream = ? AND field = ?", key)}
    largest = max(codes, default=0)
    for n, first_t, time_bytes, data, crc, *place in db.execute(_SELECT_PACKED, (stream,)):
        packed = PackedChunk(n, first_t, time_bytes, data, crc, tuple(place))
        with contextlib.suppress(ValueError):
            largest = max(largest, int(unpack_chunk(packed, fields).columns[index].max()))
    lost = sorted(set(range(1, largest + 1)) - codes)
    db.executemany(
        "INSERT INTO categories (stream, field, code, value, last_row) "
        "VALUES (?, ?, ?, ?, (SELECT next_row FROM streams WHERE name = ?))",
        [(*key, code, f"lost category {code}", stream) for code in lost],
    )
