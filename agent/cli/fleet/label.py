"""`outstation fleet label`: what was true of a device's results, told where they are collected."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent import clock
from agent.cli.device.label import read, tell
from agent.cli.fleet.command import require_enrolled, send_one
from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option, table
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.performance.labels import Label
from agent.text import printable

_SHOWN = 20


@click.command("label", epilog="Example: outstation fleet label pi-07 exercise truth.csv --send")
@click.argument("device")
@click.argument("task")
@click.argument("file", default="-")
@fleet_option
@click.option("--send", is_flag=True, help="To the device, as signed commands; it measures with its slices and alerts.")
@click.option("--wait", "wait_s", metavar="S", default=30.0, type=click.FloatRange(min=0), help="For each answer; 30.")
@json_option
def label(device: str, task: str, file: str, folder: str | None, send: bool, wait_s: float, as_json: bool) -> None:
    """Join labels from FILE with collected results of TASK of DEVICE, and say how good they are.

    Columns as for `outstation label`: row,label or t,label, and source. Exit 1 where a label was rejected. With --send
    they go to the device instead. To send a label twice does no harm.
    """
    home = fleet_config.find(folder)
    config = fleet_config.load(home)
    require_enrolled(config, device)
    found = list(read(file))
    rejected = {line: one for line, one in found if isinstance(one, str)}
    good = [(line, one) for line, one in found if isinstance(one, Label)]
    if send:
        accepted, refused = _sent(home, config, device, task, good, wait_s)
        tell(accepted, rejected | refused, as_json)
    else:
        _join(config, device, task, good, rejected, as_json)


def _sent(
    home: Path, config: FleetConfig, device: str, task: str, good: list[tuple[int, Label]], wait_s: float
) -> tuple[int, dict[int, str]]:
    """How many the device accepted, and line → reason of the others."""
    from agent.fleet.parcels import parcels

    accepted = 0
    rejected: dict[int, str] = {}
    for first, end, columns in parcels([one for _, one in good]):
        lines = [line for line, _ in good[first:end]]
        sent = send_one(home, config, device, "label", {"task": task, "labels": columns}, wait_s)
        if not sent.ok or sent.answer is None:
            # The next ones would come to the same.
            summary = sent.document()["summary"]
            return accepted, rejected | {line: f"not taken: {summary}" for line, _ in good[first:]}
        accepted += int(sent.answer.data["accepted"])
        rejected |= {lines[int(index)]: str(why) for index, why in sent.answer.data["rejected"].items()}
    return accepted, rejected


def _join(
    config: FleetConfig,
    device: str,
    task: str,
    good: list[tuple[int, Label]],
    rejected: dict[int, str],
    as_json: bool,
) -> None:
    from agent.fleet import labels
    from agent.fleet.database.store import FleetStore

    store = FleetStore(config.fleet.db, partitions=config.fleet.partitions)
    try:
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
        "model": outcome.model.told() if outcome.model else None,
        "results": {"listed": outcome.model.listed, "of": outcome.model.results} if outcome.model else None,
        "other_models": outcome.others,
        "metrics": [one.told() for one in outcome.metrics],
    }

    def human() -> None:
        click.echo(f"{outcome.accepted} labels accepted, {outcome.replaced} of them replaced, {len(rejected)} rejected")
        for line, reason in sorted(rejected.items())[:_SHOWN]:
            click.echo(printable(f"  line {line}: {reason}"))
        if outcome.model is not None:
            model = f"{outcome.model.name} {outcome.model.version}"
            also = f"; {outcome.others} labels are of results of other bundles" if outcome.others else ""
            click.echo(printable(f"of results of {model}, {outcome.model.digest}{also}"))
        if outcome.sparse is not None:
            click.echo(f"warning: {outcome.sparse}")
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
