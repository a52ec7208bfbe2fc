"""Commands `outstation fleet db`: tables, rows and SQL of the collector's SQLite database."""

from __future__ import annotations

from pathlib import Path

import click
import sqlite_utils

from outstation.device.store.tables.sqlite_errors import connect_read_only
from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_url, db_option, fleet_option
from outstation.foundation.cli.groups import SentenceGroup
from outstation.foundation.cli.inspection import add_commands, open_database
from outstation.foundation.errors import UsageError


@click.group(
    "db",
    cls=SentenceGroup,
    headings={
        "Tables": ("tables", "schema", "rows", "query"),
        "Whole databases": ("export", "sql", "prune", "rebuild", "migrate"),
    },
    places={
        "export": "outstation.fleet.cli.data.export:export",
        "migrate": "outstation.fleet.cli.data.migrate:migrate",
        "prune": "outstation.fleet.cli.data.prune:prune",
        "rebuild": "outstation.fleet.cli.data.rebuild:rebuild",
        "sql": "outstation.fleet.cli.data.export:sql",
    },
)
def database_group() -> None:
    """Look into the collector's database, beside a running collector; export, prune, rebuild and move it whole."""


def _open(db: str | None, home: Path) -> sqlite_utils.Database:
    from outstation.fleet.database.interface import display_name, is_postgresql

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
