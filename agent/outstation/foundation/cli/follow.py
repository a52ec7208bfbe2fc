"""Lists that grow: print rows, and with --follow each new one as it comes, as text or as lines of JSON."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec

from outstation.foundation.cli.output import echo, echo_styled, emit
from outstation.foundation.text import count_columns, pad, printable, printable_json

last_option = click.option(
    "--last", metavar="N", default=20, show_default=True, type=click.IntRange(1, 10_000), help="The newest N."
)
follow_option = click.option("--follow", is_flag=True, help="Also print new ones as they come, until Ctrl-C.")


def format_time(time: str) -> str:
    """Return an RFC 3339 time in UTC as people read it, to the millisecond."""
    return f"{time[:10]} {time[11:23]}Z"


def format_reading(value: float | str | None) -> str:
    """Return a value of a row with six digits; a dash for a missing one."""
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


class Column(msgspec.Struct, frozen=True):
    """Column of `width` characters at least; 0 for the last one. Numbers stand to the right."""

    name: str
    width: int
    is_number: bool = False


class LinePrinter:
    """Prints rows as aligned lines below a head. Columns grow with what they hold."""

    def __init__(self, columns: Sequence[Column], to_cells: Callable[[dict[str, Any]], Sequence[str]]) -> None:
        self._columns, self._to_cells = columns, to_cells
        self._widths = [max(column.width, count_columns(column.name)) for column in columns]
        self._has_head = False

    def print_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        lines = [[printable(cell) for cell in self._to_cells(row)] for row in rows]
        for line in lines:
            self._widths = [max(width, count_columns(cell)) for width, cell in zip(self._widths, line, strict=True)]
        if rows and not self._has_head:
            echo_styled(click.style(self._align([printable(column.name) for column in self._columns]), bold=True))
            self._has_head = True
        for line in lines:
            echo_styled(self._align(line))

    def _align(self, cells: Sequence[str]) -> str:
        columns = zip(cells, self._widths, self._columns, strict=True)
        return "  ".join(pad(c, w, right=column.is_number) for c, w, column in columns).rstrip()


def emit_or_follow(
    rows: Sequence[dict[str, Any]],
    read_new: Callable[[], Sequence[dict[str, Any]]] | None,
    printer: LinePrinter,
    empty: str,
    as_json: bool,
    poll_s: float = 0.5,
) -> None:
    """Print `rows`; with `read_new`, continue until Ctrl-C, or until the reader of the output ends.

    `read_new` is called each `poll_s` seconds. As JSON the rows are one document, or with `read_new` a line each.
    """
    if read_new is None:
        emit(rows, as_json, lambda: _print_all(rows, printer, empty))
        return
    with contextlib.suppress(KeyboardInterrupt):
        if not as_json:
            _print_all(rows, printer, empty)
        while True:
            if as_json:
                for row in rows:
                    click.echo(printable_json(msgspec.json.encode(row).decode()))
            sys.stdout.flush()
            time.sleep(poll_s)
            rows = read_new()
            if not as_json:
                printer.print_rows(rows)


def _print_all(rows: Sequence[dict[str, Any]], printer: LinePrinter, empty: str) -> None:
    if not rows:
        echo(empty)
        return
    printer.print_rows(rows)
