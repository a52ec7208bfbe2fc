"""Log of a simulation: warnings of all machines, each with the machine and its simulated time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from outstation.foundation.text import format_span, printable
from outstation.workbench.testing.simulation.machine import MachineRoom

_MAX_LINES = 100_000


class MachineLog(logging.Handler):
    """Handler that passes a line for each warning or error to `write`, up to a limit."""

    def __init__(self, room: MachineRoom, write: Callable[[str], object], max_lines: int = _MAX_LINES) -> None:
        super().__init__(logging.WARNING)
        self._room, self._write, self._lines_left = room, write, max_lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines_left -= 1
        if self._lines_left < 0:
            return
        place = f"{format_span(self._room.now_s)} {self._room.current.name}"
        text = printable(f"{place}: {record.levelname.lower()}: {record.getMessage()}")
        try:
            with self._room.uncounted():
                self._write(text if self._lines_left else "more warnings are left out")
        except OSError:
            # A full disk is not the failure of the simulated machine that warns.
            self.handleError(record)


@contextmanager
def written_log(room: MachineRoom, file: Path) -> Iterator[None]:
    """Write the warnings to a file instead of standard error. Raises OSError."""
    with file.open("w", buffering=1, encoding="utf-8") as lines:
        handler = MachineLog(room, lambda line: lines.write(f"{line}\n"))
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
