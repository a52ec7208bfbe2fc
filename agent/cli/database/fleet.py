"""Commands `outstation fleet db`: tables, rows and SQL of the collector's SQLite database."""

from __future__ import annotations

from pathlib import Path

import click
import sqlite_utils

from agent.cli.database.inspection import add_commands, open_database
from agent.cli.fleet.common import database_url, db_option, fleet_option
from agent.cli.groups import SentenceGroup
from agent.device.store.tables.sqlite_errors import connect_read_only
from agent.errors import UsageError
from agent.fleet import config as fleet_config


@click.group("db", cls=SentenceGroup)
def database_group() -> None:
    """Look into the collector's database, read only, beside a running collector."""


def _open(db: str | None, home: Path) -> sqlite_utils.Database:
    from agent.fleet.database.interface import display_name, is_postgresql

    config = fleet_config.load(home)
    location = database_url(config, db)
    if is_postgresql(location):
        raise UsageError(f"{display_name(location)} is PostgreSQL: open it with psql; these commands read SQLite")
    if not Path(location).exists():
        raise UsageError(f"{location}: no database yet; start `outstation fleet collect` once")
    return open_database(connect_read_only(Path(location)))


add_commands(
    database_group,
    "outstation fleet db",
    [db_option, fleet_option],
    _open,
    table="messages",
    sql="SELECT device, count(*) FROM messages GROUP BY device",
)
