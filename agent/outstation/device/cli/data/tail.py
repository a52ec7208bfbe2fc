"""Command `outstation tail`: the newest readings of a stream, read from the store beside the running daemon."""

from __future__ import annotations

from typing import Any

import click

from outstation.device import newest
from outstation.device.bootstrap import device
from outstation.device.config.streams import NO_STREAM
from outstation.foundation.cli.follow import (
    Column,
    LinePrinter,
    emit_or_follow,
    follow_option,
    format_reading,
    format_time,
    last_option,
)
from outstation.foundation.cli.options import config_options
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError

_MAX_FIELDS = 12


@click.command(epilog="Example: outstation tail watch --last 5 --follow")
@click.argument("stream")
@last_option
@follow_option
@config_options
def tail(stream: str, last: int, follow: bool, config_file: str | None, as_json: bool) -> None:
    """Show the newest readings of STREAM, newest last, with time, clock and values.

    With --follow and --json, each reading is one line of JSON.
    """
    file, conf = device.load_config(config_file)
    if stream not in conf.streams:
        raise UsageError(f"{file}: there is no stream {stream!r}{did_you_mean(stream, conf.streams, NO_STREAM)}")
    settings = conf.streams[stream]
    names = [field.name for field in settings.fields[:_MAX_FIELDS]]
    with device.open_store_read_only(conf) as store:
        # First: --follow misses no row that is stored between the two.
        last_row = store.last_row(stream)
        rows = newest.read_readings(store, stream, settings, last)
        last_row = rows[-1]["row"] if rows else last_row

        def read_new() -> list[dict[str, Any]]:
            nonlocal last_row
            new = newest.read_new_readings(store, stream, settings, last_row)
            last_row = new[-1]["row"] if new else last_row
            return new

        columns = [Column("time", 24), Column("row", 9, is_number=True), Column("clock", 8)]
        columns += [Column(name, 10, is_number=True) for name in names]
        more = len(settings.fields) - len(names)

        def to_cells(row: dict[str, Any]) -> list[str]:
            values = [format_reading(row["values"][name]) for name in names]
            return [
                format_time(row["time"]),
                str(row["row"]),
                row["clock"],
                *values,
                *([f"and {more} more"] if more else []),
            ]

        columns += [Column("", 0)] if more else []
        empty = f"No reading of stream {stream} is stored."
        emit_or_follow(rows, read_new if follow else None, LinePrinter(columns, to_cells), empty, as_json)
