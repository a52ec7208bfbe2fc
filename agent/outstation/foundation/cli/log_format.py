"""Log of a command: to standard error, each message on one printable line, a message that repeats counted."""

from __future__ import annotations

import logging
import time
from typing import TextIO

import msgspec

from outstation.foundation.errors import OutstationError
from outstation.foundation.text import printable, printable_lines

_INTERVAL_S = 60.0
_MAX_TRACKED = 256
# The most equal messages within one interval that are no storm.
_MAX_EQUAL = 3


def configure_logging(level: int, layout: str) -> None:
    handler = RepeatHandler()
    handler.setFormatter(PrintableFormatter(layout))
    logging.basicConfig(level=level, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """Log formatter that keeps each message on one line and everything printable.

    Only an error that no one expects is followed by its traceback.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        error = record.exc_info[1] if record.exc_info else None
        line = super().formatMessage(record)
        return printable(f"{line}: {error}" if _is_expected(error) and str(error) not in line else line)

    def formatException(self, ei: object) -> str:
        error = ei[1]  # type: ignore[index]
        return "" if _is_expected(error) else printable_lines(super().formatException(ei))  # type: ignore[arg-type]


class _Repeats(msgspec.Struct):
    """A message's first time in this interval, and how often it was written and left out since."""

    since_s: float
    line: str
    level: int
    written: int = 1
    omitted: int = 0


class RepeatHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler that writes equal messages a few times a minute, and then how many it has left out.

    Messages are equal if their texts are, or if the same exception comes from the same line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._tracked: dict[object, _Repeats] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now_s = time.monotonic()
        self._report(now_s)
        key = _repeat_key(record)
        repeats = self._tracked.get(key)
        if repeats is None:
            if len(self._tracked) >= _MAX_TRACKED:
                self._report(now_s, all_of_them=True)
            self._tracked[key] = _Repeats(now_s, record.getMessage(), record.levelno)
        elif repeats.written < (1 if record.exc_info else _MAX_EQUAL):
            repeats.written += 1
        else:
            repeats.omitted += 1
            return
        super().emit(record)

    def close(self) -> None:
        self._report(time.monotonic(), all_of_them=True)
        super().close()

    def _report(self, now_s: float, *, all_of_them: bool = False) -> None:
        """Write what was left out in intervals that have ended."""
        ended = [k for k, r in self._tracked.items() if all_of_them or now_s - r.since_s >= _INTERVAL_S]
        for key in ended:
            repeats = self._tracked.pop(key)
            if repeats.omitted:
                text = f"{repeats.omitted} times more in {now_s - repeats.since_s:.0f} s: {repeats.line}"
                super().emit(logging.LogRecord("outstation", repeats.level, "", 0, text, None, None))


def _repeat_key(record: logging.LogRecord) -> object:
    if record.exc_info and record.exc_info[1] is not None:
        error, trace = record.exc_info[1:]
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        return record.name, type(error), trace and (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return record.name, record.getMessage()


def _is_expected(error: object) -> bool:
    return isinstance(error, OSError | OutstationError)
