"""File marker: a file that is set while a watched file is decoded, so that the next start knows what was in hand.

As `agent/device/bundles/crash_marker.py`, it is not synced, and a marker of another boot counts for nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent import clock, input_files

log = logging.getLogger("outstation.files")

_SIZE = 1024
MAX_DEATHS = 2


class _Marked(msgspec.Struct, frozen=True):
    """File `name`, read up to `line`, during which `deaths` processes in a row ended."""

    name: str
    line: int
    deaths: int
    boot: str


class FileMarker:
    """Marker at `path`, for one process. Write errors are logged once and ignored."""

    def __init__(self, path: Path) -> None:
        self._path, self._boot, self._has_logged_error = path, clock.boot_id(), False
        self._previous: _Marked | None = None
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            marked = msgspec.json.decode(input_files.read_bytes(path).rstrip(b"\0"), type=_Marked)
            self._previous = marked if marked.boot == self._boot else None

    def count_deaths(self, name: str, line: int) -> int:
        """Return how many processes in a row ended while they read this file after this line."""
        previous = self._previous
        return previous.deaths if previous is not None and (previous.name, previous.line) == (name, line) else 0

    @contextlib.contextmanager
    def guard(self, name: str, line: int) -> Iterator[None]:
        """Set the marker while a file is decoded; an exception is no death."""
        marked = _Marked(name, line, self.count_deaths(name, line) + 1, self._boot)
        self._write(msgspec.json.encode(marked).ljust(_SIZE, b"\0"))
        try:
            yield
        finally:
            self._write(bytes(_SIZE))

    def _write(self, data: bytes) -> None:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(file, data, 0)
            finally:
                os.close(file)
        except OSError as error:
            if not self._has_logged_error:
                log.error("%s: %s; a file that ends the daemon is not detected", self._path, error.strerror)
            self._has_logged_error = True
