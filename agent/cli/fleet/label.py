"""`outstation fleet label`: what was true of a device's results, told where they are collected."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from agent import clock
from agent.cli.device.label import read_labels, report
from agent.cli.fleet.command import require_enrolled, send_command
from agent.cli.fleet.common import fleet_option
from agent.cli.output import emit, json_option, print_table
from agent.errors import UsageError
from agent.fleet import config as fleet_config
from agent.fleet.config import FleetConfig
from agent.performance.labels import Label
from agent.text import printable

_MAX_SHOWN = 20


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
    home = fleet_config.find_folder(folder)
    config = fleet_config.load(home)
    require_enrolled(config, device)
    found = list(read_labels(file))
    rejected = {line: one for line, one in found if isinstance(one, str)}
    good = [(line, one) for line, one in found if isinstance(one, Label)]
    if send:
        accepted, refused = _send_labels(home, config, device, task, good, wait_s)
        report(accepted, rejected | refused, as_json)
    else:
        _join_labels(config, device, task, good, rejected, as_json)


def _send_labels(
    home: Path, config: FleetConfig, device: str, task: str, valid_labels: list[tuple[int, Label]], wait_s: float
) -> tuple[int, dict[int, str]]:
    """How many the device accepted, and line → reason of the others."""
    from agent.fleet.labels import split_labels

    accepted = 0
    rejected: dict[int, str] = {}
    for first, end, columns in split_labels([one for _, one in valid_labels]):
        lines = [line for line, _ in valid_labels[first:end]]
        sent = send_command(home, config, device, "label", {"task": task, "labels": columns}, wait_s)
        if not sent.ok or sent.reply is None:
            # The next ones would come to the same.
            summary = sent.to_dict()["summary"]
            return accepted, rejected | {line: f"not taken: {summary}" for line, _ in valid_labels[first:]}
        accepted += int(sent.reply.data["accepted"])
        rejected |= {lines[int(index)]: str(why) for index, why in sent.reply.data["rejected"].items()}
    return accepted, rejected


def _join_labels(
    config: FleetConfig,
    device: str,
    task: str,
    valid_labels: list[tuple[int, Label]],
    rejected: dict[int, str],
    as_json: bool,
) -> None:
    from agent.fleet import labels
    from agent.fleet.database.store import FleetStore

    store = FleetStore(config.fleet.db, partitions=config.fleet.partitions)
    try:
        with store.transaction() as db:
            now = clock.to_rfc3339(clock.read().wall_us)
            outcome = labels.add(db, device, task, [one for _, one in valid_labels], now)
    except ValueError as problem:
        raise UsageError(str(problem)) from None
    finally:
        store.close()
    rejected |= {valid_labels[index][0]: reason for index, reason in outcome.rejected.items()}
    document = {
        "accepted": outcome.accepted,
        "replaced": outcome.replaced,
        "rejected": [{"line": line, "reason": reason} for line, reason in sorted(rejected.items())],
        "sources": outcome.sources,
        "model": outcome.model.to_dict() if outcome.model else None,
        "results": {"listed": outcome.model.listed, "of": outcome.model.results} if outcome.model else None,
        "other_models": outcome.other_bundle_labels,
        "metrics": [one.to_dict() for one in outcome.metrics],
    }

    def human() -> None:
        click.echo(f"{outcome.accepted} labels accepted, {outcome.replaced} of them replaced, {len(rejected)} rejected")
        for line, reason in sorted(rejected.items())[:_MAX_SHOWN]:
            click.echo(printable(f"  line {line}: {reason}"))
        if outcome.model is not None:
            model = f"{outcome.model.name} {outcome.model.version}"
            also = (
                f"; {outcome.other_bundle_labels} labels are of results of other bundles"
                if outcome.other_bundle_labels
                else ""
            )
            click.echo(printable(f"of results of {model}, {outcome.model.digest}{also}"))
        if outcome.sparse_warning is not None:
            click.echo(f"warning: {outcome.sparse_warning}")
        rows = [
            [
                one.metric,
                printable(one.slice),
                *("" if v is None else f"{v:.4g}" for v in (one.value, one.low, one.high)),
            ]
            for one in outcome.metrics
        ]
        print_table(["metric", "slice", "value", "from", "to"], rows, "No labelled result yet.")

    emit(document, as_json, human)
    if rejected:
        sys.exit(1)
