"""`outstation fleet db prune`: remove what `[retention]` no longer covers, with a signed statement of what went."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_options, open_store, print_lines
from outstation.fleet.database.maintenance.retention import Retention
from outstation.foundation import clock
from outstation.foundation.cli.output import emit
from outstation.foundation.errors import UsageError

if TYPE_CHECKING:
    from outstation.fleet.retention.prune import PruneReport


@click.command("prune", epilog="Example: outstation fleet db prune --dry-run")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@database_options
def prune(dry_run: bool, db: str | None, home: Path, as_json: bool) -> None:
    """Remove messages, results and drift windows that are older than [retention] in fleet.toml allows.

    A statement of what went, signed with the collector's key, stays for each device: `fleet audit` still verifies what
    stays, and says what went. Open alerts stay. A device whose messages do not verify keeps everything.
    """
    from outstation.fleet.retention.prune import prune as run_prune
    from outstation.protocol.wire import keys

    config = fleet_config.load(home)
    if config.retention == Retention():
        raise UsageError(
            'fleet.toml has no [retention], so everything stays; add, for example: [retention] messages = "365 d"'
        )
    key = None if dry_run else keys.load_private(Path(config.collector.key_file))
    with open_store(config, db) as store:
        report = run_prune(
            store,
            config.retention,
            config.fleet.name,
            key,
            fleet_config.load_collector_keys(config),
            clock.read().wall_us,
        )
    emit(report, as_json, lambda: print_lines(*_report_lines(report)))


def _report_lines(report: PruneReport) -> Iterator[str]:
    verb = "would go" if report.dry_run else "went"
    for pruned in report.devices:
        tables = "".join(f", {count} rows of {table}" for table, count in sorted(pruned.tables.items()))
        yield f"{pruned.device}: {pruned.messages} messages{tables} {verb}"
    for device, reason in report.refused.items():
        yield f"{device}: everything stays: {reason}"
    if not report.devices and not report.refused:
        yield "Nothing is older than [retention] allows."
