"""Commands `outstation db`: tables, rows, SQL and readings of the device's store, beside a running daemon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import sqlite_utils

from outstation.device import newest
from outstation.device.bootstrap import device
from outstation.device.config import StreamConfig
from outstation.device.config.streams import NO_STREAM
from outstation.device.store.store import DATABASE, Store
from outstation.device.store.tables import row_crc
from outstation.device.store.tables.sqlite_errors import connect_read_only
from outstation.foundation import clock
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.inspection import add_commands, open_database
from outstation.foundation.cli.options import MOMENT, config_option, config_options
from outstation.foundation.cli.row_output import csv_option, print_rows, require_one_format
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError


@click.group("db", cls=SentenceGroup)
def database_group() -> None:
    """Look into the device's store, read only, beside a running daemon."""


@database_group.command(epilog='Example: outstation db readings watch --since "2 h" --csv > watch.csv')
@click.argument("stream")
@click.option("--since", type=MOMENT, help='Only readings of this time or later: "2 h", 2026-11-24 or a time.')
@click.option("--until", type=MOMENT, help="Only readings before this time.")
@csv_option
@config_options
def readings(
    stream: str, since: str | None, until: str | None, as_csv: bool, config_file: str | None, as_json: bool
) -> None:
    """Show the readings of STREAM, oldest first: `tail` follows the newest."""
    require_one_format(as_csv, as_json)
    file, conf = device.load_config(config_file)
    if stream not in conf.streams:
        raise UsageError(f"{file}: there is no stream {stream!r}{did_you_mean(stream, conf.streams, NO_STREAM)}")
    settings = conf.streams[stream]
    names = [field.name for field in settings.fields]
    with device.open_store_read_only(conf) as store:
        cells = (
            [row["row"], row["time"], row["clock"], *row["values"].values()]
            for row in _iterate_readings(store, stream, settings, since or "", until or "~")
        )
        print_rows(["row", "time", "clock", *names], cells, as_csv=as_csv, as_json=as_json)


def _iterate_readings(
    store: Store, stream: str, settings: StreamConfig, begin: str, end: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a range of time; chunks that cannot hold one are not read."""
    begin_us = clock.parse_rfc3339(begin) if begin else -(2**63)
    end_us = clock.parse_rfc3339(end) if end != "~" else 2**63 - 1
    last = store.first_row(stream) - 1
    while (row := store.find_row_near(stream, last, begin_us, end_us)) is not None:
        new = newest.read_new_readings(store, stream, settings, row - 1)
        yield from (reading for reading in new if begin <= reading["time"] < end)
        # Nothing where the rest cannot be read.
        last = new[-1]["row"] if new else store.last_row(stream)


def _open(config_file: str | None) -> sqlite_utils.Database:
    _, conf = device.load_config(config_file)
    device.open_store_read_only(conf).close()
    connection = connect_read_only(conf.data_dir / DATABASE)
    row_crc.install(connection, writes=False)
    return open_database(connection)


add_commands(
    database_group,
    "outstation db",
    [config_option],
    _open,
    table="alerts",
    sql="SELECT task, sum(n) FROM predictions GROUP BY task",
)
