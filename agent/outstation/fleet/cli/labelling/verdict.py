"""`outstation fleet labels verdict`: verdicts of people on results and alerts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from outstation.fleet import config as fleet_config
from outstation.fleet.cli.common import database_options, device_option, open_for_reading, open_store
from outstation.foundation import clock
from outstation.foundation.cli.options import by_option, note_option
from outstation.foundation.cli.output import echo, emit, print_table


@click.group()
def verdict() -> None:
    """Confirm or correct results and alerts, and list verdicts by person.

    A verdict is a label by a person who saw the answer first. It is counted separately from ground truth (`fleet
    labels add`).
    """


@verdict.command("result", epilog="Example: outstation fleet labels verdict result pi-07 exercise 1200 PEN --by eva")
@click.argument("device")
@click.argument("task")
@click.argument("row", type=click.IntRange(min=1))
@click.argument("label", required=False)
@click.option("--withdraw", is_flag=True, help="Withdraw your verdict.")
@by_option
@note_option
@database_options
def result(
    device: str,
    task: str,
    row: int,
    label: str | None,
    withdraw: bool,
    by: str,
    note: str,
    db: str | None,
    home: Path,
    as_json: bool,
) -> None:
    """Correct the result of TASK at ROW to LABEL; without LABEL, confirm it."""
    from outstation.fleet.labelling import verdicts

    config, _ = open_for_reading(home, db, device)
    judge = verdicts.Judge(by, "cli", clock.now_rfc3339(), note)
    with open_store(config, db) as store, store.transaction() as tx:
        if withdraw:
            verdicts.withdraw(tx, device, task, row, judge)
            document: dict[str, Any] = {"device": device, "task": task, "row": row, "verdict": None, "by": by}
            sentence = f"verdict of {by} on row {row} withdrawn"
        else:
            given = verdicts.judge_result(tx, device, task, row, label, judge)
            document = {
                **{name: getattr(given, name) for name in ("device", "task", "log", "row", "verdict", "label")},
                "predicted": given.predicted,
                "by": by,
            }
            sentence = f"{given.verdict} by {by}: row {row} is {given.label}"
    emit(document, as_json, lambda: echo(sentence))


@verdict.command("alert", epilog="Example: outstation fleet labels verdict alert 3f9a false-alarm --label ABD --by eva")
@click.argument("ref", metavar="INCIDENT")
@click.argument("opinion", metavar="right|false-alarm", type=click.Choice(["right", "false-alarm"]))
@click.option("--label", metavar="LABEL", help="True label of the result that the alert is about.")
@by_option
@note_option
@database_options
def alert(
    ref: str, opinion: str, label: str | None, by: str, note: str, db: str | None, home: Path, as_json: bool
) -> None:
    """Confirm an alert or mark it as false. A verdict on an alert about a result also labels that result."""
    from outstation.fleet.incidents import incidents
    from outstation.fleet.labelling import verdicts

    now = clock.now_rfc3339()
    with open_store(fleet_config.load(home), db) as store:
        incident = incidents.find_incident(store, ref, now=now)
        judge = verdicts.Judge(by, "cli", now, note)
        with store.transaction() as tx:
            sentence = verdicts.judge_alert(tx, incident, is_right=opinion == "right", text=label, judge=judge)
    document = {"incident": incident.ref, "device": incident.device, "verdict": opinion, "by": by, "summary": sentence}
    emit(document, as_json, lambda: echo(sentence))


@verdict.command("list", epilog="Example: outstation fleet labels verdict list --json")
@device_option
@click.option("--task", metavar="TASK", help="Only this task.")
@database_options
def list_verdicts(device: str | None, task: str | None, db: str | None, home: Path, as_json: bool) -> None:
    """Show verdicts by person, results that people disagree about, and signs of feedback loops."""
    from outstation.fleet.labelling import feedback_loops, verdicts

    _, store = open_for_reading(home, db, device)
    with store.snapshot() as reading:
        document = verdicts.summarize(reading, device, task)
        document["warnings"] = feedback_loops.find(reading, device, task)
    emit(document, as_json, lambda: _print(document))


def _print(document: dict[str, Any]) -> None:
    columns = ("device", "task", "given_by", "verdict", "n", "newest")
    rows = [[row[name] for name in columns] for row in document["people"]]
    print_table(["device", "task", "by", "verdict", "n", "newest"], rows, "Nobody has given a verdict yet.")
    if document["alerts"]:
        print_table(["alert", "verdict", "n"], [[*row.values()] for row in document["alerts"]], "")
    if document["disputed"]:
        echo(f"{document['disputed']} results have conflicting verdicts; no metric counts them")
    for warning in document["warnings"]:
        echo(f"warning: {warning['summary']}")
