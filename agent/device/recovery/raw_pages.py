"""Rows that a damaged tree does not lead to any more: every page of the file is looked at for table leaves.

What is found may be a row that was deleted; who uses it must know a good one by its contents.
Source: sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (records) and 4.1 (the write-ahead log).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PAGE = 4096
_LEAF = 0x0D
_MOST_BYTES = 64 << 20
_FRAME = struct.Struct(">II8s8x")
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
# How much of a record stays in its cell when the rest runs over to other pages.
_MOST_LOCAL, _LEAST_LOCAL = PAGE - 35, (PAGE - 12) * 32 // 255 - 23


class Pages:
    """Pages of a database file of 4096-byte pages, the newer ones from the committed part of its write-ahead log."""

    def __init__(self, database: BinaryIO, log: BinaryIO | None) -> None:
        self._database, self._log = database, log
        self.count = (database.seek(0, 2) + PAGE - 1) // PAGE
        self._newer = _committed(log) if log else {}
        self.count = max([self.count, *self._newer])

    def __getitem__(self, number: int) -> bytes:
        """Page `number`, counted from 1; empty where there is none."""
        if self._log is not None and number in self._newer:
            self._log.seek(self._newer[number])
            return self._log.read(PAGE)
        self._database.seek((number - 1) * PAGE)
        return self._database.read(PAGE)


def rows(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """(rowid, values) of every record in a table leaf of the database at `path`, in the order of the file."""
    with path.open("rb") as database:
        log_path = path.with_name(path.name + "-wal")
        log = log_path.open("rb") if log_path.exists() else None
        try:
            pages = Pages(database, log)
            for number in range(2, pages.count + 1):
                page = pages[number]
                if len(page) == PAGE and page[0] == _LEAF:
                    yield from _cells(page, pages)
        finally:
            if log is not None:
                log.close()


def _cells(page: bytes, pages: Pages) -> Iterator[tuple[int, list[Any]]]:
    for index in range(min(int.from_bytes(page[3:5], "big"), PAGE // 4)):
        at = int.from_bytes(page[8 + 2 * index : 10 + 2 * index], "big")
        try:
            size, at = _varint(page, at)
            rowid, at = _varint(page, at)
            if size <= _MOST_BYTES:
                yield rowid, _record(_payload(page, at, size, pages))
        except (IndexError, ValueError):
            continue


def _payload(page: bytes, at: int, size: int, pages: Pages) -> bytes:
    if size <= _MOST_LOCAL:
        return page[at : at + size]
    local = _LEAST_LOCAL + (size - _LEAST_LOCAL) % (PAGE - 4)
    local = local if local <= _MOST_LOCAL else _LEAST_LOCAL
    parts, left = [page[at : at + local]], size - local
    following = int.from_bytes(page[at + local : at + local + 4], "big")
    while left > 0 and following:
        more = pages[following]
        if len(more) < 4:
            break
        parts.append(more[4 : 4 + min(left, PAGE - 4)])
        left -= len(parts[-1])
        following = int.from_bytes(more[:4], "big")
    return b"".join(parts)


def _record(payload: bytes) -> list[Any]:
    """The values of a record. Raises ValueError, IndexError where it is none."""
    end, at = _varint(payload, 0)
    kinds = []
    while at < end:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        size = _INTEGERS.get(kind, 8 if kind == 7 else 0 if kind < 12 else (kind - 12) // 2)
        part = payload[at : at + size]
        if len(part) < size:
            raise ValueError("cut off")
        values.append(_value(kind, part))
        at += size
    return values


def _value(kind: int, part: bytes) -> Any:
    if kind in _INTEGERS:
        return int.from_bytes(part, "big", signed=True)
    if kind in (8, 9):
        return kind - 8
    if kind == 7:
        return struct.unpack(">d", part)[0]
    # Texts as bytes: whether they are texts is not said here.
    return part if kind >= 12 else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        byte = data[at + index]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + index + 1
    return value << 8 | data[at + 8], at + 9


def _committed(log: BinaryIO) -> dict[int, int]:
    """Page number → where its newest committed image is in the write-ahead log."""
    salts = log.read(32)[16:24]
    newest: dict[int, int] = {}
    waiting: dict[int, int] = {}
    while len(head := log.read(_FRAME.size)) == _FRAME.size:
        number, commit, salt = _FRAME.unpack(head)
        at = log.tell()
        if salt != salts or len(log.read(PAGE)) < PAGE:
            break
        waiting[number] = at
        if commit:
            newest |= waiting
            waiting = {}
    return newest
