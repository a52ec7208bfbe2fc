"""Repair of categories: codes in stored rows whose text is lost get a placeholder."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import numpy as np

from outstation.device.config import FieldConfig
from outstation.device.store.rows import PackedChunk, lost_category, unpack_chunk

_SELECT_PACKED = """
    SELECT n, first_t, time_bytes, CAST(data AS BLOB), crc, stream, first_row, boot, clock, segment, boot_us
    FROM chunks WHERE stream = (SELECT id FROM streams WHERE name = ?)
"""


def repair_categories(db: sqlite3.Connection) -> None:
    """Give each used code whose text is lost a placeholder, so that it never comes to mean another text.

    A text is also lost if only rows after its last one use the code: they were written with a later text.
    """
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
    stored = db.execute("SELECT code, last_row FROM categories WHERE stream = ? AND field = ?", key)
    last_rows: dict[int, int] = dict(stored.fetchall())
    first_rows: dict[int, int] = {}
    for n, first_t, time_bytes, data, crc, *place in db.execute(_SELECT_PACKED, (stream,)):
        packed = PackedChunk(n, first_t, time_bytes, data, crc, tuple(place))
        with contextlib.suppress(ValueError):
            codes, offsets = np.unique(unpack_chunk(packed, fields).columns[index], return_index=True)
            for code, offset in zip(codes.tolist(), offsets.tolist(), strict=True):
                first_rows[code] = min(first_rows.get(code, place[1] + offset), place[1] + offset)
    last = max(*last_rows, *first_rows, 0, 0)
    lost = [code for code in range(1, last + 1) if last_rows.get(code, -1) < first_rows.get(code, 0)]
    db.executemany(
        "INSERT OR REPLACE INTO categories (stream, field, code, value, last_row) "
        "VALUES (?, ?, ?, ?, (SELECT next_row FROM streams WHERE name = ?))",
        [(*key, code, lost_category(code), stream) for code in lost],
    )
