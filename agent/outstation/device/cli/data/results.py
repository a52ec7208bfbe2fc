"""Command `outstation results`: what the models said last, read from the store beside the running daemon."""

from __future__ import annotations

from typing import Any

import click

from outstation.device import newest
from outstation.device.bootstrap import device
from outstation.device.newest import ResultRows
from outstation.device.store.retention import MAX_NEWEST_BYTES, MAX_NEWEST_MESSAGES
from outstation.foundation.cli.follow import (
    Column,
    LinePrinter,
    emit_or_follow,
    follow_option,
    format_time,
    last_option,
)
from outstation.foundation.cli.options import config_options
from outstation.foundation.cli.output import echo

_COLUMNS = (
    Column("time", 24),
    Column("task", 10),
    Column("row", 9, is_number=True),
    Column("answer", 12),
    Column("score", 7, is_number=True),
    Column("clock", 8),
    Column("notes", 0),
)
_EMPTY = (
    "No results are stored: none was computed yet, none is published (`publish`), or they were delivered and then "
    "deleted because the store was full or began a new log."
)


@click.command(epilog="Example: outstation results exercise --last 20 --follow")
@click.argument("task", required=False)
@last_option
@follow_option
@config_options
def results(task: str | None, last: int, follow: bool, config_file: str | None, as_json: bool) -> None:
    """Show the newest results of TASK (or of all tasks), newest last, with time, clock, answer, score and faults.

    They come from the results messages that the store still holds, so they are those that the task publishes
    (`publish`). After delivery each task's newest 20 messages stay, or fewer of together 64 KiB, until space runs
    out; older ones as long as `[buffer] keep_messages` says, none with `delivery = "broker"`. With --follow and
    --json, each result is one line of JSON.
    """
    _, conf = device.load_config(config_file, task)
    with device.open_store_read_only(conf) as store:
        shown = newest.read_results(store, task, last)

        def read_new() -> list[dict[str, Any]]:
            nonlocal shown
            shown = newest.read_new_results(store, task, shown.last_seq)
            return shown.rows

        if shown.rows and not as_json:
            echo(_describe_origin(shown), err=True)
        emit_or_follow(shown.rows, read_new if follow else None, LinePrinter(_COLUMNS, _to_cells), _EMPTY, as_json)


def _describe_origin(shown: ResultRows) -> str:
    text = f"From the results messages in the store; the newest was computed {format_time(shown.rows[-1]['computed'])}."
    if shown.is_cut:
        text += (
            f" Older results were not kept: after delivery the newest {MAX_NEWEST_MESSAGES} messages of each task "
            f"stay, up to {MAX_NEWEST_BYTES >> 10} KiB."
        )
    return text


def _to_cells(row: dict[str, Any]) -> list[str]:
    value = row.get("value")
    answer = row["label"] if row["label"] is not None else "–" if value is None else f"{value:.6g}"
    score = row.get("score")
    notes = [f"fault of {', '.join(row['faults'])}"] if row["faults"] else []
    if row.get("missing"):
        notes.append(f"{row['missing']:.0%} of the input missing")
    if row["label"] is not None and value is not None:
        notes.insert(0, f"value {value:.6g}")
    notes += [
        f"{name} {cell}" if isinstance(cell, str) else f"{name} {cell:.4g}"
        for name, cell in row.items()
        if name.startswith(("value_", "score_", "label_")) and cell is not None
    ]
    shown_score = "–" if score is None else f"{score:.4f}"
    time, row_number = format_time(row["time"]), str(row["row"])
    return [time, row["task"], row_number, answer, shown_score, row["clock"], ", ".join(notes)]
