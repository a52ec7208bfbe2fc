"""Joined streams: rows of further streams that a batch's windows are joined with, by time.

A window waits until its joined streams have a row of a later time, so that no earlier row can still come; or until it
has waited as long as the config says, restarts included. Rows that come later than that are left out. Windows that come
while others wait begin their wait once those are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.config import JoinedStreamConfig, StreamConfig
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import Rows, commit
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import decoders
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.ml.model.bundle.manifest import JoinedInput
from outstation.ml.model.inference import features, joins
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.inference.joins import JoinedRows
from outstation.protocol.wire import commitment
from outstation.protocol.wire.messages import JoinedRange

# Rows of one stream that are held in memory; windows beyond them wait for the next batch.
_MAX_ROWS = 200_000
_READ_ROWS = 50_000
# Values of joined rows that a batch commits to: these are read once more, all into memory.
_MAX_COMMITTED_VALUES = 4_000_000


class JoinedStream(msgspec.Struct, frozen=True):
    """Stream of a joined input, and how long a window waits for its rows."""

    name: str
    config: StreamConfig
    wait_s: float


class JoinedPosition(msgspec.Struct, frozen=True):
    """First row of `stream` that windows of the bundle with digest `bundle` need if they end at `end_us` or later."""

    stream: str
    bundle: str
    row: int
    end_us: int


class JoinedWait(msgspec.Struct, frozen=True):
    """Windows up to the one that ends at row `end_row` wait since the uptime `since_s`."""

    end_row: int
    since_s: float


class JoinedBatch(msgspec.Struct, frozen=True, eq=False):
    """Windows with their joined values, and the rows that they took of each input's stream.

    `positions` are where the next reads start, `wait` is that of the windows after these.
    """

    cut: WindowCut
    rows: Mapping[str, JoinedRange]
    positions: Mapping[str, JoinedPosition]
    wait: JoinedWait | None


class JoinedReader:
    """Reader of the joined streams of one task. Keeps the first row of each stream that is still needed."""

    def __init__(self, task: str, bundle: str, inference: Inference, streams: Mapping[str, JoinedStream]) -> None:
        self._task, self._bundle, self._inference, self._streams = task, bundle, inference, streams
        # Where reads begin, and what the store has of it: while windows wait, only the former moves on.
        self._positions: dict[str, JoinedPosition] | None = None
        self._saved: dict[str, JoinedPosition] = {}
        self._waiting: JoinedWait | None = None
        self._saved_wait: JoinedWait | None = None

    def join(
        self, store: Store, cut: WindowCut, t: Ints, first_row: int, now: ClockReading | None = None
    ) -> JoinedBatch:
        """Return the windows of rows at `t` (n,), from `first_row` on, that are ready, with their joined values.

        Without `now` no window waits. Windows whose joined rows exceed the memory limit are left for the next batch.
        Raises StorageError.
        """
        known, inputs = self._load_positions(store), self._inference.manifest.joined
        ends = cut.starts + self._inference.rows - 1
        if not len(ends):
            empty = {name: JoinedRows(_no_values(spec), np.zeros(0, np.int64)) for name, spec in inputs.items()}
            return JoinedBatch(self._inference.join(cut, t, empty), {}, self._saved, self._waiting)
        ready = len(ends)
        while True:
            times = t[ends[:ready]]
            parts = {name: self._read(store, name, spec, known.get(name), times) for name, spec in inputs.items()}
            for name, spec in inputs.items():
                known[name] = self._position(name, spec, parts[name], int(times.min()))
            if ready == 1 or not any(part.is_cut and part.latest_us <= times[0] for part in parts.values()):
                break
            ready //= 2
        if now is not None or any(part.is_cut for part in parts.values()):
            uptime_s = None if now is None else store.uptime_s(now)
            ready = self._count_ready(parts, times, first_row + ends[:ready], uptime_s)
        if ready < len(ends):
            cut = WindowCut(cut.starts[:ready], int(cut.starts[ready]))
        rows = {}
        for name, spec in inputs.items():
            part, used = parts[name], joins.find_used_range(spec, parts[name].t, times[:ready])
            if used is not None:
                first, last = part.numbers[[*used]].tolist()
                rows[name] = JoinedRange(self._streams[name].name, (first, last))
        joined = {name: JoinedRows(part.values, part.t) for name, part in parts.items()}
        end_us = int(times[ready - 1] if ready else times.min())
        positions = {name: self._position(name, spec, parts[name], end_us) for name, spec in inputs.items()}
        wait = self._wait_after(first_row + ends, ready)
        return JoinedBatch(self._inference.join(cut, t, joined), rows, positions, wait)

    def last_rows(self, batch: JoinedBatch) -> dict[str, tuple[str, int]]:
        """Return by input its stream, and the last row of it that the batch's windows took; 0 for none."""
        return {
            name: (stream.name, batch.rows[name].rows[1] if name in batch.rows else 0)
            for name, stream in self._streams.items()
        }

    def commit(self, store: Store, message_log: MessageLog, batch: JoinedBatch) -> JoinedBatch:
        """Return the batch with the commitments to its joined rows. Raises StorageError."""
        configs = {stream.name: stream.config for stream in self._streams.values()}
        rows = {
            name: msgspec.structs.replace(each, input=_commit(store, message_log, each, configs[each.stream]))
            for name, each in batch.rows.items()
        }
        return msgspec.structs.replace(batch, rows=rows)

    def save_wait(self, store: Store) -> None:
        """Save since when windows wait, so that a restart does not begin the wait anew. Raises StorageError."""
        if self._waiting is None or self._waiting == self._saved_wait:
            return
        try:
            with store.transaction() as tx:
                tx.save_state(self._task, task_keys.JOINED_WAIT, msgspec.json.encode(self._waiting))
        except StorageFull:
            # The wait continues in memory; a batch that is ready does not need this room.
            return
        self._saved_wait = self._waiting

    def save(self, tx: Transaction, batch: JoinedBatch) -> None:
        """Save the first rows that are still needed, in the batch's commit."""
        if batch.positions != self._saved:
            tx.save_state(self._task, task_keys.JOINED_ROWS, msgspec.json.encode(batch.positions))
        if batch.wait is None and self._saved_wait is not None:
            tx.delete_state(self._task, task_keys.JOINED_WAIT)
        elif batch.wait is not None and batch.wait != self._saved_wait:
            tx.save_state(self._task, task_keys.JOINED_WAIT, msgspec.json.encode(batch.wait))

    def confirm(self, batch: JoinedBatch) -> None:
        """Keep what was committed."""
        self._saved, self._waiting, self._saved_wait = dict(batch.positions), batch.wait, batch.wait
        if len(batch.cut.starts):
            self._positions = dict(batch.positions)

    def _load_positions(self, store: Store) -> dict[str, JoinedPosition]:
        if self._positions is None:
            self._saved = load_positions(store, self._task)
            self._positions = dict(self._saved)
            self._waiting = self._saved_wait = _load_wait(store, self._task)
        return self._positions

    def _position(self, name: str, spec: JoinedInput, part: _StreamRows, end_us: int) -> JoinedPosition:
        at = joins.first_needed(spec, part.t, end_us)
        row = int(part.numbers[at]) if at < len(part.t) else part.last
        return JoinedPosition(self._streams[name].name, self._bundle, row, end_us)

    def _count_ready(
        self, parts: Mapping[str, _StreamRows], times: Ints, end_rows: Ints, uptime_s: float | None
    ) -> int:
        """Return how many of the first windows need not wait; without `uptime_s` none waits for later rows."""
        ready = len(times)
        waiting = self._waiting
        if waiting is not None and (waiting.end_row < end_rows[0] or waiting.since_s > (uptime_s or waiting.since_s)):
            # Another bundle is done with these windows, or the store lost the uptime.
            self._waiting = None
        for name, part in parts.items():
            if uptime_s is None and not part.is_cut:
                continue
            is_open = times >= part.latest_us
            if uptime_s is not None and not part.is_cut and self._waiting is not None:
                has_waited = uptime_s >= self._waiting.since_s + self._streams[name].wait_s
                is_open &= (end_rows > self._waiting.end_row) | (not has_waited)
            ready = min(ready, int(np.argmax(is_open)) if is_open.any() else ready)
        if uptime_s is not None and ready < len(times) and self._waiting is None:
            self._waiting = JoinedWait(int(end_rows[-1]), uptime_s)
        return ready

    def _wait_after(self, end_rows: Ints, ready: int) -> JoinedWait | None:
        """Return the remaining wait, for windows that end at `end_rows` (w,), once the first `ready` are committed."""
        if self._waiting is None or not ready:
            return self._waiting
        # Row numbers may have begun again: no wait reaches beyond the windows that are there.
        last = min(self._waiting.end_row, int(end_rows[-1]))
        return msgspec.structs.replace(self._waiting, end_row=last) if last > end_rows[ready - 1] else None

    def _first_row(self, store: Store, stream: str, position: JoinedPosition | None, end_us: int) -> int:
        """Return the row to read from: the oldest one if the position is of another stream, another bundle or later."""
        oldest = max(store.first_row(stream), 1)
        if position is None or (position.stream, position.bundle) != (stream, self._bundle):
            return oldest
        # The clock stepped back, or row numbers began again.
        is_later = position.end_us > end_us or position.row > store.last_row(stream) + 1
        return oldest if is_later else max(oldest, position.row)

    def _read(
        self, store: Store, name: str, spec: JoinedInput, position: JoinedPosition | None, times: Ints
    ) -> _StreamRows:
        """Read the rows that windows at `times` need, and one of a later time if there is one."""
        stream, last_us = self._streams[name], int(times.max())
        columns = [[f.name for f in stream.config.fields].index(field) for field in spec.fields]
        first = self._first_row(store, stream.name, position, int(times.min()))
        nothing = _StreamRows(np.zeros(0, np.int64), np.zeros(0, np.int64), _no_values(spec), first)
        pieces, count, at, latest_us, is_cut = [nothing], 0, first - 1, int(np.iinfo(np.int64).min), False
        # Single rows with a wrong time far ahead, or from before a step of the clock, end no reading.
        is_later = False
        while not (is_later or is_cut):
            piece = store.read_rows(stream.name, stream.config.fields, at, _READ_ROWS)
            if piece is None:
                break
            at = piece.last
            if piece.loss_reason:
                # Lost rows cannot be joined: the rows after them begin anew.
                pieces, count = [nothing], 0
                continue
            latest_us, is_later = int(piece.t[-1]), int(piece.t.min()) > last_us
            matrix = features.stack_columns([piece.rows.columns[i] for i in columns])
            valued = np.flatnonzero(joins.find_valued(matrix))
            pieces.append(_StreamRows(piece.first + valued, piece.t[valued], matrix[valued], at))
            count += len(valued)
            if count >= _MAX_ROWS:
                # Rows that no window needs make way in a stream that was stored long before.
                part = _concatenate(pieces)
                pieces = [part.select_rows(joins.select_needed(spec, part.t, times))]
                count = len(pieces[0].t)
                is_cut = count >= _MAX_ROWS and not is_later
        part = _concatenate(pieces)
        part = part.select_rows(np.arange(joins.first_needed(spec, part.t, int(times.min())), len(part.t)))
        return msgspec.structs.replace(part, last=max(first, at), latest_us=latest_us, is_cut=is_cut)


class JoinedPart(BatchPart):
    """Joined streams of a batch: its windows wait for their rows, and take them from the `reader`."""

    def __init__(self, plan: TaskPlan, streams: Mapping[str, JoinedStream]) -> None:
        self._plan, self._streams = plan, streams
        self.reader = JoinedReader(plan.name, plan.bundle.digest, plan.inference, streams)
        self._batch: JoinedBatch | None = None

    def with_new_reader(self) -> JoinedPart:
        """Return a part that knows only the positions in the store."""
        return JoinedPart(self._plan, self._streams)

    def join(
        self, store: Store, message_log: MessageLog, cut: WindowCut, rows: RowBatch, now: ClockReading
    ) -> WindowCut | None:
        """Return the windows that are ready, with their joined values; None if none is. Raises StorageError."""
        joined = self.reader.join(store, cut, rows.t, rows.first, now)
        if joined.cut.consumed == 0 and len(cut.starts):
            self.reader.save_wait(store)
            return None
        self._batch = self.reader.commit(store, message_log, joined)
        return joined.cut

    def read(self, batch: Batch) -> None:
        if self._batch is not None:
            batch.joined_rows, batch.last_joined = self._batch.rows, self.reader.last_rows(self._batch)

    def save(self, tx: Transaction, batch: Batch) -> None:
        if self._batch is not None:
            self.reader.save(tx, self._batch)

    def confirm(self, batch: Batch) -> None:
        if self._batch is not None:
            self.reader.confirm(self._batch)
            self._batch = None


class _StreamRows(msgspec.Struct, frozen=True, eq=False):
    """Rows with a value: their `numbers`, `t` and `values` (m, F). `last`: the last row read.

    `latest_us` is the time of the last row read. `is_cut`: more follow.
    """

    numbers: Ints
    t: Ints
    values: Float32s
    last: int
    latest_us: int = 0
    is_cut: bool = False

    def select_rows(self, indices: Ints) -> _StreamRows:
        return _StreamRows(self.numbers[indices], self.t[indices], self.values[indices], self.last)


def _concatenate(parts: Sequence[_StreamRows]) -> _StreamRows:
    return _StreamRows(
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.t for part in parts]),
        np.concatenate([part.values for part in parts]),
        parts[-1].last,
    )


def _no_values(spec: JoinedInput) -> Float32s:
    return np.empty((0, len(spec.fields)), np.float32)


def to_status(store: Store, task: str, inputs: Mapping[str, JoinedStreamConfig]) -> dict[str, Any]:
    """Return the member `joined` of a task's status: where each input's stream is read from, and what waits for it."""
    if not inputs:
        return {}
    positions, wait = load_positions(store, task), _load_wait(store, task)
    streams = {
        name: {
            "stream": source.stream,
            "row": positions[name].row if name in positions else None,
            "last": store.last_row(source.stream),
            "wait_s": float(source.wait),
        }
        for name, source in inputs.items()
    }
    return {"joined": {"streams": streams, "waiting_through": None if wait is None else wait.end_row}}


def _load_wait(store: Store, task: str) -> JoinedWait | None:
    try:
        stored = store.load_state(task, task_keys.JOINED_WAIT)
        return None if stored is None else decoders.from_json(stored, JoinedWait)
    except msgspec.MsgspecError:
        return None


def _commit(store: Store, message_log: MessageLog, rows: JoinedRange, stream: StreamConfig) -> str:
    """Return the commitment to rows of `stream`; "" for very many, or if they cannot be read any more."""
    first, last = rows.rows
    if (last - first + 1) * (len(stream.fields) + 1) > _MAX_COMMITTED_VALUES:
        return ""
    pieces, at = list[Rows](), first - 1
    while at < last:
        piece = store.read_rows(rows.stream, stream.fields, at, last - at)
        if piece is None or piece.loss_reason or piece.first != at + 1:
            return ""
        pieces += piece.slice_parts(0, last - at)
        at = piece.last
    texts = {f.name: store.categories(rows.stream, f.name) for f in stream.fields if f.type == "category"}
    key = commitment.derive_joined_key(message_log.secret, message_log.log_id, rows.stream, rows.rows)
    return commit(pieces, key, stream.fields, texts)


def load_positions(store: Store, task: str) -> dict[str, JoinedPosition]:
    """Return the first row of each joined input's stream that `task` still needs."""
    try:
        return decoders.from_json(store.load_state(task, task_keys.JOINED_ROWS) or b"{}", dict[str, JoinedPosition])
    except msgspec.MsgspecError:
        return {}
