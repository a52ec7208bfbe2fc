"""Command `outstation label`: ground-truth labels of results, from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from outstation.device.bootstrap import device
from outstation.device.bundles import history
from outstation.device.config import Config
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.intake.label_intake import LabelBatch
from outstation.device.machine import secret_file
from outstation.device.machine.timekeeping import make_clock
from outstation.foundation.cli.options import by_option, config_options
from outstation.foundation.cli.output import echo, emit, print_rejected
from outstation.foundation.errors import OutstationError, RowRejected, StorageBusy, StorageError, UsageError, explain
from outstation.ml.datasets import formats
from outstation.ml.datasets.csv_table import CsvTable
from outstation.ml.datasets.tables import ColumnType, TableOptions
from outstation.ml.model.bundle import bundle
from outstation.ml.performance import labels
from outstation.ml.performance.labels import Label, LabelTarget
from outstation.protocol.client import Client

_COLUMNS = {
    "row": ColumnType.INTEGER,
    "t": ColumnType.TIME,
    "label": ColumnType.TEXT,
    "source": ColumnType.TEXT,
    "output": ColumnType.TEXT,
}
ParsedLabel = tuple[int, Label | str]


@click.command(epilog="Example: outstation label exercise truth.csv")
@click.argument("task")
@click.argument("file", default="-")
@by_option
@config_options
def label(task: str, file: str, by: str, config_file: str | None, as_json: bool) -> None:
    """Add ground-truth labels to results of TASK, from CSV or JSON Lines in FILE (- is stdin).

    Columns: row,label or t,label (epoch seconds or RFC 3339), and optionally source (human, system, model or verdict)
    and output, the name of a further output of the model.
    `row` is a result's row, for windows the last one; `t` selects the nearest result. Labels go through the running
    daemon, or into the store if none runs. Exit 1 if a label was rejected.

    Labels are authenticated as NAME's if you may read labels.key in the data folder. Without that they are counted, but
    no roll-out acts on them.
    """
    _, conf = device.load_config(config_file, task)
    parsed = list(read_labels(file))
    invalid = {line: label for line, label in parsed if isinstance(label, str)}
    labels = [(line, label) for line, label in parsed if isinstance(label, Label)]
    accepted, rejected = submit(conf, task, labels, by)
    report(accepted, invalid | rejected, as_json)


def report(accepted: int, rejected: Mapping[int, str], as_json: bool, **more: Any) -> None:
    """Print how many labels were accepted and why others were not, and exit with 1 if any was rejected."""
    lines = [{"line": n, "reason": reason} for n, reason in sorted(rejected.items())]
    document = {"accepted": accepted, "rejected": lines, **more}
    emit(document, as_json, lambda: print_rejected(accepted, rejected, "label"), passed=not rejected)


def read_labels(file: str) -> Iterator[ParsedLabel]:
    """Yield each line's number with its label, or the reason why it has none. Raises UsageError."""
    try:
        with formats.open_file(0 if file == "-" else Path(file)) as source:
            options = TableOptions(keep_invalid=True, check_row=_find_foreign_member)
            table = formats.open_table(None, source, options)
            if isinstance(table, CsvTable):
                for name in table.columns:
                    if name not in _COLUMNS or table.columns.count(name) > 1:
                        raise UsageError(
                            f"{file}: column {name[:40]!r}: the first line names row or t, label, and optionally "
                            "source and output"
                        )
                if "label" not in table.columns or not {"row", "t"} & set(table.columns):
                    raise UsageError(f"{file}: the first line must name the columns: row,label or t,label")
            names = table.columns if isinstance(table, CsvTable) else list(_COLUMNS)
            for block in table.read({name: _COLUMNS[name] for name in names}):
                yield from ((rejection.line, rejection.reason) for rejection in block.rejected)
                for line, *values in zip(block.lines, *(block.columns[name] for name in names), strict=True):
                    yield line, _parse_label(dict(zip(names, values, strict=True)))
    except RowRejected as problem:
        raise UsageError(f"{file}: {problem}") from None
    except OSError as error:
        raise UsageError(f"{file}: {explain(error)}") from None


def _find_foreign_member(values: Mapping[str, Any]) -> str | None:
    extra = next((name for name in values if name not in _COLUMNS), None)
    return None if extra is None else f"{extra[:40]!r} says nothing about a label"


def _parse_label(values: Mapping[str, Any]) -> Label | str:
    text, source, output = (
        (value.strip() or None) if isinstance(value, str) else value
        for value in (values.get("label"), values.get("source"), values.get("output"))
    )
    try:
        return labels.parse_label(values.get("row"), values.get("t"), text, source, output)
    except ValueError as problem:
        return str(problem)


def submit(conf: Config, task: str, labels: list[tuple[int, Label]], by: str) -> tuple[int, dict[int, str]]:
    """Send labels to the daemon or write them to the store; return the number accepted, and line → reason."""
    author = _authenticate(conf, by)
    try:
        client = Client(conf.data_dir / "intake.sock")
    except ConnectionError as error:
        try:
            return _write_to_store(conf, task, labels, by if author else "")
        except StorageBusy as busy:
            raise OutstationError(f"{busy}; the daemon takes no labels now: {error}") from None
    try:
        for _, label in labels:
            place = {"row": label.row} if label.row is not None else {"t": (label.t or 0) / 1e6}
            client.label(task, label.text, source=label.source, author=author, output=label.output, **place)
        answer = client.flush()
    except ConnectionError as error:
        raise OutstationError(f"the daemon went away ({error}); send the labels again, each counts once") from None
    finally:
        client.close()
    return answer.accepted, {labels[number - 1][0]: reason for number, reason in answer.rejected}


def _authenticate(conf: Config, by: str) -> tuple[str, str] | None:
    """Return the name with its token; None, with a note, if this user may not read the key."""
    try:
        key = secret_file.LABEL_KEY.load_or_create(conf.data_dir)
    except (UsageError, StorageError) as problem:
        echo(f"note: these labels are not authenticated, so no roll-out acts on them: {problem}", err=True)
        return None
    return by, secret_file.make_token(key, by)


def _write_to_store(conf: Config, task: str, labels: list[tuple[int, Label]], by: str) -> tuple[int, dict[int, str]]:
    with device.open_store(conf) as store:
        manifest = bundle.read(history.locate_bundle(conf, store, task), None).manifest
        targets = {task: LabelTarget(conf.tasks[task].stream, manifest.label_schemas)}
        group, now = GroupCommit(store, conf.streams, lambda: targets), make_clock(store)
        accepted, rejected = 0, dict[int, str]()
        for number, (line, label) in enumerate(labels, 1):
            group.add_labels("", LabelBatch(task, [label], {}, by), line, now())
            if group.is_full or number == len(labels):
                for outcome in group.commit(now()).values():
                    accepted += outcome.accepted
                    rejected |= dict(outcome.rejected)
        return accepted, rejected
