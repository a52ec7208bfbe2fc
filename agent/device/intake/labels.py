"""Labels on their way in: what a line says, and what becomes of each label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.clock import ClockReading
from agent.device.store.labels import MAX_EARLY_LABELS, outcome_counter
from agent.device.store.transaction import Transaction
from agent.errors import RowRejected
from agent.performance import labels as truth
from agent.performance.labels import Label, LabelTarget
from agent.strict_json import check_key_count
from agent.toml_files import did_you_mean

_COLUMNS = ("row", "t", "label", "source")


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    labels: str
    row: Any = msgspec.UNSET
    t: Any = msgspec.UNSET
    label: Any = msgspec.UNSET
    source: Any = msgspec.UNSET
    columns: dict[str, list[Any]] | msgspec.UnsetType = msgspec.UNSET


class LabelBatch(msgspec.Struct, frozen=True):
    """The labels of one line, for one task; `bad`: position → reason."""

    task: str
    labels: list[Label]
    rejected: dict[int, str]


def parse_line(line: bytes) -> LabelBatch:
    """One JSON line that has "labels". Raises Rejected; msgspec's errors and ValueError where it is malformed."""
    found = msgspec.json.decode(line, type=_Line)
    single = {name: value for name in _COLUMNS if (value := getattr(found, name)) is not msgspec.UNSET}
    if isinstance(found.columns, msgspec.UnsetType):
        check_key_count(line, 1 + len(single), [found.labels, *(v for v in single.values() if isinstance(v, str))])
        columns = {name: [value] for name, value in single.items()}
    elif single:
        raise RowRejected(f'"columns" holds all of a label; move {next(iter(single))!r} into it')
    else:
        columns = found.columns
        texts = [value for column in columns.values() for value in column if isinstance(value, str)]
        check_key_count(line, 2 + len(columns), [found.labels, *texts])
    return parse_columns(found.labels, columns)


def parse_columns(task: str, columns: Mapping[str, list[Any]]) -> LabelBatch:
    """The labels of columns `row`, `t`, `label`, `source`. Raises Rejected."""
    for extra in columns.keys() - set(_COLUMNS):
        raise RowRejected(f"{extra[:40]!r} says nothing about a label{did_you_mean(extra, _COLUMNS)}")
    if "label" not in columns:
        raise RowRejected('no "label" in this line')
    n = len(columns["label"])
    if {len(column) for column in columns.values()} != {n} or not n:
        raise RowRejected("columns must be of one length of at least 1")
    labels, bad = [], {}
    for index in range(n):
        values = (columns[name][index] if name in columns else None for name in _COLUMNS)
        try:
            labels.append(truth.parse_label(*values))
        except ValueError as problem:
            bad[index] = str(problem)
    return LabelBatch(task, labels, bad)


def format_reasons(refused: Mapping[int, str], n: int) -> str:
    """The reason for a line of `n` labels some of which, by position, are rejected."""
    if n == 1:
        return refused[0]
    first = "; ".join(f"label {index + 1} of the columns: {reason}" for index, reason in sorted(refused.items())[:5])
    return first + (f"; and {len(refused) - 5} more labels" if len(refused) > 5 else "")


def store_labels(
    tx: Transaction, target: LabelTarget | None, label_batch: LabelBatch, now: ClockReading
) -> dict[int, str]:
    """Keep all that can be kept; position → reason of the others."""
    refused = dict(label_batch.rejected)
    places = (
        index
        for index in range(len(label_batch.labels) + len(label_batch.rejected))
        if index not in label_batch.rejected
    )
    for index, label in zip(places, label_batch.labels, strict=True):
        reason = store_label(tx, label_batch.task, target, label, now)
        if reason is not None:
            refused[index] = reason
    return refused


def store_label(tx: Transaction, task: str, target: LabelTarget | None, label: Label, now: ClockReading) -> str | None:
    """Keep one label with its result, or until that is there; why not, where it is rejected. All of it is counted."""
    if target is None:
        return f"there is no task {task[:40]!r} that runs"
    try:
        target.label_schema.parse(label.text)
    except ValueError as problem:
        return str(problem)
    span = tx.labels.load_span(task)
    result = (
        tx.labels.find_by_row(task, label.row) if label.row is not None else tx.labels.find_nearest(task, label.t or 0)
    )
    if result is not None:
        tx.increment_counter(outcome_counter(task, tx.labels.store_label(task, label, result, now.wall_us)), 1)
        return None
    if label.row is not None and label.row >= tx.next_row(target.stream):
        return f"row {label.row} is not here yet; the stream has {tx.next_row(target.stream) - 1}"
    early = span is None or (label.t > span.last_t if label.t is not None else (label.row or 0) > span.last)
    if early and (label.row is None or label.row > tx.cursor(task)):
        if not tx.labels.store_early_label(task, label, now.wall_us, tx.uptime_s(now)):
            return f"{MAX_EARLY_LABELS} labels wait for their results already; run the task first"
        tx.increment_counter(f"labels early.{task}", 1)
        return None
    if span is None or (label.row is not None and label.row < span.first):
        tx.increment_counter(f"labels late.{task}", 1)
        kept = "no result is kept" if span is None else f"results are kept from row {span.first} on"
        return f"too late: {kept} ([buffer] keep_results)"
    tx.increment_counter(f"labels unmatched.{task}", 1)
    what = f"row {label.row} has no result of its own; a window's is at its last row" if label.row is not None else ""
    return what or "no result is that near to this time, or it is no longer kept ([buffer] keep_results)"
