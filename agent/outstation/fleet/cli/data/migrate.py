"""`outstation fleet db migrate`: copy the fleet database from SQLite to PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import fleet_options, print_lines, processes_option, progress_bar
from outstation.fleet.database.interface import is_postgresql
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import UsageError
from outstation.foundation.text import pluralize


@click.command(
    "migrate", epilog="Example: outstation fleet db migrate --to postgresql://outstation@db.example.org/acme"
)
@click.option("--from", "source_url", metavar="URL", help="SQLite database; default that of fleet.toml.")
@click.option("--to", "target_url", metavar="URL", required=True, help="Empty PostgreSQL database: postgresql://…")
@processes_option
@fleet_options
def migrate(source_url: str | None, target_url: str, processes: int, home: Path, as_json: bool) -> None:
    """Copy a SQLite database to PostgreSQL, and audit the copy.

    Stop the collector before. An interrupted copy continues when the command runs again. Then set `db` in fleet.toml to
    the new database, and start the collector.
    """
    from outstation.fleet.audit.audit import audit
    from outstation.fleet.database.maintenance import copying
    from outstation.fleet.database.store import FleetStore

    config = fleet_config.load(home)
    location = fleet_config.resolve_database(source_url, Path.cwd()) if source_url else config.fleet.db
    target_location = fleet_config.resolve_database(target_url, Path.cwd())
    if is_postgresql(location) or not is_postgresql(target_location):
        raise UsageError(
            "fleet db migrate copies from SQLite to PostgreSQL: --from sqlite:///fleet.db --to postgresql://…"
        )
    if not Path(location).exists():
        raise UsageError(f"{location}: no such database; name it with --from")
    with FleetStore(location) as source, FleetStore(target_location, partitions=config.fleet.partitions) as target:
        for store in (source, target):
            if not store.exclude_collectors():
                problem = (
                    "a collector runs on it, and what it acknowledges meanwhile would not be copied; stop it first"
                )
                raise UsageError(f"{store.name}: {problem}")
        with progress_bar("copying", source.count_messages()) as advance:
            rows = copying.copy(source, target, advance)
        with progress_bar("auditing", target.count_messages()) as advance:
            operators = fleet_config.load_trusted_keys(config)
            collectors = fleet_config.load_collector_keys(config)
            report = audit(target, None, advance, operators, processes, collectors).to_dict()
        if report["passed"]:
            copying.finish(target)
    document = {"passed": report["passed"], "rows": rows, "audit": report}
    emit(document, as_json, lambda: print_lines(*_report_lines(document, target.name)), passed=report["passed"])


def _report_lines(document: dict[str, Any], target: str) -> Iterator[str]:
    audit = document["audit"]
    yield f"{sum(document['rows'].values())} rows of {len(document['rows'])} tables copied to {target}"
    if document["passed"]:
        yield f"its audit passed: {pluralize(audit['messages'], 'message')} of {pluralize(audit['devices'], 'device')}"
        yield "set db in [fleet] of fleet.toml to the new database, and start the collector; keep the old file"
    else:
        yield f"its audit FAILED: {audit['invalid_count']} invalid; audit the SQLite database, which says the same"
