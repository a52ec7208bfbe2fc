"""File marker: it is set while a watched file is decoded, so that the next start knows what was in hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from outstation.device.machine.marker import Marker

MAX_DEATHS = 2


class FileRecord(msgspec.Struct, frozen=True):
    """File `name`, read up to `line`, during which `deaths` processes in a row ended."""

    name: str
    line: int
    deaths: int


class FileMarker(Marker[FileRecord]):
    """Marker of the file in hand, at `path`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, FileRecord, "a file that ends the daemon")

    def count_deaths(self, name: str, line: int) -> int:
        """Return how many processes in a row ended while they read this file after this line."""
        previous = self.previous
        return previous.deaths if previous is not None and (previous.name, previous.line) == (name, line) else 0

    @contextlib.contextmanager
    def guard(self, name: str, line: int) -> Iterator[None]:
        """Set the marker while a file is decoded; an exception is no death."""
        self.write(FileRecord(name, line, self.count_deaths(name, line) + 1))
        try:
            yield
        finally:
            self.clear()
