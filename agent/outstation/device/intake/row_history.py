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

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.store.rows import Rows, row_bytes
from outstation.foundation.clock import ClockReading

# Rows that a new one is compared with, at most; of wide rows fewer, because they are read from the store once.
MAX_RECENT_ROWS = 65_536
_MAX_READ_BYTES = 16 << 20
DUPLICATE, LATE, STEP, OUT_OF_ORDER = "duplicate", "late", "step", "out of order"
# On an unsynced clock, this number of consecutive late rows shows that the latest time was wrong: the last is accepted.
MAX_LATE_RUN = 3
# Number of stored rows that are read after a start, to learn their latest time.
_NEWEST_ROWS = 4096
# Multiplier of the splitmix64 generator; odd, so that no information is lost.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
# The multiplication mixes the first bits best.
_FIRST_BITS = 16

Hashes = NDArray[np.uint64]
Mask = NDArray[np.bool_]
# Index of a row → reason, and what it is about.
_Rejections = dict[int, tuple[str, str]]


class LastValues(msgspec.Struct, frozen=True):
    """Last values of the fields with a `max_step`, by index: of the last accepted row, and of the last row at all."""

    accepted: dict[int, float] = {}
    received: dict[int, float] = {}


class LatestTime(msgspec.Struct, frozen=True):
    """Time from which lateness counts, epoch µs; `late_run`: rows that were late since the last one that was not."""

    us: int | None = None
    late_run: int = 0


class _Buffer:
    """Room for rows, of which `used` are written; the one with this end may append in place."""

    def __init__(self, capacity: int) -> None:
        self.t, self.hashes, self.used = np.empty(capacity, np.int64), np.empty(capacity, np.uint64), 0


class RecentRows(msgspec.Struct, frozen=True):
    """Times, epoch µs, and hashes (n,) of a stream's recent rows; they never change."""

    buffer: _Buffer
    begin: int
    end: int
    is_ascending: bool

    @classmethod
    def from_rows(cls, parts: list[Rows], limit: int) -> RecentRows:
        recent = cls(_Buffer(0), 0, 0, True)
        for part in parts:
            recent = recent.append(part.t, hash_rows(part), limit)
        return recent

    @property
    def t(self) -> NDArray[np.int64]:
        return self.buffer.t[self.begin : self.end]

    @property
    def hashes(self) -> Hashes:
        return self.buffer.hashes[self.begin : self.end]

    def append(self, t: NDArray[np.int64], hashes: Hashes, limit: int) -> RecentRows:
        """Return these rows and newer ones, the last `limit` of them."""
        if not len(t):
            return self
        buffer, begin, end = self.buffer, self.begin, self.end + len(t)
        if buffer.used != self.end or end > len(buffer.t):
            # A copy of all for each block of rows would take longer than everything else.
            buffer, count = _Buffer(limit + limit // 2 + len(t)), self.end - begin
            buffer.t[:count], buffer.hashes[:count] = self.t, self.hashes
            begin, end = 0, count + len(t)
        buffer.t[end - len(t) : end], buffer.hashes[end - len(t) : end] = t, hashes
        buffer.used = end
        follows = self.is_ascending and (begin == end - len(t) or buffer.t[end - len(t) - 1] <= t[0])
        return RecentRows(buffer, max(begin, end - limit), end, bool(follows and (t[1:] >= t[:-1]).all()))

    def find(self, hashes: Hashes, first_us: int, last_us: int) -> Mask:
        """Return which of the rows with these hashes (m,) and times from `first_us` to `last_us` are among these."""
        # Most rows are newer than nearly all of these.
        if self.is_ascending:
            begin = np.searchsorted(self.t, first_us, "left")
            near = self.hashes[begin : np.searchsorted(self.t, last_us, "right")]
        else:
            near = self.hashes[(self.t >= first_us) & (self.t <= last_us)]
        return np.isin(hashes, near[_share_first_bits(near, hashes)])


class RowHistory(msgspec.Struct, frozen=True):
    """Newest rows of a stream, to compare the next ones with.

    `latest_us`: its latest time, epoch µs; None before the first row that came with a time. `committed_us`: the same
    before this transaction, in which rows of several producers are ordered by producer. `recent`: None until a
    row could be a duplicate. `last`: None until it is read from the store. `newest_us`: latest time among
    the recent rows, also if it was in the future; `newest_age`: rows since. `late_run`: see LatestTime.
    """

    latest_us: int | None = None
    committed_us: int | None = None
    recent: RecentRows | None = None
    last: LastValues | None = None
    newest_us: int | None = None
    newest_age: int = 0
    late_run: int = 0

    def begin_transaction(self) -> RowHistory:
        return msgspec.structs.replace(self, committed_us=self.latest_us)


class ScreenedRows(msgspec.Struct, frozen=True):
    """Result of `screen`: index of each rejected row → (kind, field or ""); how many accepted ones are out of order.

    `latest`: the latest time of the producer afterwards.
    """

    rejected: _Rejections
    out_of_order: int
    history: RowHistory
    latest: LatestTime


def screen(
    history: RowHistory,
    rows: Rows,
    has_time: Mask | bool,
    stream: StreamConfig,
    now: ClockReading,
    load_recent: Callable[[int], list[Rows]],
    *,
    is_recording: bool,
    producer_latest: LatestTime | None = None,
    unknown: Mask | bool = False,
) -> ScreenedRows:
    """Compare rows, at least one, with those before them. Times that were given ascend.

    `has_time`: rows that came with a time; the others can be neither late nor duplicates. `load_recent` returns the
    last rows of the stream, up to a number. `is_recording`: rows of a file may be older than those of another file.
    `producer_latest`: of a named producer, whose rows are late by its own rows only; None: by all rows of the stream.
    `unknown`: rows with a category that is stored as `(other)`, which cannot be duplicates.
    """
    measured = LatestTime(history.committed_us, history.late_run) if producer_latest is None else producer_latest
    if has_time is True and _follow_all_others(rows.t, history, measured, stream):
        late_run = 0 if producer_latest is None and not is_recording else history.late_run
        after = _advance(history, int(rows.t[-1]), now, late_run)
        return ScreenedRows({}, 0, after, measured if is_recording else LatestTime(int(rows.t[-1])))
    rejected: _Rejections = {}
    given = np.full(len(rows), has_time) if isinstance(has_time, bool) else has_time
    out_of_order = np.zeros(len(rows), bool)
    latest, committed, recent = history.latest_us, history.committed_us, history.recent
    hashes: Hashes | None = None
    newest, newest_age = history.newest_us, history.newest_age + len(rows)
    if given.any():
        t = rows.t[given]
        last_us = int(t[-1])
        if committed is not None and t[0] < committed:
            out_of_order = given & (rows.t < committed)
        if not is_recording:
            before, measured = measured, _reject_late(rows.t, given, measured, now, stream, rejected)
            if producer_latest is None and _is_reset(before, measured, now):
                latest = committed = measured.us
        if stream.rejects_duplicates:
            if newest is None and latest is not None:
                newest = max([latest, *(int(part.t.max()) for part in load_recent(_NEWEST_ROWS) if len(part))])
            if _may_repeat(t, newest):
                # Read from the store once.
                recent = recent or RecentRows.from_rows(load_recent(recent_rows(stream)), recent_rows(stream))
                hashes = _reject_duplicates(rows, given & ~np.asarray(unknown), recent, rejected)
        latest = last_us if latest is None else max(last_us, _not_after(latest, now))
        if newest is None or last_us >= newest or newest_age > recent_rows(stream):
            newest, newest_age = latest, 0
    last = history.last
    if any(field.max_step is not None for field in stream.fields):
        last = _reject_steps(rows, stream, last or _read_last_values(load_recent(1), stream), rejected)
    accepted = np.ones(len(rows), bool)
    accepted[list(rejected)] = False
    if recent is not None:
        new = (hash_rows(rows) if hashes is None else hashes)[accepted]
        recent = recent.append(rows.t[accepted], new, recent_rows(stream))
    late_run = measured.late_run if producer_latest is None else history.late_run
    history = RowHistory(latest, committed, recent, last, newest, newest_age, late_run)
    return ScreenedRows(rejected, int(np.count_nonzero(out_of_order & accepted)), history, measured)


def _advance(history: RowHistory, last_us: int, now: ClockReading, late_run: int) -> RowHistory:
    """Return the history after rows that follow all others, of which the last has this time."""
    after_us = last_us if history.latest_us is None else max(last_us, _not_after(history.latest_us, now))
    return RowHistory(after_us, history.committed_us, None, history.last, after_us, 0, late_run)


def describe(kind: str, field: str, stream_name: str, stream: StreamConfig) -> str:
    """Return the reason of a rejected row."""
    if kind == DUPLICATE:
        return (
            "duplicate: a row with this time and these values is in the stream already; if its rows may repeat, set "
            f'duplicates = "accept" in [streams.{stream_name}] for later rows, and send none of these again'
        )
    if kind == LATE:
        return (
            f"late: t is more than {stream.allowed_lateness:g} s before the latest row; correct the "
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


def _follow_all_others(t: NDArray[np.int64], history: RowHistory, measured: LatestTime, stream: StreamConfig) -> bool:
    """Return True if rows come after all others that are known, one after another: the usual case, decided in one pass.

    Such rows are neither late, duplicates nor out of order. Rows with a `max_step` are left to the general case, and so
    are those whose hashes are needed.
    """
    if history.newest_us is None or history.recent is not None or not (t[1:] > t[:-1]).all():
        return False
    before = max(history.newest_us, history.committed_us or 0, measured.us or 0)
    return bool(t[0] > before) and all(field.max_step is None for field in stream.fields)


def _not_after(latest_us: int, now: ClockReading) -> int:
    """Return the latest time, or the present if a synchronized clock shows that it is in the future.

    A producer whose clock was in the future must not keep out all rows until then.
    """
    return latest_us if now.quality == "unsynced" else min(latest_us, now.wall_us)


def _reject_late(
    t: NDArray[np.int64],
    given: Mask,
    before: LatestTime,
    now: ClockReading,
    stream: StreamConfig,
    rejected: _Rejections,
) -> LatestTime:
    """Add late rows to `rejected`, and return the latest time after these rows, some of which came with a time."""
    last_us = int(t[given][-1])
    if before.us is None:
        return LatestTime(last_us)
    latest_us = _not_after(before.us, now)
    late = np.flatnonzero(given & (t < latest_us - round(stream.allowed_lateness * 1e6)))
    run = before.late_run + len(late)
    if len(late) < np.count_nonzero(given):
        latest = LatestTime(max(latest_us, last_us))
    elif now.quality == "unsynced" and run >= MAX_LATE_RUN:
        late, latest = late[: max(0, MAX_LATE_RUN - 1 - before.late_run)], LatestTime(last_us)
    else:
        latest = LatestTime(latest_us, run)
    rejected |= {int(index): (LATE, "") for index in late}
    return latest


def _is_reset(before: LatestTime, after: LatestTime, now: ClockReading) -> bool:
    """Return True if late rows replaced the latest time."""
    return now.quality == "unsynced" and before.us is not None and after.us is not None and after.us < before.us


def _may_repeat(t: NDArray[np.int64], newest_us: int | None) -> bool:
    """Return True if a row with one of these ascending times could be in the stream already, or among these twice."""
    return bool((newest_us is not None and t[0] <= newest_us) or (t[1:] <= t[:-1]).any())


def _reject_duplicates(rows: Rows, comparable: Mask, recent: RecentRows, rejected: _Rejections) -> Hashes:
    """Add comparable rows to `rejected` that are among the recent ones, or repeat in `rows`; return all hashes (n,)."""
    hashes, candidates = hash_rows(rows), np.flatnonzero(comparable)
    if not len(candidates):
        return hashes
    values, t = hashes[candidates], rows.t[candidates]
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    repeated = recent.find(values, int(t.min()), int(t.max())) | ~first
    for index in candidates[repeated]:
        rejected.setdefault(int(index), (DUPLICATE, ""))
    return hashes


def _share_first_bits(hashes: Hashes, others: Hashes) -> Mask:
    """Return which of the many hashes (n,) begin like one of the few others: sorting them for each block is slow."""
    table = np.zeros(1 << _FIRST_BITS, bool)
    shift = np.uint64(64 - _FIRST_BITS)
    table[others >> shift] = True
    return np.asarray(table[hashes >> shift])


def _read_last_values(recent: list[Rows], stream: StreamConfig) -> LastValues:
    values: dict[int, float] = {}
    for index, _ in _stepped_fields(stream):
        if recent and not math.isnan(value := float(recent[-1].columns[index][-1])):
            values[index] = value
    return LastValues(values, dict(values))


def _stepped_fields(stream: StreamConfig) -> list[tuple[int, FieldConfig]]:
    return [(index, field) for index, field in enumerate(stream.fields) if field.max_step is not None]


def _reject_steps(rows: Rows, stream: StreamConfig, last: LastValues, rejected: _Rejections) -> LastValues:
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
