"""`outstation fleet db rebuild`: write every table that follows from the stored messages again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_options, open_store, print_lines, progress_bar
from outstation.foundation.cli.output import emit
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import UsageError
from outstation.foundation.text import pluralize

if TYPE_CHECKING:
    from outstation.fleet.audit.rebuild import RebuildReport

_MOST_LINES = 10


@click.command("rebuild", epilog="Example: outstation fleet db rebuild pi-07")
@click.argument("device", required=False)
@database_options
def rebuild(device: str | None, db: str | None, home: Path, as_json: bool) -> None:
    """Correct every table that follows from the stored messages: results, drift windows, alerts, gaps, clocks.

    Use it when `outstation fleet audit` says that a table differs from its messages. Stop the collector before. The
    command verifies the messages and leaves them as they are; a second run changes nothing. It changes no table of a
    device with a message that does not verify, and fails. Labels, verdicts and other rows that a person or the
    collector wrote are not touched.
    """
    from outstation.fleet.audit.rebuild import rebuild as run_rebuild

    config = fleet_config.load(home)
    collectors = fleet_config.load_collector_keys(config)
    with open_store(config, db) as store:
        if device is not None and device not in (known := store.enrolled_devices()):
            raise UsageError(f"no device {device} is enrolled{did_you_mean(device, known)}")
        if not store.exclude_collectors():
            raise UsageError(f"{store.name}: a collector runs on it and writes the same tables; stop it first")
        with progress_bar("rebuilding", store.count_messages(device)) as advance:
            report = run_rebuild(store, device, advance, collectors)
    emit(report, as_json, lambda: print_lines(*_report_lines(report)), passed=report.passed)


def _report_lines(report: RebuildReport) -> Iterator[str]:
    count = f"{pluralize(report.messages, 'message')} of {pluralize(report.devices, 'device')}"
    changed = ", ".join(f"{number} of {table}" for table, number in report.rows.items())
    yield f"{count}: corrected rows: {changed}" if changed else f"{count}: no table differs from its messages"
    for entry in report.invalid[:_MOST_LINES]:
        place = "" if entry["seq"] is None else f" log {entry['log']} seq {entry['seq']}"
        yield f"{entry['device']}:{place} {entry['reason']}"
    if report.invalid_count:
        names = ", ".join(report.excluded[:_MOST_LINES])
        more = f" and {len(report.excluded) - _MOST_LINES} more" if len(report.excluded) > _MOST_LINES else ""
        yield f"Not rebuilt, as the evidence does not verify: {names}{more}. `outstation fleet audit` lists it all."
