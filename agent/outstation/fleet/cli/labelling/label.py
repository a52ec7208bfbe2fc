"""`outstation fleet labels add`: join labels with collected results, or send them to the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace

from outstation.device.cli.labelling.label import read_labels, report
from outstation.fleet.cli.command import send_command
from outstation.fleet.cli.common import fleet_option, open_for_reading, open_store, wait_option
from outstation.foundation import clock
from outstation.foundation.cli.options import by_option, json_option
from outstation.foundation.cli.output import echo, emit, print_table
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name
from outstation.foundation.text import pluralize, printable
from outstation.ml.performance.labels import Label

if TYPE_CHECKING:
    from outstation.fleet.commands import CommandResult
    from outstation.fleet.labelling.given_labels import LabelOutcome, OutputEvaluation

_MAX_LISTED = 20


@click.command("add", epilog="Example: outstation fleet labels add pi-07 exercise truth.csv --send")
@click.argument("device")
@click.argument("task")
@click.argument("file", default="-")
@fleet_option
@click.option("--output", metavar="NAME", help="Further output of the model, of labels for which FILE names none.")
@click.option("--send", is_flag=True, help="Send them to the device as signed commands; it computes slices and alerts.")
@wait_option
@by_option
@json_option
def add(
    device: str, task: str, file: str, home: Path, output: str | None, send: bool, wait_s: float, by: str, as_json: bool
) -> None:
    """Join labels from FILE with collected results of TASK of DEVICE, and print the metrics.

    Columns are those of `outstation label`: row,label or t,label, source and output. Each output of the model has
    metrics of its own. With --send the labels go to the device instead. Repeated labels do no harm. Exit 1 if a label
    was rejected.
    """
    if output is not None and not is_name(output):
        raise UsageError(f"--output {output[:40]!r} is no name of an output; they have 1-64 of a-z 0-9 . _ -")
    config, store = open_for_reading(home, device=device)
    entries = list(read_labels(file))
    rejected = {line: entry for line, entry in entries if isinstance(entry, str)}
    labels = [
        (line, replace(entry, output=entry.output or output or ""))
        for line, entry in entries
        if isinstance(entry, Label)
    ]
    if send:

        def send_columns(columns: str) -> CommandResult:
            return send_command(
                home, config, store, device, "label", {"task": task, "labels": columns, "by": by}, wait_s
            )

        accepted, refused = _send_labels(labels, send_columns)
        report(accepted, rejected | refused, as_json)
        return
    from outstation.fleet.labelling.given_labels import add

    try:
        with open_store(config) as writable, writable.transaction() as db:
            outcome = add(db, device, task, [entry for _, entry in labels], clock.now_rfc3339(), by)
    except ValueError as problem:
        raise UsageError(str(problem)) from None
    rejected |= {labels[index][0]: reason for index, reason in outcome.rejected.items()}
    document = {
        "accepted": outcome.accepted,
        "replaced": outcome.replaced,
        "rejected": [{"line": line, "reason": reason} for line, reason in sorted(rejected.items())],
        **_to_document(outcome),
        "outputs": {name: _to_document(each) for name, each in outcome.further.items()},
    }
    emit(document, as_json, lambda: _print_outcome(outcome, rejected), passed=not rejected)


def _to_document(evaluation: OutputEvaluation) -> dict[str, Any]:
    model = evaluation.model
    return {
        "sources": evaluation.sources,
        "model": model.to_dict() if model else None,
        "results": {"listed": model.listed, "total": model.results} if model else None,
        "other_models": evaluation.other_bundle_labels,
        "metrics": [metric.to_dict() for metric in evaluation.metrics],
    }


def _send_labels(labels: list[tuple[int, Label]], send: Callable[[str], CommandResult]) -> tuple[int, dict[int, str]]:
    """Return the number of labels that the device accepted, and line → reason of the others."""
    from outstation.fleet.labelling.given_labels import split_labels

    accepted = 0
    rejected: dict[int, str] = {}
    for first, end, columns in split_labels([entry for _, entry in labels]):
        lines = [line for line, _ in labels[first:end]]
        sent = send(columns)
        if not sent.ok or sent.reply is None:
            # Further commands would fail for the same reason.
            summary = sent.to_dict()["summary"]
            return accepted, rejected | {line: f"not sent: {summary}" for line, _ in labels[first:]}
        accepted += int(sent.reply.data["accepted"])
        rejected |= {lines[int(index)]: str(reason) for index, reason in sent.reply.data["rejected"].items()}
    return accepted, rejected


def _print_outcome(outcome: LabelOutcome, rejected: dict[int, str]) -> None:
    accepted = pluralize(outcome.accepted, "label")
    echo(f"{accepted} accepted, {outcome.replaced} of them replaced, {len(rejected)} rejected")
    for line, reason in sorted(rejected.items())[:_MAX_LISTED]:
        echo(printable(f"  line {line}: {reason}"))
    evaluations = {"": outcome, **outcome.further}
    for name, each in evaluations.items():
        if each.model is None:
            continue
        others = each.other_bundle_labels
        also = f"; {others} labels are of results of other bundles" if others else ""
        model = f"{each.model.name} {each.model.version}, {each.model.digest}"
        head = f"output {name}: " if name else ""
        echo(printable(f"{head}results of {model}{also}"))
        if each.sparse_warning is not None:
            echo(f"{head}warning: {each.sparse_warning}")
    rows = [
        [
            f"{name}: {m.metric}" if name else m.metric,
            printable(m.slice),
            *("" if v is None else f"{v:.4g}" for v in (m.value, m.low, m.high)),
        ]
        for name, each in evaluations.items()
        for m in each.metrics
    ]
    print_table(["metric", "slice", "value", "from", "to"], rows, "No labelled result yet.")
