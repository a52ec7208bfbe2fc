"""`outstation fleet label`: what was true of a device's results, told where they are collected."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent import clock
from agent.cli.label import read
from agent.cli.output import emit, json_option, table
from agent.drift.truth import Label
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.text import printable
from agent.toml import suggestion

_SHOWN = 20


@click.command("label", epilog="Example: outstation fleet label pi-07 exercise truth.csv")
@click.argument("device")
@click.argument("task")
@click.argument("file", default="-")
@click.option(
    "--dir", "folder", metavar="DIR", help="The fleet's folder; default $OUTSTATION_FLEET, ., /etc/outstation/fleet."
)
@json_option
def label(device: str, task: str, file: str, folder: str | None, as_json: bool) -> None:
    """Join labels from FILE with collected results of TASK of DEVICE, and say how good they are.

    Columns as for `outstation label`: row,label or t,label, and source. Exit 1 where a label was rejected.
    """
    from agent.fleet import labels
    from agent.fleet.store import FleetStore

    config = fleet_config.load(fleet_config.find(folder))
    found = list(read(file))
    rejected = {line: one for line, one in found if isinstance(one, str)}
    good = [(line, one) for line, one in found if isinstance(one, Label)]
    store = FleetStore(Path(config.fleet.db))
    try:
        known = [row["device"] for row in store.devices()]
        if device not in known:
            raise UsageError(f"no device {device!r} is enrolled{suggestion(device, known)}")
        with store.transaction() as db:
            now = clock.rfc3339(clock.read().wall_us)
            outcome = labels.take(db, device, task, [one for _, one in good], now)
    except ValueError as problem:
        raise UsageError(str(problem)) from None
    finally:
        store.close()
    rejected |= {good[index][0]: reason for index, reason in outcome.rejected.items()}
    document = {
        "accepted": outcome.accepted,
        "replaced": outcome.replaced,
        "rejected": [{"line": line, "reason": reason} for line, reason in sorted(rejected.items())],
        "sources": outcome.sources,
        "metrics": [one.told() for one in outcome.metrics],
    }

    def human() -> None:
        click.echo(f"{outcome.accepted} labels accepted, {outcome.replaced} of them replaced, {len(rejected)} rejected")
        for line, reason in sorted(rejected.items())[:_SHOWN]:
            click.echo(printable(f"  line {line}: {reason}"))
        rows = [
            [
                one.metric,
                printable(one.slice),
                *("" if v is None else f"{v:.4g}" for v in (one.value, one.low, one.high)),
            ]
            for one in outcome.metrics
        ]
        table(["metric", "slice", "value", "from", "to"], rows, "No labelled result yet.")

    emit(document, as_json, human)
    if rejected:
        sys.exit(1)
