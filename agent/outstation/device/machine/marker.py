"""Marker: a file with a record of what is in hand, so that the next start knows what ended the process.

The marker is written but not synced. It survives the end of the process, whatever ended it. It may survive a power cut
as well; a marker of another boot then counts for nothing, since nothing in hand takes down the kernel.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from outstation.foundation import clock, decoders, input_files

log = logging.getLogger("outstation")

_MAGIC = b"outmark1"
# magic, length, CRC-32 of the body.
_HEAD = struct.Struct("<8sII")
Record = TypeVar("Record", bound=msgspec.Struct)


class Marker(Generic[Record]):
    """Marker at `path`, for one process. Write errors are logged once and ignored: `undetected` names the effect.

    `previous` is the record that the previous process of this boot left when it ended; None if it left none.
    """

    def __init__(self, path: Path, record_type: type[Record], undetected: str) -> None:
        self._path, self._boot, self._undetected = path, clock.boot_id(), undetected
        self._has_logged_error = False
        try:
            self.previous = decode(input_files.read_bytes(path), self._boot, record_type)
        except OSError:
            self.previous = None

    def write(self, record: Record) -> None:
        self._write(encode(self._boot, record))

    def clear(self) -> None:
        self._write(bytes(_HEAD.size))

    def _write(self, data: bytes) -> None:
        try:
            # Opened each time, at 10 µs a batch: nothing to close, and no writes go to a deleted file.
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, data, 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._has_logged_error:
                log.error("%s: %s; %s is not detected", self._path, error.strerror, self._undetected)
            self._has_logged_error = True


def encode(boot: str, record: msgspec.Struct) -> bytes:
    body = msgspec.json.encode((boot, record))
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def decode(data: bytes, boot: str, record_type: type[Record]) -> Record | None:
    """Return the record, or None if there is none, it is damaged, or it is of another boot."""
    if len(data) < _HEAD.size:
        return None
    magic, length, crc = _HEAD.unpack_from(data)
    body = data[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or len(body) != length or zlib.crc32(body) != crc:
        return None
    try:
        of_boot, record = decoders.from_json(body, tuple[str, record_type])  # type: ignore[valid-type]
    except msgspec.MsgspecError:
        return None
    return record if of_boot == boot else None
