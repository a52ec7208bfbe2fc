"""What devices wrote, for people: everything that could steer a terminal is escaped."""

from __future__ import annotations

from collections.abc import Sequence

import click

from agent.cli import output
from agent.text import printable


def print_lines(*lines: str) -> None:
    for line in lines:
        click.echo(printable(line))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    cells = [[cell if isinstance(cell, int) else printable(str(cell)) for cell in row] for row in rows]
    output.print_table(columns, cells, empty)
