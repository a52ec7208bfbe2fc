"""Readers of a damaged database: row by row around bad pages, and raw b-tree leaves that no tree leads to any more.

Raw leaves also hold deleted rows: the caller must recognize a valid row by its contents.
Source: sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (records) and 4.1 (the write-ahead log).
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from outstation.device.store.tables import schema
from outstation.foundation import input_files

PAGE_SIZE = 4096
_TABLE_LEAF = 0x0D
_MAX_RECORD_BYTES = 64 << 20
_FRAME_HEADER = struct.Struct(">II8s8x")
_INTEGER_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
# How much of a record stays in its cell when the rest runs over to other pages.
_MAX_LOCAL, _MIN_LOCAL = PAGE_SIZE - 35, (PAGE_SIZE - 12) * 32 // 255 - 23


class DatabasePages:
    """Pages of a database with 4096-byte pages, including the committed part of its write-ahead log."""

    def __init__(self, database: BinaryIO, log: BinaryIO | None) -> None:
        self._database, self._log = database, log
        self._wal_offsets = _committed_frames(log) if log else {}

    def numbers(self) -> list[int]:
        """Return the numbers of the pages that hold something, but the first, in order."""
        numbers = {number for number in self._wal_offsets if number > 1}
        for begin, end in input_files.data_ranges(self._database):
            numbers |= {*range(max(2, begin // PAGE_SIZE + 1), -(-end // PAGE_SIZE) + 1)}
        return sorted(numbers)

    def __getitem__(self, number: int) -> bytes:
        """Return page `number`, counted from 1; empty if there is none."""
        if self._log is not None and number in self._wal_offsets:
            self._log.seek(self._wal_offsets[number])
            return self._log.read(PAGE_SIZE)
        self._database.seek((number - 1) * PAGE_SIZE)
        return self._database.read(PAGE_SIZE)


def read_leaf_rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """Yield (rowid, values) of every record in a table leaf of the database, in the order of the file."""
    with path.open("rb") as database:
        log_path = path.with_name(path.name + "-wal")
        log = log_path.open("rb") if log_path.exists() else None
        try:
            pages = DatabasePages(database, log)
            for number in pages.numbers():
                page = pages[number]
                if len(page) == PAGE_SIZE and page[0] == _TABLE_LEAF:
                    yield from _read_cells(page, pages)
        finally:
            if log is not None:
                log.close()


def _read_cells(page: bytes, pages: DatabasePages) -> Iterator[tuple[int, list[Any]]]:
    for index in range(min(int.from_bytes(page[3:5], "big"), PAGE_SIZE // 4)):
        at = int.from_bytes(page[8 + 2 * index : 10 + 2 * index], "big")
        try:
            size, at = _read_varint(page, at)
            rowid, at = _read_varint(page, at)
            if size <= _MAX_RECORD_BYTES:
                yield rowid, _decode_record(_read_payload(page, at, size, pages))
        except (IndexError, ValueError):
            continue


def _read_payload(page: bytes, offset: int, size: int, pages: DatabasePages) -> bytes:
    if size <= _MAX_LOCAL:
        return page[offset : offset + size]
    local = _MIN_LOCAL + (size - _MIN_LOCAL) % (PAGE_SIZE - 4)
    local = local if local <= _MAX_LOCAL else _MIN_LOCAL
    parts, left = [page[offset : offset + local]], size - local
    following = int.from_bytes(page[offset + local : offset + local + 4], "big")
    while left > 0 and following:
        more = pages[following]
        if len(more) < 4:
            break
        parts.append(more[4 : 4 + min(left, PAGE_SIZE - 4)])
        left -= len(parts[-1])
        following = int.from_bytes(more[:4], "big")
    return b"".join(parts)


def _decode_record(payload: bytes) -> list[Any]:
    """Decode a record. Raises ValueError, IndexError if it is malformed."""
    end, at = _read_varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _read_varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INTEGER_SIZES.get(kind, 8 if kind == 7 else 0 if kind < 12 else (kind - 12) // 2)
        part = payload[at : at + size]
        if len(part) < size:
            raise ValueError("cut off")
        value: Any
        if kind in _INTEGER_SIZES:
            value = int.from_bytes(part, "big", signed=True)
        elif kind in (8, 9):
            value = kind - 8
        elif kind == 7:
            value = struct.unpack(">d", part)[0]
        else:
            # Texts stay bytes: they may be damaged.
            value = part if kind >= 12 else None
        values.append(value)
        at += size
    return values


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[offset + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, offset + index + 1
    return value << 8 | data[offset + 8], offset + 9


def _committed_frames(log: BinaryIO) -> dict[int, int]:
    """Return page number → offset of its newest committed image in the write-ahead log."""
    salts = log.read(32)[16:24]
    newest: dict[int, int] = {}
    uncommitted: dict[int, int] = {}
    while len(head := log.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
        number, commit, salt = _FRAME_HEADER.unpack(head)
        at = log.tell()
        if salt != salts or len(log.read(PAGE_SIZE)) < PAGE_SIZE:
            break
        uncommitted[number] = at
        if commit:
            newest |= uncommitted
            uncommitted = {}
    return newest


# The rest of a table counts as lost after this many consecutive failures: more rows than one page of an index holds.
_MAX_FAILURES = 50_000
# Steps grow after this many failures.
_SINGLE_STEP_FAILURES = 2_000
_MAX_ROWID = 2**63 - 1


class DamagedDatabase:
    """Database that may be damaged anywhere; `incomplete_tables`: tables of which something could not be read."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.incomplete_tables: set[str] = set()

    def columns(self, table: str) -> list[str]:
        """Return the columns of a table; none if it is missing or unreadable."""
        try:
            return list(schema.columns_of(self._db, table))
        except sqlite3.Error:
            self.incomplete_tables.add(table)
            return []

    def read_by_rowid(
        self, table: str, columns: list[str], gaps: list[tuple[int, int]], last: int = _MAX_ROWID
    ) -> Iterator[tuple[Any, ...]]:
        """Yield (rowid, columns …) of every readable row, ascending; unreadable ranges of rowids go to `gaps`."""
        sql = f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid >= ? ORDER BY rowid"
        at, failures, gap = -_MAX_ROWID, 0, 0
        while at <= last:
            has_read = False
            try:
                for row in self._db.execute(sql, (at,)):
                    rowid, *_ = row
                    if type(rowid) is not int or rowid < at:
                        raise sqlite3.DatabaseError("rowids run backwards")
                    if failures:
                        gaps.append((gap, rowid - 1))
                        failures = 0
                    yield row
                    at, has_read = rowid + 1, True
                if failures:
                    gaps.append((gap, last))
                return
            except sqlite3.Error:
                self.incomplete_tables.add(table)
            if has_read or not failures:
                gap, failures = max(at, 1), 0
            at = max(at, 0) + 1 + max(0, failures - _SINGLE_STEP_FAILURES)
            failures += 1
            if failures > _MAX_FAILURES:
                break
        gaps.append((gap, last))

    def read_by_key(self, table: str, key: list[str], columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of a table WITHOUT ROWID, from its beginning to the damage and from its end to the damage."""
        seen = set()
        width = len(key)
        for direction in ("", " DESC"):
            order = ", ".join(f"{name}{direction}" for name in key)
            try:
                for row in self._db.execute(f"SELECT {', '.join([*key, *columns])} FROM {table} ORDER BY {order}"):
                    if row[:width] not in seen:
                        seen.add(row[:width])
                        yield row
                return
            except sqlite3.Error:
                self.incomplete_tables.add(table)

    def read_orphaned_rows(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield (rowid, values) of every row of any table, deleted ones too, in any page that is left."""
        path = str(self._db.execute("PRAGMA database_list").fetchone()[2])
        return read_leaf_rows(Path(path))

    def try_query(self, sql: str, *values: int) -> list[tuple[Any, ...]] | None:
        """Return all rows of a statement; None if one of them cannot be read."""
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error:
            return None
