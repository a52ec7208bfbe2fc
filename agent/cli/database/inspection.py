"""Inspection of a SQLite database by commands: tables, schema, rows and queries, read only, through sqlite-utils."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
import sqlite_utils

from agent.cli.output import echo, emit, print_table
from agent.cli.row_output import print_rows, require_one_format
from agent.errors import StorageError, UsageError
from agent.toml_files import did_you_mean

limit_option = click.option(
    "--limit", metavar="N", type=click.IntRange(1), default=20, help="At most so many rows; default 20."
)
where_option = click.option("--where", metavar="SQL", help='Only these rows: "seq > 100".')
order_option = click.option("--order", metavar="SQL", help='Order: "seq desc".')

_FORBIDDEN = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}


def open_database(connection: sqlite3.Connection) -> sqlite_utils.Database:
    """Guard a read-only connection: no statement attaches another file. The command closes it at its end."""

    def authorize(action: int, *_: str | None) -> int:
        return sqlite3.SQLITE_DENY if action in _FORBIDDEN else sqlite3.SQLITE_OK

    connection.execute("PRAGMA query_only = 1")
    connection.set_authorizer(authorize)
    click.get_current_context().call_on_close(connection.close)
    return sqlite_utils.Database(connection, execute_plugins=False)


def print_tables(database: sqlite_utils.Database, as_json: bool) -> None:
    """Print each table with its number of rows and its columns, and each view."""
    with _translate_errors():
        listed = [
            {"table": table.name, "rows": table.count, "columns": [column.name for column in table.columns]}
            for table in database.tables
        ]
        listed += [{"view": view.name, "columns": [column.name for column in view.columns]} for view in database.views]
    cells = [
        [entry.get("table", entry.get("view")), entry.get("rows", "view"), ", ".join(entry["columns"])]
        for entry in listed
    ]
    emit(listed, as_json, lambda: print_table(["table", "rows", "columns"], cells, "No table."))


def print_schema(database: sqlite_utils.Database, table: str | None) -> None:
    """Print the SQL that made a table or view, or all of them. Raises UsageError for an unknown name."""
    with _translate_errors():
        echo(database.schema if table is None else _find_table(database, table).schema)


def print_table_rows(
    database: sqlite_utils.Database,
    name: str,
    *,
    where: str | None,
    order: str | None,
    limit: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Print rows of a table or view. Raises UsageError for an unknown name, and for SQL that SQLite refuses."""
    require_one_format(as_csv, as_json)
    with _translate_errors():
        table = _find_table(database, name)
        rows = table.rows_where(where, order_by=order, limit=limit)
        names = [column.name for column in table.columns]
        print_rows(names, (tuple(row.values()) for row in rows), as_csv=as_csv, as_json=as_json)


def print_query(database: sqlite_utils.Database, sql: str, *, as_csv: bool, as_json: bool) -> None:
    """Print the rows of one statement; `-` reads it from standard input. Raises UsageError if SQLite refuses it."""
    require_one_format(as_csv, as_json)
    with _translate_errors():
        cursor = database.execute(sys.stdin.read() if sql == "-" else sql)
        if cursor.description is None:
            raise UsageError("this statement returns no rows; the database is open for reading only")
        names = [column[0] for column in cursor.description]
        rows: Iterator[Sequence[Any]] = iter(cursor)
        print_rows(names, rows, as_csv=as_csv, as_json=as_json)


def _find_table(database: sqlite_utils.Database, name: str) -> Any:
    names = [*database.table_names(), *database.view_names()]
    if name not in names:
        raise UsageError(f"there is no table {name!r}{did_you_mean(name, names)}")
    return database.table(name) if name in database.table_names() else database.view(name)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise SQLite's errors: SQL that it refuses as UsageError, others as StorageError."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, sqlite3.Warning) as error:
        raise UsageError(f"SQLite: {error}; `schema` shows tables and columns") from error
    except sqlite3.Error as error:
        if "not authorized" in str(error) or "prohibited" in str(error):
            raise UsageError(f"SQLite: {error}: a query reads this database only") from error
        raise StorageError(f"the database cannot be read: {error}") from error
