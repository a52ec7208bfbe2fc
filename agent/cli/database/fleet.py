"""Commands `outstation fleet db`: tables, rows and SQL of the collector's SQLite database."""

from __future__ import annotations

from pathlib import Path

import click
import sqlite_utils

from agent.cli.database.inspection import (
    limit_option,
    open_database,
    order_option,
    print_query,
    print_schema,
    print_table_rows,
    print_tables,
    where_option,
)
from agent.cli.fleet.common import database_url, db_option, fleet_option
from agent.cli.groups import SentenceGroup
from agent.cli.output import json_option
from agent.cli.row_output import csv_option
from agent.device.store.store import connect_read_only
from agent.errors import UsageError
from agent.fleet import config as fleet_config


@click.group("db", cls=SentenceGroup)
def database_group() -> None:
    """Look into the collector's database, read only, beside a running collector."""


@database_group.command(epilog="Example: outstation fleet db tables")
@db_option
@fleet_option
@json_option
def tables(db: str | None, folder: str | None, as_json: bool) -> None:
    """List tables and views with their rows and columns."""
    print_tables(_open(db, folder), as_json)


@database_group.command(epilog="Example: outstation fleet db schema messages")
@click.argument("table", required=False)
@db_option
@fleet_option
def schema(table: str | None, db: str | None, folder: str | None) -> None:
    """Show the SQL of TABLE, or of the whole database."""
    print_schema(_open(db, folder), table)


@database_group.command(epilog='Example: outstation fleet db rows messages --order "rowid desc" --csv')
@click.argument("table")
@where_option
@order_option
@limit_option
@csv_option
@db_option
@fleet_option
@json_option
def rows(
    table: str,
    where: str | None,
    order: str | None,
    limit: int,
    as_csv: bool,
    db: str | None,
    folder: str | None,
    as_json: bool,
) -> None:
    """Show rows of TABLE, which may be a view."""
    print_table_rows(_open(db, folder), table, where=where, order=order, limit=limit, as_csv=as_csv, as_json=as_json)


@database_group.command(
    epilog='Example: outstation fleet db query "SELECT device, count(*) FROM messages GROUP BY device"'
)
@click.argument("sql")
@csv_option
@db_option
@fleet_option
@json_option
def query(sql: str, as_csv: bool, db: str | None, folder: str | None, as_json: bool) -> None:
    """Run one SQL statement that reads; `-` takes it from standard input."""
    print_query(_open(db, folder), sql, as_csv=as_csv, as_json=as_json)


def _open(db: str | None, folder: str | None) -> sqlite_utils.Database:
    from agent.fleet.database.interface import display_name, is_postgresql

    config = fleet_config.load(fleet_config.find_folder(folder))
    location = database_url(config, db)
    if is_postgresql(location):
        raise UsageError(f"{display_name(location)} is PostgreSQL: open it with psql; these commands read SQLite")
    if not Path(location).exists():
        raise UsageError(f"{location}: no database yet; start `outstation fleet collect` once")
    return open_database(connect_read_only(Path(location)))
