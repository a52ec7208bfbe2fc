"""Inspection of a SQLite database by commands: tables, schema, rows and queries, read only, through sqlite-utils."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
import sqlite_utils

from outstation.foundation.cli.options import json_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.cli.row_output import csv_option, print_rows, require_one_format
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import StorageError, UsageError

Command = Callable[..., None]
Decorator = Callable[[Command], Command]
OpenDatabase = Callable[..., sqlite_utils.Database]

_limit_option = click.option(
    "--limit", metavar="N", type=click.IntRange(1), default=20, help="The most rows to show; default 20."
)
_where_option = click.option("--where", metavar="SQL", help='Only these rows: "seq > 100".')
_order_option = click.option("--order", "order_by", metavar="SQL", help='Order: "seq desc".')

# An open query keeps SQLite from restarting its log, and a full log keeps the daemon from writing.
_MAX_QUERY_S, _OPCODES_PER_CHECK, _MAX_ROWS = 20.0, 100_000, 1_000_000
_FORBIDDEN = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH}
# They change how the file is locked or written, which a read-only connection answers with misleading errors.
_FORBIDDEN_PRAGMAS = {"journal_mode", "locking_mode", "query_only", "wal_checkpoint"}


def open_database(connection: sqlite3.Connection) -> sqlite_utils.Database:
    """Guard a read-only connection: no statement attaches another file, or runs for long.

    The command closes it at its end.
    """

    def authorize(action: int, name: str | None, value: str | None, *_: str | None) -> int:
        is_switch = action == sqlite3.SQLITE_PRAGMA and value is not None and str(name).lower() in _FORBIDDEN_PRAGMAS
        return sqlite3.SQLITE_DENY if is_switch or action in _FORBIDDEN else sqlite3.SQLITE_OK

    deadline_s = time.monotonic() + _MAX_QUERY_S
    connection.execute("PRAGMA query_only = 1")
    connection.set_progress_handler(lambda: time.monotonic() > deadline_s, _OPCODES_PER_CHECK)
    connection.set_authorizer(authorize)
    click.get_current_context().call_on_close(connection.close)
    return sqlite_utils.Database(connection, execute_plugins=False)


def add_commands(
    group: click.Group, program: str, options: Sequence[Decorator], open_at: OpenDatabase, *, table: str, sql: str
) -> None:
    """Add the commands of `program` to its group: `open_at` gets the values of `options`, which say where it is.

    `table` and `sql` are examples.
    """

    def located(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    @group.command(epilog=f"Example: {program} tables")
    @located
    @json_option
    def tables(as_json: bool, **location: str | None) -> None:
        """List tables and views with their rows and columns."""
        print_tables(open_at(**location), as_json)

    @group.command(epilog=f"Example: {program} schema {table}")
    @click.argument("table", required=False)
    @located
    def schema(table: str | None, **location: str | None) -> None:
        """Show the SQL of TABLE, or of the whole database."""
        print_schema(open_at(**location), table)

    @group.command(epilog=f'Example: {program} rows {table} --order "rowid desc" --csv')
    @click.argument("table")
    @_where_option
    @_order_option
    @_limit_option
    @csv_option
    @located
    @json_option
    def rows(
        table: str,
        where: str | None,
        order_by: str | None,
        limit: int,
        as_csv: bool,
        as_json: bool,
        **location: str | None,
    ) -> None:
        """Show rows of TABLE, which may be a view."""
        print_table_rows(
            open_at(**location), table, where=where, order_by=order_by, limit=limit, as_csv=as_csv, as_json=as_json
        )

    @group.command(epilog=f'Example: {program} query "{sql}"')
    @click.argument("sql")
    @csv_option
    @located
    @json_option
    def query(sql: str, as_csv: bool, as_json: bool, **location: str | None) -> None:
        """Run one SQL statement that reads; `-` takes it from standard input."""
        print_query(open_at(**location), sql, as_csv=as_csv, as_json=as_json)


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
    order_by: str | None,
    limit: int | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Print rows of a table or view. Raises UsageError for an unknown name, and for SQL that SQLite refuses."""
    require_one_format(as_csv, as_json)
    with _translate_errors():
        table = _find_table(database, name)
        rows = table.rows_where(where, order_by=order_by, limit=limit)
        names = [column.name for column in table.columns]
        fetched = _fetch(tuple(row.values()) for row in rows)
    print_rows(names, iter(fetched), as_csv=as_csv, as_json=as_json)


def print_query(database: sqlite_utils.Database, sql: str, *, as_csv: bool, as_json: bool) -> None:
    """Print the rows of one statement; `-` reads it from standard input. Raises UsageError if SQLite refuses it."""
    require_one_format(as_csv, as_json)
    with _translate_errors():
        sql = sys.stdin.read() if sql == "-" else sql
        if not sql.strip():
            raise UsageError('there is no statement; write one, such as "SELECT * FROM messages LIMIT 5"')
        cursor = database.execute(sql)
        if cursor.description is None:
            raise UsageError("this statement returns no rows; the database is open for reading only")
        names = _number_equal_names([column[0] for column in cursor.description])
        fetched = _fetch(cursor)
    print_rows(names, iter(fetched), as_csv=as_csv, as_json=as_json)


def _fetch(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return all rows, so that no slow reader of the output keeps the query open. Raises UsageError for too many."""
    fetched = [*itertools.islice(rows, _MAX_ROWS + 1)]
    if len(fetched) > _MAX_ROWS:
        raise UsageError(
            f"the result has more than {_MAX_ROWS:,} rows; add LIMIT, or copy the database and use sqlite3"
        )
    return fetched


def _number_equal_names(names: Sequence[str]) -> list[str]:
    """Return the names with `_2`, `_3` … after those that stood before: each is a member of JSON."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return out


def _find_table(database: sqlite_utils.Database, name: str) -> Any:
    names = [*database.table_names(), *database.view_names()]
    if name not in names:
        raise UsageError(f"there is no table {name!r}{did_you_mean(name, names)}")
    return database.table(name) if name in database.table_names() else database.view(name)


# Part of SQLite's sentence → what to do.
_REMEDIES = {
    "no such table": "`tables` lists them",
    "no such column": "`schema TABLE` shows the columns",
    "no such function": "SQLite has none of this name",
    "syntax error": "write the statement in SQL as SQLite reads it",
    "incomplete input": "the statement breaks off: complete it",
    "unrecognized token": "close each quote, and write texts as 'text'",
    "one statement": "run them one by one",
    "readonly": "a query reads this database only",
    "bindings": "write the values into the statement, without ? and :name",
}


def _explain(error: sqlite3.Error | sqlite3.Warning) -> str:
    text = str(error).rstrip(".")
    return "; ".join([f"SQLite: {text}", *(remedy for part, remedy in _REMEDIES.items() if part in text)][:2])


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise SQLite's errors: SQL that it refuses as UsageError, others as StorageError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            raise UsageError(
                f"the query took more than {_MAX_QUERY_S:g} s and was ended, as an open one keeps the daemon from "
                "writing; narrow it, or query a copy of the database"
            ) from error
        raise UsageError(_explain(error)) from error
    except (sqlite3.ProgrammingError, sqlite3.Warning) as error:
        raise UsageError(_explain(error)) from error
    except sqlite3.Error as error:
        if any(text in str(error) for text in ("not authorized", "prohibited", "authorization denied")):
            raise UsageError(f"SQLite: {error}: a query reads this database only") from error
        raise StorageError(f"the database cannot be read: {error}") from error
