"""Joined streams: rows of further streams that a batch's windows are joined with, by time.

A window waits until its joined streams have a row of a later time, so that no earlier row can still come; or until it
has waited as long as the config says. Rows that come later than that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from agent import decoders
from agent.arrays import Float32s, Ints
from agent.clock import ClockReading
from agent.config import StreamConfig
from agent.device.store import task_keys
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.model.bundle.manifest import JoinedInput
from agent.model.inference import features, joins
from agent.model.inference.features import WindowCut
from agent.model.inference.inference import Inference
from agent.model.inference.joins import JoinedRows

# Rows of one stream that are held in memory; windows beyond them wait for the next batch.
_MAX_ROWS = 200_000
_READ_ROWS = 50_000


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


class JoinedBatch(msgspec.Struct, frozen=True, eq=False):
    """Windows with their joined values, the rows (first, last) of each input's stream, and the next read's start."""

    cut: WindowCut
    rows: Mapping[str, tuple[str, int, int]]
    positions: Mapping[str, JoinedPosition]


class JoinedReader:
    """Reader of the joined streams of one task. Keeps the first row of each stream that is still needed."""

    def __init__(self, task: str, bundle: str, inference: Inference, streams: Mapping[str, JoinedStream]) -> None:
        self._task, self._bundle, self._inference, self._streams = task, bundle, inference, streams
        # Where reads begin, and what the store has of it: while windows wait, only the former moves on.
        self._positions: dict[str, JoinedPosition] | None = None
        self._saved: dict[str, JoinedPosition] = {}
        # The last window that began to wait, by its end, and when that was.
        self._waiting: tuple[int, float] | None = None

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
            return JoinedBatch(self._inference.join(cut, t, empty), {}, self._saved)
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
            ready = self._count_ready(parts, times, first_row + ends[:ready], now)
        if ready < len(ends):
            cut = WindowCut(cut.starts[:ready], int(cut.starts[ready]))
        rows = {
            name: (self._streams[name].name, int(part.numbers[0]), int(part.numbers[-1]))
            for name, part in parts.items()
            if len(part.numbers)
        }
        joined = {name: JoinedRows(part.values, part.t) for name, part in parts.items()}
        end_us = int(times[ready - 1] if ready else times.min())
        positions = {name: self._position(name, spec, parts[name], end_us) for name, spec in inputs.items()}
        return JoinedBatch(self._inference.join(cut, t, joined), rows, positions)

    def save(self, tx: Transaction, batch: JoinedBatch) -> None:
        """Save the first rows that are still needed, in the batch's commit."""
        if batch.positions != self._saved:
            tx.save_state(self._task, task_keys.JOINED_ROWS, msgspec.json.encode(batch.positions))

    def confirm(self, batch: JoinedBatch) -> None:
        """Keep what was committed."""
        self._saved = dict(batch.positions)
        if len(batch.cut.starts):
            self._positions, self._waiting = dict(batch.positions), None

    def _load_positions(self, store: Store) -> dict[str, JoinedPosition]:
        if self._positions is None:
            self._saved = load_positions(store, self._task)
            self._positions = dict(self._saved)
        return self._positions

    def _position(self, name: str, spec: JoinedInput, part: _JoinedPart, end_us: int) -> JoinedPosition:
        at = joins.first_needed(spec, part.t, end_us)
        row = int(part.numbers[at]) if at < len(part.t) else part.last
        return JoinedPosition(self._streams[name].name, self._bundle, row, end_us)

    def _count_ready(
        self, parts: Mapping[str, _JoinedPart], times: Ints, end_rows: Ints, now: ClockReading | None
    ) -> int:
        """Return how many of the first windows need not wait."""
        ready = len(times)
        for name, part in parts.items():
            if now is None and not part.is_cut:
                continue
            is_open = times >= part.latest_us
            if now is not None and not part.is_cut and self._has_waited(self._streams[name].wait_s, now):
                assert self._waiting is not None
                is_open &= end_rows > self._waiting[0]
            ready = min(ready, int(np.argmax(is_open)) if is_open.any() else ready)
        if now is not None and ready < len(times) and self._waiting is None:
            self._waiting = int(end_rows[-1]), now.boot_s
        return ready

    def _has_waited(self, wait_s: float, now: ClockReading) -> bool:
        return self._waiting is not None and now.boot_s >= self._waiting[1] + wait_s

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
    ) -> _JoinedPart:
        """Read the rows that windows at `times` need, and one of a later time if there is one."""
        stream, last_us = self._streams[name], int(times.max())
        columns = [[f.name for f in stream.config.fields].index(field) for field in spec.fields]
        first = self._first_row(store, stream.name, position, int(times.min()))
        nothing = _JoinedPart(np.zeros(0, np.int64), np.zeros(0, np.int64), _no_values(spec), first)
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
            pieces.append(_JoinedPart(piece.first + valued, piece.t[valued], matrix[valued], at))
            count += len(valued)
            if count >= _MAX_ROWS:
                # Of a stream that was stored long before, rows that no window needs make way.
                part = _concatenate(pieces)
                pieces = [part.select_rows(joins.select_needed(spec, part.t, times))]
                count = len(pieces[0].t)
                is_cut = count >= _MAX_ROWS and not is_later
        part = _concatenate(pieces)
        part = part.select_rows(np.arange(joins.first_needed(spec, part.t, int(times.min())), len(part.t)))
        return msgspec.structs.replace(part, last=max(first, at), latest_us=latest_us, is_cut=is_cut)


class _JoinedPart(msgspec.Struct, frozen=True, eq=False):
    """Rows with a value: their `numbers`, `t` and `values` (m, F). `last`: the last row read.

    `latest_us` is the time of the last row read. `is_cut`: more follow.
    """

    numbers: Ints
    t: Ints
    values: Float32s
    last: int
    latest_us: int = 0
    is_cut: bool = False

    def select_rows(self, indices: Ints) -> _JoinedPart:
        return _JoinedPart(self.numbers[indices], self.t[indices], self.values[indices], self.last)


def _concatenate(parts: Sequence[_JoinedPart]) -> _JoinedPart:
    return _JoinedPart(
        np.concatenate([part.numbers for part in parts]),
        np.concatenate([part.t for part in parts]),
        np.concatenate([part.values for part in parts]),
        parts[-1].last,
    )


def _no_values(spec: JoinedInput) -> Float32s:
    return np.empty((0, len(spec.fields)), np.float32)


def load_positions(store: Store, task: str) -> dict[str, JoinedPosition]:
    """Return the first row of each joined input's stream that `task` still needs."""
    try:
        return decoders.from_json(store.load_state(task, task_keys.JOINED_ROWS) or b"{}", dict[str, JoinedPosition])
    except msgspec.MsgspecError:
        return {}
