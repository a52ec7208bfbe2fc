"""Row history: rejects rows that repeat, come late or jump, by the rows of their stream that came before.

It lasts across connections and restarts: the latest time is in the store, everything else is read from its last rows.
A history never changes, so a transaction that fails leaves none of its rows behind in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.clock import ClockReading
from agent.config import FieldConfig, StreamConfig
from agent.device.store.rows import Rows, row_bytes

# Rows that a new one is compared with, at most; of wide rows fewer, because they are read from the store once.
MAX_RECENT_ROWS = 65_536
_MAX_READ_BYTES = 16 << 20
DUPLICATE, LATE, STEP, OUT_OF_ORDER = "duplicate", "late", "step", "out of order"
# Multiplier of the splitmix64 generator; odd, so that no information is lost.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_NO_HASHES = np.zeros(0, np.uint64)

Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]


class LastValues(msgspec.Struct, frozen=True):
    """Last values of the fields with a `max_step`, by index: of the last accepted row, and of the last row at all."""

    accepted: dict[int, float] = {}
    received: dict[int, float] = {}


class RowHistory(msgspec.Struct, frozen=True):
    """Newest rows of a stream, to compare the next ones with.

    `latest_us`: its latest time, epoch µs; None before the first row that came with a time. `committed_us`: the same
    before this transaction, in which rows of several producers are ordered by producer. `hashes`: of its recent rows;
    None until a row could be a duplicate. `last`: None until it is read from the store.
    """

    latest_us: int | None = None
    committed_us: int | None = None
    hashes: Hashes | None = None
    last: LastValues | None = None

    def begin_transaction(self) -> RowHistory:
        return msgspec.structs.replace(self, committed_us=self.latest_us)


class ScreenedRows(msgspec.Struct, frozen=True):
    """Result of `screen`: index of each rejected row → (kind, field or ""); how many accepted ones are out of order."""

    rejected: dict[int, tuple[str, str]]
    out_of_order: int
    history: RowHistory


def screen(
    history: RowHistory,
    rows: Rows,
    has_time: Mask | bool,
    stream: StreamConfig,
    now: ClockReading,
    load_recent: Callable[[int], list[Rows]],
    *,
    is_recording: bool,
) -> ScreenedRows:
    """Compare rows, at least one, with those before them. Times that were given ascend.

    `has_time`: rows that came with a time; the others can be neither late nor duplicates. `load_recent` returns the
    last rows of the stream, up to a number. `is_recording`: rows of a file may be older than those of another file.
    """
    rejected: dict[int, tuple[str, str]] = {}
    out_of_order = np.zeros(len(rows), bool)
    given = np.full(len(rows), has_time) if isinstance(has_time, bool) else has_time
    latest, committed, hashes = history.latest_us, history.committed_us, history.hashes
    if given.any():
        t = rows.t[given]
        if committed is not None and t[0] < committed:
            late = given & (rows.t < _oldest_accepted(committed, now, stream, is_recording=is_recording))
            rejected |= {int(index): (LATE, "") for index in np.flatnonzero(late)}
            out_of_order = given & (rows.t < committed)
        if stream.rejects_duplicates:
            repeats = (latest is not None and t[0] <= latest) or bool((t[1:] <= t[:-1]).any())
            if repeats and hashes is None:
                hashes = np.concatenate([_NO_HASHES, *map(hash_rows, load_recent(recent_rows(stream)))])
            if repeats and hashes is not None:
                for index in _find_duplicates(hash_rows(rows), given, hashes):
                    rejected.setdefault(index, (DUPLICATE, ""))
        before = latest if latest is None or now.quality == "unsynced" else min(latest, now.wall_us)
        latest = max(int(t[-1]), before if before is not None else int(t[-1]))
    last = history.last
    if any(field.max_step is not None for field in stream.fields):
        if last is None:
            last = _read_last_values(load_recent(1), stream)
        last = _reject_steps(rows, stream, last, rejected)
    accepted = np.ones(len(rows), bool)
    accepted[list(rejected)] = False
    if hashes is not None:
        hashes = np.concatenate([hashes, hash_rows(rows)[accepted]])[-recent_rows(stream) :]
    return ScreenedRows(
        rejected, int(np.count_nonzero(out_of_order & accepted)), RowHistory(latest, committed, hashes, last)
    )


def describe(kind: str, field: str, stream_name: str, stream: StreamConfig) -> str:
    """Return the reason of a rejected row."""
    if kind == DUPLICATE:
        return (
            "duplicate: a row with this time and these values is in the stream already; if its rows may repeat, set "
            f'duplicates = "accept" in [streams.{stream_name}]'
        )
    if kind == LATE:
        return (
            f"late: t is more than {stream.allowed_lateness:g} s before the stream's latest row; correct the "
            f"producer's clock, or raise allowed_lateness in [streams.{stream_name}]"
        )
    limit = next(f.max_step for f in stream.fields if f.name == field)
    return f"{field} changed by more than max_step {limit:.9g} since the row before"


def is_row_reason(reason: str) -> bool:
    """Return True if a reason can only be known where earlier rows are."""
    return "duplicate: " in reason or "late: " in reason or "more than max_step" in reason


def recent_rows(stream: StreamConfig) -> int:
    return max(1, min(MAX_RECENT_ROWS, _MAX_READ_BYTES // row_bytes(stream)))


def hash_rows(rows: Rows) -> Hashes:
    """Return a hash (n,) of each row's time and values, bit by bit."""
    hashes = rows.t.view(np.uint64) * _MULTIPLIER
    for column in rows.columns:
        bits = column.view(f"u{column.dtype.itemsize}").astype(np.uint64, copy=False)
        hashes ^= hashes >> _SHIFT
        hashes += bits
        hashes *= _MULTIPLIER
    return hashes


def _oldest_accepted(latest_us: int, now: ClockReading, stream: StreamConfig, *, is_recording: bool) -> int:
    """Return the earliest time that is not late, epoch µs.

    A producer whose clock was in the future must not keep out all rows until then: the present counts instead.
    """
    if is_recording:
        return -(2**62)
    from_us = latest_us if now.quality == "unsynced" else min(latest_us, now.wall_us)
    return from_us - round(stream.allowed_lateness * 1e6)


def _find_duplicates(new: Hashes, given: Mask, recent: Hashes) -> list[int]:
    """Return the indices of rows with a time that are among `recent`, or earlier in `new`."""
    candidates = np.flatnonzero(given)
    values = new[candidates]
    # The recent rows are filtered by the few new ones: sorting all of them for each block would be slow.
    repeated = np.isin(values, recent[np.isin(recent, values)])
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return [int(index) for index in candidates[repeated | ~first]]


def _read_last_values(recent: list[Rows], stream: StreamConfig) -> LastValues:
    values: dict[int, float] = {}
    for index, _ in _stepped_fields(stream):
        if recent and not math.isnan(value := float(recent[-1].columns[index][-1])):
            values[index] = value
    return LastValues(values, dict(values))


def _stepped_fields(stream: StreamConfig) -> list[tuple[int, FieldConfig]]:
    return [(index, field) for index, field in enumerate(stream.fields) if field.max_step is not None]


def _reject_steps(
    rows: Rows, stream: StreamConfig, last: LastValues, rejected: dict[int, tuple[str, str]]
) -> LastValues:
    """Add rows that jump to `rejected`, and return the last values after them.

    A value jumps if it is too far from the last accepted one and from the one before it: a spike costs one row, and a
    new level is accepted from its second row on.
    """
    screened = np.ones(len(rows), bool)
    screened[list(rejected)] = False
    accepted, received = dict(last.accepted), dict(last.received)
    for index, field in _stepped_fields(stream):
        assert field.max_step is not None
        column = rows.columns[index]
        where = np.flatnonzero(screened if column.dtype.kind != "f" else screened & ~np.isnan(column))
        values = column[where].astype(np.float64)
        if not len(values):
            continue
        # Values of the column's own precision: 0.1 to 0.2 is a step of 0.1.
        precision = np.finfo(column.dtype).eps if column.dtype.kind == "f" else 0.0
        limit = field.max_step + 2 * float(precision) * float(np.abs(values).max())
        jumps, level = _find_jumps(values, accepted.get(index), received.get(index), limit)
        for position in jumps:
            rejected.setdefault(int(where[position]), (STEP, field.name))
        received[index] = float(values[-1])
        if level is not None:
            accepted[index] = level
    return LastValues(accepted, received)


def _find_jumps(
    values: NDArray[np.float64], accepted: float | None, received: float | None, limit: float
) -> tuple[list[int], float | None]:
    """Return the positions of values that jump, and the last accepted value."""
    before = np.concatenate([[values[0] if received is None else received], values[:-1]])
    is_near = np.abs(values - before) <= limit
    jumps: list[int] = []
    level = values[0] if accepted is None else accepted
    # Without a step, every value is near the one before it.
    for position in np.flatnonzero(~is_near):
        if position and position - 1 not in jumps[-1:]:
            level = values[position - 1]
        if abs(values[position] - level) > limit:
            jumps.append(int(position))
        else:
            level = values[position]
    last = len(values) - 1
    if jumps[-1:] != [last]:
        level = values[last]
    return jumps, float(level)


def summarize_reasons(reasons: Mapping[int, str], item: str) -> str:
    """Return one reason for a line of columns; `reasons`: position → reason."""
    shown = "; ".join(f"{item} {index + 1} of the columns: {reason}" for index, reason in sorted(reasons.items())[:5])
    return shown + (f"; and {len(reasons) - 5} more {item}s" if len(reasons) > 5 else "")
