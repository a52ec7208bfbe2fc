"""Rows that a damaged tree does not lead to any more: every page of the file is looked at for table leaves.

What is found may be a row that was deleted; who uses it must know a good one by its contents.
Source: sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (records) and 4.1 (the write-ahead log).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PAGE_SIZE = 4096
_TABLE_LEAF = 0x0D
_MAX_RECORD_BYTES = 64 << 20
_FRAME_HEADER = struct.Struct(">II8s8x")
_INTEGER_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
# How much of a record stays in its cell when the rest runs over to other pages.
_MAX_LOCAL, _MIN_LOCAL = PAGE_SIZE - 35, (PAGE_SIZE - 12) * 32 // 255 - 23


class DatabasePages:
    """Pages of a database file of 4096-byte pages, the newer ones from the committed part of its write-ahead log."""

    def __init__(self, database: BinaryIO, log: BinaryIO | None) -> None:
        self._database, self._log = database, log
        self.count = (database.seek(0, 2) + PAGE_SIZE - 1) // PAGE_SIZE
        self._wal_offsets = _committed_frames(log) if log else {}
        self.count = max([self.count, *self._wal_offsets])

    def __getitem__(self, number: int) -> bytes:
        """Page `number`, counted from 1; empty where there is none."""
        if self._log is not None and number in self._wal_offsets:
            self._log.seek(self._wal_offsets[number])
            return self._log.read(PAGE_SIZE)
        self._database.seek((number - 1) * PAGE_SIZE)
        return self._database.read(PAGE_SIZE)


def read_leaf_rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """(rowid, values) of every record in a table leaf of the database at `path`, in the order of the file."""
    with path.open("rb") as database:
        log_path = path.with_name(path.name + "-wal")
        log = log_path.open("rb") if log_path.exists() else None
        try:
            pages = DatabasePages(database, log)
            for number in range(2, pages.count + 1):
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
    """The values of a record. Raises ValueError, IndexError where it is none."""
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
        values.append(_decode_value(kind, part))
        at += size
    return values


def _decode_value(serial_type: int, part: bytes) -> Any:
    if serial_type in _INTEGER_SIZES:
        return int.from_bytes(part, "big", signed=True)
    if serial_type in (8, 9):
        return serial_type - 8
    if serial_type == 7:
        return struct.unpack(">d", part)[0]
    # Texts as bytes: whether they are texts is not said here.
    return part if serial_type >= 12 else None


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[offset + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, offset + index + 1
    return value << 8 | data[offset + 8], offset + 9


def _committed_frames(log: BinaryIO) -> dict[int, int]:
    """Page number → where its newest committed image is in the write-ahead log."""
    salts = log.read(32)[16:24]
    newest: dict[int, int] = {}
    waiting: dict[int, int] = {}
    while len(head := log.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
        number, commit, salt = _FRAME_HEADER.unpack(head)
        at = log.tell()
        if salt != salts or len(log.read(PAGE_SIZE)) < PAGE_SIZE:
            break
        waiting[number] = at
        if commit:
            newest |= waiting
            waiting = {}
    return newest
