"""Crash marker: a file that is set while a model runs, so that the next start knows which bundle ended the daemon.

The marker is written but not synced. It survives the end of the process, whatever a model does. It may survive a power
cut as well; a marker of another boot then counts for nothing, since no model takes down the kernel.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent import clock, input_files

log = logging.getLogger("outstation")

FILE = "running"
_SIZE = 1024
_MAGIC = b"outrun01"
# magic, length, CRC-32 of the body.
_HEAD = struct.Struct("<8sII")


class CrashRecord(msgspec.Struct, frozen=True):
    """Run of a bundle for a task, in a boot; `id` is unique among all runs."""

    task: str
    digest: str
    boot: str
    id: str


class CrashMarker:
    """Marker file in `folder`, for the one process that holds the store. Write errors are logged once and ignored.

    `previous_run` is the run during which the previous process of this boot ended; None if it ended otherwise.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._boot, self._process = clock.boot_id(), f"{os.getpid()}/{time.monotonic_ns()}"
        self._run_counter, self._has_logged_error = itertools.count(1), False
        try:
            record = _decode(input_files.read_bytes(self._path))
        except OSError:
            record = None
        self.previous_run = record if record is not None and record.boot == self._boot else None

    @contextlib.contextmanager
    def guard_run(self, task: str, digest: str) -> Iterator[None]:
        """Set the marker while the model of bundle `digest` is loaded or runs for `task`; an exception is no crash."""
        self._write(_encode(CrashRecord(task, digest, self._boot, f"{self._process}/{next(self._run_counter)}")))
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        self._write(bytes(_SIZE))

    def _write(self, data: bytes) -> None:
        try:
            # Opened each time, at 10 µs a batch: nothing to close, and no writes go to a deleted file.
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, data, 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._has_logged_error:
                log.error("file %s in the data folder: %s; a model that ends the daemon is not detected", FILE, error)
            self._has_logged_error = True


def _encode(record: CrashRecord) -> bytes:
    body = msgspec.json.encode(record)
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def _decode(data: bytes) -> CrashRecord | None:
    """Return the record, or None if there is none or it is damaged."""
    if len(data) < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack_from(data)
    body = data[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        return msgspec.json.decode(body, type=CrashRecord)
    except msgspec.MsgspecError:
        return None
