"""A mark on the disk for as long as a model runs: the start that finds it set knows what the one before died of.

The mark is written and not synced. It outlives the process, however that ends, which is what a model can do; it may not
outlive a power cut, and one that does is of another boot and counts for nothing: no model takes the kernel down.
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

from agent import clock

log = logging.getLogger("outstation")

FILE = "running"
_SIZE = 1024
_MAGIC = b"outrun01"
# magic, length, CRC-32 of the body.
_HEAD = struct.Struct("<8sII")


class CrashRecord(msgspec.Struct, frozen=True):
    """Which bundle ran for which task, in which boot; `id` tells it from every other mark."""

    task: str
    digest: str
    boot: str
    id: str


class CrashMarker:
    """The file in `folder`, for the one process that has the store. What it cannot write it does without.

    `left` is what the process before left set, None where it left nothing or the machine was started anew since.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._boot, self._process = clock.boot_id(), f"{os.getpid()}/{time.monotonic_ns()}"
        self._run_counter, self._has_logged_error = itertools.count(1), False
        found = _read(self._path)
        self.previous_run = found if found is not None and found.boot == self._boot else None

    @contextlib.contextmanager
    def guard_run(self, task: str, digest: str) -> Iterator[None]:
        """Set while the model of bundle `digest` is loaded or run for `task`; an error it raises is no crash."""
        self._write(_encode(CrashRecord(task, digest, self._boot, f"{self._process}/{next(self._run_counter)}")))
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        self._write(bytes(_SIZE))

    def _write(self, data: bytes) -> None:
        try:
            # Opened each time, for some 10 µs a batch: nothing to close, and nothing goes on in a deleted file.
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, data, 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._has_logged_error:
                log.error("file %s in the data folder: %s; a model that ends the agent is not found out", FILE, error)
            self._has_logged_error = True


def _encode(record: CrashRecord) -> bytes:
    body = msgspec.json.encode(record)
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def _read(path: Path) -> CrashRecord | None:
    try:
        return _decode(path.read_bytes())
    except OSError:
        return None


def _decode(data: bytes) -> CrashRecord | None:
    """The mark; None where there is none that is whole."""
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
