"""`outstation label`: what was true, from a file."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import click
import msgspec

from agent.bootstrap import wiring
from agent.cli.output import config_option, emit, json_option
from agent.client import Client
from agent.clock import epoch_us
from agent.config import Config
from agent.device.bundles import history
from agent.device.intake.group_commit import Group
from agent.device.intake.labels import Asked, Lot
from agent.device.machine.timekeeping import clock_of
from agent.errors import OutstationError, StorageBusy, UsageError
from agent.model.bundle import bundle
from agent.performance import labels
from agent.performance.labels import Label, Truth
from agent.toml_files import suggestion

_SHOWN = 20
_COLUMNS = ("row", "t", "label", "source")
Found = tuple[int, Label | str]


@click.command(epilog="Example: outstation label exercise truth.csv")
@click.argument("task")
@click.argument("file", default="-")
@config_option
@json_option
def label(task: str, file: str, config_file: str | None, as_json: bool) -> None:
    """Tell what was true of results of TASK, from CSV or JSON Lines in FILE (- is stdin).

    Columns row,label or t,label (epoch seconds or RFC 3339), and if there is one source: human, model or system. row is
    a result's row, for windows the last one; t means the result nearest to it. Goes through the running daemon, or
    straight into the store when none runs. Exit 1 where a label was rejected.
    """
    _, conf = wiring.load(config_file)
    if task not in conf.tasks:
        raise UsageError(f"there is no task {task!r}{suggestion(task, conf.tasks)}")
    found = list(read(file))
    rejected = {line: one for line, one in found if isinstance(one, str)}
    good = [(line, one) for line, one in found if isinstance(one, Label)]
    accepted, refused = _hand_over(conf, task, good)
    rejected |= refused
    tell(accepted, rejected, as_json)


def tell(accepted: int, rejected: Mapping[int, str], as_json: bool, **more: Any) -> None:
    """Print what became of the labels, and end with its exit code."""
    lines = [{"line": n, "reason": reason} for n, reason in sorted(rejected.items())]
    emit({"accepted": accepted, "rejected": lines, **more}, as_json, lambda: _print(accepted, rejected))
    if rejected:
        sys.exit(1)


def _print(accepted: int, rejected: Mapping[int, str]) -> None:
    click.echo(f"{accepted} labels accepted, {len(rejected)} rejected")
    for line, reason in sorted(rejected.items())[:_SHOWN]:
        click.echo(f"  line {line}: {reason}")
    if len(rejected) > _SHOWN:
        click.echo(f"  … and {len(rejected) - _SHOWN} more; --json lists them all")


def read(file: str) -> Iterator[Found]:
    """Each line's number with its label, or the reason why it has none. Raises UsageError."""
    try:
        # Not sys.stdin, whose encoding hangs on the locale.
        source: Path | int = 0 if file == "-" else Path(file)
        with open(source, encoding="utf-8", errors="replace", newline="", closefd=file != "-") as text:
            first = text.readline().removeprefix("\ufeff")
            yield from _json(first, text) if first.lstrip().startswith("{") else _csv(file, first, text)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None


def _csv(file: str, first: str, text: IO[str]) -> Iterator[Found]:
    header = [name.strip() for name in next(csv.reader([first]), [])]
    for name in header:
        if name not in _COLUMNS or header.count(name) > 1:
            raise UsageError(f"{file}: column {name[:40]!r}: the first line names row or t, label, and perhaps source")
    if "label" not in header or not {"row", "t"} & set(header):
        raise UsageError(f"{file}: the first line must name the columns: row,label or t,label")
    reader = csv.reader(text)
    while True:
        number = reader.line_num + 2
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not readable as CSV: {error}"
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield number, f"{len(cells)} values, the header names {len(header)}"
            continue
        yield number, _one({name: cell.strip() or None for name, cell in zip(header, cells, strict=True)})


def _json(first: str, text: IO[str]) -> Iterator[Found]:
    for number, line in enumerate((first, *text), 1):
        if not line.strip():
            continue
        try:
            found = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            yield number, f"not one JSON object on one line: {str(error)[:120]}"
            continue
        extra = next((name for name in found if name not in _COLUMNS), None)
        yield number, _one(found) if extra is None else f"{extra[:40]!r} says nothing about a label"


def _one(found: Mapping[str, Any]) -> Label | str:
    row, t = found.get("row"), found.get("t")
    try:
        if isinstance(row, str) and row.isascii() and row.isdigit():
            row = int(row)
        return labels.label(row, _time(t), found.get("label"), found.get("source"))
    except ValueError as problem:
        return str(problem)


def _time(t: Any) -> Any:
    if not isinstance(t, str):
        return t
    try:
        return float(t)
    except ValueError:
        return epoch_us(t) / 1e6


def _hand_over(conf: Config, task: str, found: list[tuple[int, Label]]) -> tuple[int, dict[int, str]]:
    """Through the daemon, or into the store; how many were accepted, and line → reason."""
    try:
        client = Client(conf.data_dir / "intake.sock")
    except ConnectionError as error:
        try:
            return _direct(conf, task, found)
        except StorageBusy as busy:
            raise OutstationError(f"{busy}; it takes nothing in now: {error}") from None
    try:
        for _, one in found:
            place = {"row": one.row} if one.row is not None else {"t": (one.t or 0) / 1e6}
            client.label(task, one.text, source=one.source, **place)
        answer = client.flush()
    except ConnectionError as error:
        raise OutstationError(f"the daemon went away ({error}); labels may be sent again, they count once") from None
    finally:
        client.close()
    return answer.accepted, {found[number - 1][0]: reason for number, reason in answer.rejected}


def _direct(conf: Config, task: str, found: list[tuple[int, Label]]) -> tuple[int, dict[int, str]]:
    store = wiring.open_store(conf)
    try:
        manifest = bundle.read(history.bundle_of(conf, store, task), None).manifest
        asked = {task: Asked(conf.tasks[task].stream, Truth(manifest.truth, tuple(manifest.output.labels)))}
        group, now = Group(store, conf.streams, lambda: asked), clock_of(store)
        accepted, rejected = 0, dict[int, str]()
        for number, (line, one) in enumerate(found, 1):
            group.label("", Lot(task, [one], {}), line, now())
            if group.is_full or number == len(found):
                for outcome in group.commit(now()).values():
                    accepted += outcome.accepted
                    rejected |= dict(outcome.rejected)
        return accepted, rejected
    finally:
        store.close()
