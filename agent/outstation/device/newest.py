"""Newest results and readings of a store as rows for people: read only, beside a daemon that writes.

Results come from the results messages that the store still holds, delivered or not: each task's newest ones stay after
delivery (`retention.NewestResults`). Readings come from its chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.store import cost
from outstation.device.store.clock_segments import QUALITIES, ClockStamp
from outstation.device.store.outbox import OutboxMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.foundation import clock, decoders
from outstation.protocol.wire import runs
from outstation.protocol.wire.messages import ResultColumns
from outstation.protocol.wire.runs import Label, LabelRun

# Messages that are read for the newest results, at most.
_MAX_MESSAGES = 512
# Rows or messages that one look for new ones takes.
MAX_NEW = 1000


class ResultRows(msgspec.Struct, frozen=True):
    """Rows of results in order of the log, and the seq of the newest message that was read.

    `is_cut`: the rows asked for include older ones that were written but are no longer stored.
    """

    rows: list[dict[str, Any]]
    last_seq: int
    is_cut: bool = False


def read_results(store: Store, task: str | None, count: int) -> ResultRows:
    """Return the newest `count` results of a task, or of all tasks; fewer if the store holds fewer."""
    # First: what is written meanwhile is new.
    head = store.log_head()[0]
    limit, messages = 8, store.recent_messages("results", task, 8)
    while len(messages) == limit < _MAX_MESSAGES and sum(map(_count_rows, messages)) < count:
        limit *= 8
        messages = store.recent_messages("results", task, limit)
    rows = [row for message in messages for row in expand_results(message)]
    is_cut = len(rows) < count and len(messages) < _count_written(store, task)
    return ResultRows(rows[-count:], messages[-1].seq if messages else head, is_cut)


def read_new_results(store: Store, task: str | None, after: int) -> ResultRows:
    """Return the results of messages after seq `after`."""
    messages = store.recent_messages("results", task, MAX_NEW, after=after)
    rows = [row for message in messages for row in expand_results(message)]
    return ResultRows(rows, messages[-1].seq if messages else after)


def _count_written(store: Store, task: str | None) -> int:
    """Return how many results messages a task, or all of them, ever wrote."""
    counters = store.counters()
    return counters.get("messages.results" if task is None else cost.message_counter(task, "results"), 0)


def _count_rows(message: OutboxMessage) -> int:
    return len(expand_results(message))


def expand_results(message: OutboxMessage) -> list[dict[str, Any]]:
    """Return the results that a message lists; none for a message whose bytes are damaged."""
    try:
        body = msgspec.json.decode(message.payload)
        columns = decoders.convert(body["columns"], ResultColumns)
        lists = {name: getattr(columns, name) for name in ("score", "value", "missing")}
        lists |= {name: cells for name, cells in body["columns"].items() if name.startswith(("value_", "score_"))}
        lists |= {
            name: runs.expand_labels(decoders.convert(cells, list[Label | LabelRun]))
            for name, cells in body["columns"].items()
            if name.startswith("label_")
        }
        rows, labels = columns.expand_rows(), columns.expand_labels()
        qualities = _qualities(rows, body.get("clocks"))
        times = columns.expand_times()
        task, faults, model = str(body["task"]), list(body.get("faults", [])), body["model"]
        shared = {"faults": faults, "model": f"{model['name']} {model['version']}", "seq": message.seq}
        shared |= {"computed": message.time}
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [
        {
            "task": task,
            "row": row,
            "time": clock.to_rfc3339(times[index]),
            "clock": qualities[index],
            "label": None if labels is None else labels[index],
            **{name: cells[index] for name, cells in lists.items() if cells is not None},
            **shared,
        }
        for index, row in enumerate(rows)
    ]


def _qualities(rows: Sequence[int], clocks: Sequence[Sequence[int]] | None) -> list[str]:
    """Return the clock quality of each row; runs of `clocks` are [first row, boot, segment, quality]."""
    if not clocks:
        return ["synced"] * len(rows)
    places = np.searchsorted([run[0] for run in clocks], rows, side="right") - 1
    return [QUALITIES[clocks[max(0, place)][3]] for place in places.tolist()]


def read_readings(store: Store, name: str, stream: StreamConfig, count: int) -> list[dict[str, Any]]:
    """Return the newest `count` rows of a stream that are stored and readable."""
    return read_new_readings(store, name, stream, max(store.last_row(name) - count, store.first_row(name) - 1), count)


def read_new_readings(
    store: Store, name: str, stream: StreamConfig, after: int, count: int = MAX_NEW
) -> list[dict[str, Any]]:
    """Return up to `count` rows after row `after`; those that are deleted or damaged are left out and not counted."""
    texts = {f.name: store.categories(name, f.name) for f in stream.fields if f.type == "category"}
    rows: list[dict[str, Any]] = []
    while count > 0 and (batch := store.read_rows(name, stream.fields, after, count)) is not None:
        readable = [*_expand_readings(batch, stream.fields, texts)]
        rows += readable
        count, after = count - len(readable), batch.last
    return rows


def _expand_readings(
    batch: RowBatch, fields: Sequence[FieldConfig], texts: dict[str, list[str]]
) -> Iterator[dict[str, Any]]:
    if batch.loss_reason:
        return
    stamps = list(batch.stamps)
    for index, t in enumerate(batch.rows.t.tolist()):
        row = batch.first + index
        values = {
            field.name: _read_cell(column[index], texts.get(field.name))
            for field, column in zip(fields, batch.rows.columns, strict=True)
        }
        yield {"row": row, "time": clock.to_rfc3339(t), "clock": _quality(stamps, row), "values": values}


def _quality(stamps: Sequence[ClockStamp], row: int) -> str:
    return QUALITIES[next(stamp.quality for stamp in reversed(stamps) if stamp.first <= row)]


def _read_cell(cell: Any, texts: list[str] | None) -> float | int | str | None:
    """Return a value with no more digits than its type holds; None for a missing one."""
    if texts is not None:
        return (texts[cell] if cell < len(texts) else None) or None
    if cell.dtype.kind == "i":
        return int(cell)
    number = float(str(cell))
    return number if math.isfinite(number) else None
