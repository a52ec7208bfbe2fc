"""`outstation fleet labels next`: results that should get a label, and why."""

from __future__ import annotations

from pathlib import Path

import click

from outstation.fleet.cli.common import database_options, device_option, open_for_reading
from outstation.foundation import clock
from outstation.foundation.cli.output import emit, print_table

_TOP = 500


@click.command("next", epilog="Example: outstation fleet labels next --task exercise --limit 40 --json")
@device_option
@click.option("--task", metavar="TASK", help="Only this task.")
@click.option("--limit", metavar="N", default=20, type=click.IntRange(1, _TOP), help="At most N results; default 20.")
@click.option("--seed", metavar="N", default=0, help="Seed of the random choice; default 0.")
@database_options
def suggest(
    device: str | None, task: str | None, limit: int, seed: int, db: str | None, home: Path, as_json: bool
) -> None:
    """Show which results to label next: the least certain, the most drifted, the rarest classes, and some at random.

    Answer with `fleet labels verdict result`, or with `fleet labels add` where the truth is known without seeing the
    answer.
    """
    from outstation.fleet.labelling import candidates

    _, store = open_for_reading(home, db, device)
    with store.snapshot() as reading:
        requests = candidates.list_next(reading, device=device, task=task, limit=limit, seed=seed)
    rows = [
        [
            *(each.device, each.task, each.row, clock.to_rfc3339(each.t)[:19] + "Z"),
            each.label if each.label is not None else "" if each.value is None else f"{each.value:.6g}",
            "" if each.score is None else f"{each.score:.3f}",
            each.words,
        ]
        for each in requests
    ]
    head = ["device", "task", "row", "time", "answer", "score", "why"]
    empty = "Every stored result has a label, or none has arrived yet."
    emit(candidates.to_document(requests), as_json, lambda: print_table(head, rows, empty))
