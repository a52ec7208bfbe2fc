"""Log of a command: to standard error, each message on one printable line."""

from __future__ import annotations

import logging

from agent.text import printable, printable_lines


def configure_logging(level: int, layout: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(layout))
    logging.basicConfig(level=level, handlers=[handler])


class PrintableFormatter(logging.Formatter):
    """Log formatter that keeps each message on one line and everything printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        return printable_lines(super().formatException(ei))  # type: ignore[arg-type]
