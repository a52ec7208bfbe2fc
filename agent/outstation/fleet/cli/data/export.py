"""`outstation fleet db export` and `sql`: Parquet files of the fleet's messages, and queries over them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import (
    database_options,
    device_option,
    fleet_options,
    open_for_reading,
    print_lines,
    progress_bar,
)
from outstation.foundation.cli.options import MOMENT, PATH
from outstation.foundation.cli.output import emit
from outstation.foundation.cli.row_output import csv_option, print_rows, require_one_format
from outstation.foundation.errors import UsageError

if TYPE_CHECKING:
    from outstation.fleet.export.export import ExportSummary

# Names of `export.tables.KINDS`, which a command that does not export need not import.
_KINDS = ("results", "result_messages", "drift_windows", "alerts", "metrics", "shadows", "rollout_devices")


@click.command("export", epilog="Example: outstation fleet db export --out export --kind results --since 2026-11-01")
@click.option("--out", "out", metavar="DIR", required=True, type=PATH,
              help="Folder of the export; a run adds what is new.")  # fmt: skip
@click.option("--since", type=MOMENT, help='Only rows of this time or later: "24 h", "7 d", 2026-11-24 or a time.')
@click.option("--until", type=MOMENT, help="Only rows before this time.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(_KINDS), help="Only this kind; repeatable.")
@device_option
@click.option("--task", metavar="T", help="Only this task.")
@database_options
def export(
    out: Path,
    since: str | None,
    until: str | None,
    kinds: tuple[str, ...],
    device: str | None,
    task: str | None,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Export the fleet's messages as Parquet, partitioned by kind and day.

    Run it again to add what arrived since; it continues where it was interrupted. The first run decides the options.
    The collector's key signs the manifest. `outstation fleet audit --export DIR` verifies the files, and
    `outstation fleet db sql` queries them.
    """
    from outstation.fleet.export.export import export as run_export
    from outstation.fleet.export.tables import Filters
    from outstation.protocol.wire import keys

    config, store = open_for_reading(home, db, device)
    filters = Filters(kinds=tuple(name for name in _KINDS if not kinds or name in kinds), device=device, task=task,
                      since=since, until=until)  # fmt: skip
    key, collectors = keys.load_private(Path(config.collector.key_file)), fleet_config.load_collector_keys(config)
    with progress_bar("exporting", store.count_messages(device)) as advance:
        summary = run_export(store, out, config.fleet.name, filters, key, collectors, advance)
    emit(summary, as_json, lambda: print_lines(*_summary_lines(out, summary)))


def _summary_lines(out: Path, summary: ExportSummary) -> Iterator[str]:
    yield f"{out}: {summary.messages} new messages in {summary.files} files, {summary.bytes / 1e6:.1f} MB"
    for kind, rows in sorted(summary.rows.items()):
        yield f"  {kind}: {rows} rows"


@click.command("sql", epilog='Example: outstation fleet db sql --export export "SELECT device, count(*) FROM results"')
@click.argument("query", required=False)
@click.option("--export", "export_folder", metavar="DIR", type=PATH, default=Path("export"),
              help="Folder of `fleet db export`; default ./export.")  # fmt: skip
@csv_option
@fleet_options
def sql(query: str | None, export_folder: Path, as_csv: bool, home: Path, as_json: bool) -> None:
    """Query an export with SQL (DuckDB): one view a kind, read-only, without network or other files.

    QUERY `-` reads the query from standard input; without one, the views are listed.
    """
    from outstation.fleet.export.query import ExportQueries

    require_one_format(as_csv, as_json)
    if not (export_folder / "manifest.json").exists():
        raise UsageError(f"{export_folder}: no export here; {_shell_hint(home)}")
    text = sys.stdin.read() if query == "-" else query or "SHOW TABLES"
    queries = ExportQueries(export_folder)
    click.get_current_context().call_on_close(queries.close)
    print_rows(*queries.query(text), as_csv=as_csv, as_json=as_json)


def _shell_hint(home: Path) -> str:
    """Say how to make an export, and how to open the shell of the fleet's database."""
    from outstation.fleet.database.interface import display_name, is_postgresql

    make = "`outstation fleet db export --out DIR` makes one"
    try:
        location = fleet_config.load(home).fleet.db
    except UsageError:
        return make
    program = "psql" if is_postgresql(location) else "sqlite3 -readonly"
    return f"{make}; or open the database itself: {program} '{display_name(location)}'"
