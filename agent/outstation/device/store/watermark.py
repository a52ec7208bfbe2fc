"""Watermark: the progress of the store in a small file beside it, by which a store detects lost commits.

A database whose write-ahead log was cut, whose file was restored from a copy, or whose disk lied about a flush opens
without an error, but in an earlier state. The watermark is written after each commit without fsync, so after a power
cut it may be behind the database; it is ahead of it only if commits were lost.

Two slots are written in turn, each with a number and a CRC: if a crash tears one, the other is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import struct
import zlib
from pathlib import Path

import msgspec

from outstation.device.store.tables import meta
from outstation.foundation import decoders

log = logging.getLogger("outstation")

FILE_NAME = "watermark"
_MAGIC = b"outmark1"
# Magic, number of the write, length, CRC-32 of number, length and body.
_HEADER = struct.Struct("<8sQII")
_SLOT = 64 << 10
_FIRST_PAGE_OFFSET = 2 * _SLOT
_FIRST_PAGE = 4096
# Stands for a stream's fields of which only the CRC-32 is known.
_CRC_PREFIX = "crc32:"


class WatermarkState(msgspec.Struct):
    """Last seq of the log with its digest, next rows of streams, cursors of tasks, counters of operator keys.

    `streams`: name → (id, CRC-32 of its fields, next row); `labels`: task → number of its newest label.
    """

    log: str
    seq: int
    digest: str
    boot: int
    device: str
    streams: dict[str, tuple[int, int, int]]
    cursors: dict[str, int]
    commands: dict[str, int] = {}
    labels: dict[str, int] = {}


class TransactionProgress(msgspec.Struct):
    """Progress of one transaction; `needs_refresh` if it changed more than these members."""

    rows: dict[str, int] = msgspec.field(default_factory=dict)
    cursors: dict[str, int] = msgspec.field(default_factory=dict)
    labels: dict[str, int] = msgspec.field(default_factory=dict)
    log_head: tuple[int, str] | None = None
    needs_refresh: bool = False


_ENCODER, _DECODER = msgspec.msgpack.Encoder(), decoders.msgpack_decoder(WatermarkState)


class Watermark:
    """Open watermark file. A failed write is logged and otherwise ignored: the watermark only detects."""

    def __init__(self, folder: Path) -> None:
        self._file = os.open(folder / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._database: int | None = None
        self._write_number, self._is_warned = 0, False
        self.state: WatermarkState | None = None
        for at in (0, _SLOT):
            number, body = _unframe(os.pread(self._file, _SLOT, at))
            if number > self._write_number:
                with contextlib.suppress(msgspec.MsgspecError):
                    self.state, self._write_number = _DECODER.decode(body), number

    def update(self, db: sqlite3.Connection, progress: TransactionProgress) -> None:
        """Record the transaction that was just committed."""
        if self.state is None or progress.needs_refresh:
            self.save(from_database(db))
            return
        if not (progress.rows or progress.cursors or progress.labels or progress.log_head):
            return
        for stream, next_row in progress.rows.items():
            self.state.streams[stream] = (*self.state.streams[stream][:2], next_row)
        self.state.cursors.update(progress.cursors)
        self.state.labels.update(progress.labels)
        if progress.log_head:
            self.state.seq, self.state.digest = progress.log_head
        self.save(self.state)

    def save(self, state: WatermarkState) -> None:
        self.state = state
        self._write_number += 1
        self._write(self._write_number % 2 * _SLOT, self._write_number, _ENCODER.encode(state))

    @property
    def first_page(self) -> bytes | None:
        """First page of the database when it was last opened intact, which locates the tables; None if not known."""
        number, body = _unframe(os.pread(self._file, _SLOT, _FIRST_PAGE_OFFSET))
        return body if number else None

    def save_first_page(self, database: Path) -> None:
        """Save the first page of an open database.

        Closing any descriptor of it would drop SQLite's locks, so the descriptor stays open until `close`.
        """
        if self._database is None:
            self._database = os.open(database, os.O_RDONLY | os.O_CLOEXEC)
        page = os.pread(self._database, _FIRST_PAGE, 0)
        if page != self.first_page:
            self._write(_FIRST_PAGE_OFFSET, 1, page)

    def close(self) -> None:
        """Close only after the connection."""
        os.close(self._file)
        if self._database is not None:
            os.close(self._database)

    def _write(self, offset: int, number: int, body: bytes) -> None:
        try:
            if len(body) > _SLOT - _HEADER.size:
                raise OSError(f"{len(body)} bytes do not fit")
            os.pwrite(self._file, _frame(number, body), offset)
        except OSError as error:
            if not self._is_warned:
                log.error("file %s in the data folder: %s; lost commits will be detected late", FILE_NAME, error)
            self._is_warned = True


def from_database(db: sqlite3.Connection) -> WatermarkState:
    """Read the progress from the database itself."""
    values = {key: meta.get(db, key, "") for key in ("log", "seq", "digest", "boot", "device")}
    streams = {
        str(name): (int(number), fields_crc(str(fields)), int(next_row))
        for number, name, fields, next_row in db.execute("SELECT id, name, fields, next_row FROM checked_streams")
    }
    cursors = {str(task): int(row) for task, row in db.execute("SELECT task, row FROM checked_cursors")}
    commands = {str(kid): int(n) for kid, n in db.execute("SELECT kid, counter FROM checked_command_counters")}
    newest = db.execute("SELECT task, max(number) FROM labels WHERE number > 0 GROUP BY task")
    labels = {str(task): int(number) for task, number in newest}
    # A value that is no number was damaged.
    seq, boot = (int(values[key]) if values[key].isdecimal() else 0 for key in ("seq", "boot"))
    return WatermarkState(
        values["log"], seq, values["digest"], boot, values["device"], streams, cursors, commands, labels
    )


def load(folder: Path) -> WatermarkState | None:
    """Load the watermark in `folder`; None if there is no intact one."""
    if not (folder / FILE_NAME).exists():
        return None
    with contextlib.closing(Watermark(folder)) as watermark:
        return watermark.state


def fields_crc(fields: str) -> int:
    """Return the CRC-32 of a stream's fields, also of their placeholder."""
    if is_placeholder(fields):
        return int(fields.removeprefix(_CRC_PREFIX), 16)
    return zlib.crc32(fields.encode())


def fields_placeholder(crc: int) -> str:
    """Return a placeholder for a stream's fields if only their CRC survived."""
    return f"{_CRC_PREFIX}{crc:08x}"


def is_placeholder(fields: str) -> bool:
    """Return True if only the CRC of these fields is known."""
    return fields.startswith(_CRC_PREFIX)


def matches_fields(stored: str, expected: object) -> bool:
    """Return True if a stream's stored fields are, or may be, the expected ones."""
    if is_placeholder(stored):
        return fields_crc(stored) == fields_crc(json.dumps(expected))
    return bool(json.loads(stored) == expected)


def _frame(number: int, body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, number, len(body), _crc(number, body)) + body


def _unframe(data: bytes) -> tuple[int, bytes]:
    """Return (number, body); number 0 if the slot is torn."""
    if len(data) < _HEADER.size:
        return 0, b""
    magic, number, length, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size : _HEADER.size + length]
    return (number, body) if magic == _MAGIC and len(body) == length and crc == _crc(number, body) else (0, b"")


def _crc(number: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(struct.pack("<QI", number, len(body))))
