"""Rows of a query as a table, CSV or a JSON array; rows are printed as they come."""

from __future__ import annotations

import csv
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import click
import msgspec

from outstation.foundation.cli.output import echo, print_table
from outstation.foundation.errors import UsageError
from outstation.foundation.text import csv_text, format_value, printable_json

_MAX_ROWS = 1000

csv_option = click.option(
    "--csv", "as_csv", is_flag=True, help="Print CSV; text that a spreadsheet would run is quoted."
)


def require_one_format(as_csv: bool, as_json: bool) -> None:
    """Raise UsageError if both formats are asked for."""
    if as_csv and as_json:
        raise UsageError("--csv and --json: choose one of them")


def print_rows(names: Sequence[str], rows: Iterator[Sequence[Any]], *, as_csv: bool, as_json: bool) -> None:
    """Print all rows as CSV or JSON, or the first thousand as a table."""
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([csv_text(name) for name in names])
        for row in rows:
            writer.writerow(
                ["" if v is None else v if isinstance(v, int | float) else csv_text(_to_text(v)) for v in row]
            )
    elif as_json:
        _print_json(names, rows)
    else:
        listed = [*islice(rows, _MAX_ROWS)]
        print_table(names, [[_to_cell(value) for value in row] for row in listed], "No row.")
        if next(rows, None) is not None:
            echo(f"… more than {_MAX_ROWS} rows; --csv or --json print all", err=True)


def _print_json(names: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    """Print a JSON array, an object a row, without holding all rows."""
    separator = "["
    for row in rows:
        values = {name: _to_json_value(value) for name, value in zip(names, row, strict=True)}
        click.echo(separator + printable_json(msgspec.json.encode(values).decode()), nl=False)
        separator = ",\n"
    echo("[]" if separator == "[" else "]")


def _to_json_value(value: Any) -> Any:
    """Return a value of a query as JSON holds it; numbers that JSON has no form for become null."""
    if isinstance(value, dict):
        return {str(key): _to_json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item) for item in value]
    return msgspec.to_builtins(value, str_keys=True) if not isinstance(value, bytes) else value.hex()


def _to_cell(value: Any) -> Any:
    if isinstance(value, float):
        return format_value(value)
    if isinstance(value, bytes) and len(value) > 32:
        return f"{len(value):,} bytes"
    return "" if value is None else value if isinstance(value, int) else _to_text(value)


def _to_text(value: Any) -> str:
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return json.dumps(_to_json_value(value), ensure_ascii=False) if isinstance(value, dict | list) else str(value)
