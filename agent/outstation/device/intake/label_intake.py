"""Label intake: parses label lines, and stores each label with its prediction or until that exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.device.intake.row_history import summarize_reasons
from outstation.device.machine import secret_file
from outstation.device.store.label_store import PROTECTED, early_capacity, outcome_counter
from outstation.device.store.predictions import output_key
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import RowRejected
from outstation.foundation.strict_json import check_key_count
from outstation.ml.performance import labels as truth
from outstation.ml.performance.labels import Label, LabelTarget

_COLUMNS = ("row", "t", "label", "source", "output")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    labels: str
    row: Any = msgspec.UNSET
    t: Any = msgspec.UNSET
    label: Any = msgspec.UNSET
    source: Any = msgspec.UNSET
    output: Any = msgspec.UNSET
    by: Any = msgspec.UNSET
    token: Any = msgspec.UNSET
    columns: dict[str, list[Any]] | msgspec.UnsetType = msgspec.UNSET


class LabelBatch(msgspec.Struct, frozen=True):
    """Labels of one line, for one task; `rejected`: position → reason.

    `by`: who gave them, authenticated; "" for programs that may write to the socket. `claim`: a name and its token,
    which nobody has verified yet.
    """

    task: str
    labels: list[Label]
    rejected: dict[int, str]
    by: str = ""
    claim: tuple[str, str] | None = None


def parse_line(line: bytes) -> LabelBatch:
    """Parse a JSON line with "labels". Raises RowRejected, and msgspec's errors or ValueError if it is malformed."""
    decoded = decoders.from_json(line, _Line)
    single = {name: value for name in _COLUMNS if (value := getattr(decoded, name)) is not msgspec.UNSET}
    claim = _read_claim(decoded)
    if isinstance(decoded.columns, msgspec.UnsetType):
        texts = [decoded.labels, *(v for v in single.values() if isinstance(v, str)), *(claim or ())]
        check_key_count(line, 1 + len(single) + len(claim or ()), texts)
        columns = {name: [value] for name, value in single.items()}
    elif single:
        raise RowRejected(f'"columns" holds all of a label; move {next(iter(single))!r} into it')
    else:
        columns = decoded.columns
        texts = [value for column in columns.values() for value in column if isinstance(value, str)]
        check_key_count(line, 2 + len(columns) + len(claim or ()), [decoded.labels, *texts, *(claim or ())])
    return replace(parse_columns(decoded.labels, columns), claim=claim)


def _read_claim(line: _Line) -> tuple[str, str] | None:
    if line.by is msgspec.UNSET and line.token is msgspec.UNSET:
        return None
    if not isinstance(line.by, str) or not isinstance(line.token, str):
        raise RowRejected('"by" needs its "token": `outstation label-token NAME` prints it')
    return line.by, line.token


def authenticate(batch: LabelBatch, key: bytes | None) -> LabelBatch:
    """Return the batch with its verified author; without a claim it has none. Raises RowRejected."""
    if batch.claim is None:
        return batch
    if key is None or not secret_file.is_token(key, *batch.claim):
        raise RowRejected(f"the token is not that of {batch.claim[0][:40]!r}; `outstation label-token` prints it")
    return replace(batch, by=batch.claim[0], claim=None)


def parse_columns(task: str, columns: Mapping[str, list[Any]]) -> LabelBatch:
    """Parse labels of columns `row`, `t`, `label`, `source`, `output`. Raises RowRejected."""
    for extra in columns.keys() - set(_COLUMNS):
        raise RowRejected(f"{extra[:40]!r} is no column of labels{did_you_mean(extra, _COLUMNS)}")
    if "label" not in columns:
        raise RowRejected('no "label" in this line')
    n = len(columns["label"])
    if {len(column) for column in columns.values()} != {n} or not n:
        raise RowRejected("columns must be of one length of at least 1")
    labels, rejected = [], {}
    for index in range(n):
        values = (columns[name][index] if name in columns else None for name in _COLUMNS)
        try:
            labels.append(truth.parse_label(*values))
        except ValueError as problem:
            rejected[index] = str(problem)
    return LabelBatch(task, labels, rejected)


def format_reasons(rejected: Mapping[int, str], n: int) -> str:
    """Return one reason for a line of `n` labels; `rejected`: position → reason."""
    if n == 1:
        return rejected[0]
    return summarize_reasons(rejected, "label")


def store_labels(tx: Transaction, target: LabelTarget | None, batch: LabelBatch, now: ClockReading) -> dict[int, str]:
    """Store all labels that can be stored. Return position → reason for the others."""
    rejected = dict(batch.rejected)
    n = len(batch.labels) + len(rejected)
    positions = (index for index in range(n) if index not in batch.rejected)
    for index, label in zip(positions, batch.labels, strict=True):
        reason = store_label(tx, batch.task, target, replace(label, by=batch.by) if batch.by else label, now)
        if reason is not None:
            rejected[index] = reason
    return rejected


def store_label(tx: Transaction, task: str, target: LabelTarget | None, label: Label, now: ClockReading) -> str | None:
    """Store and count one label, with its prediction or until that exists. Return a reason if it is rejected."""
    if target is None:
        return f"there is no task {task[:40]!r} that runs"
    if (schema := target.schemas.get(label.output)) is None:
        known = [name for name in target.schemas if name]
        hint = did_you_mean(label.output, known, "it has one output")
        return f"the model has no further output {label.output[:40]!r}{hint}"
    try:
        schema.parse(label.text)
    except ValueError as problem:
        return str(problem)
    key = output_key(task, label.output)
    span = tx.labels.load_span(key)
    prediction = tx.labels.find(key, label)
    if prediction is not None:
        outcome = tx.labels.store_label(key, label, prediction, now.wall_us)
        tx.increment_counter(outcome_counter(key, outcome), 1)
        if outcome == PROTECTED:
            return (
                "an authenticated label is there, which this one must not replace; send it with `by` and `token`"
                if not label.by
                else f"ground truth is there, which a {label.source} must not replace; send it as source `human`"
            )
        return None
    if label.row is not None and label.row >= tx.next_row(target.stream):
        return f"row {label.row} does not exist yet; the stream has {tx.next_row(target.stream) - 1}"
    early = span is None or (label.t > span.last_t if label.t is not None else (label.row or 0) > span.last)
    if early and (label.row is None or label.row > tx.cursor(task)):
        if not tx.labels.store_early_label(key, label, now.wall_us, tx.uptime_s(now)):
            return f"{early_capacity(label.by):,} labels already wait for their results; run the task first"
        tx.increment_counter(f"labels early.{key}", 1)
        return None
    if span is None or (label.row is not None and label.row < span.first):
        tx.increment_counter(f"labels late.{key}", 1)
        stored = "no result is kept" if span is None else f"results are kept from row {span.first} on"
        return f"too late: {stored} ([buffer] keep_results)"
    tx.increment_counter(f"labels unmatched.{key}", 1)
    if label.row is not None:
        return f"row {label.row} has no result of its own; the result of a window is at its last row"
    return "no result is near enough to this time, or it is no longer kept ([buffer] keep_results)"
