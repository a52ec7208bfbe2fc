"""Joined streams: rows of further streams that a batch's windows are joined with, by time.

A window waits until its joined streams have a row of a later time, so that no earlier row can still come; or until it
has waited as long as the config says. Rows that come later than that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np

from agent import decoders
from agent.arrays import Float32s, Ints
from agent.clock import ClockReading
from agent.config import StreamConfig
from agent.device.store import task_keys
from agent.device.store.rows import EMPTY_ROWS, Rows, concatenate
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


class JoinedBatch(msgspec.Struct, frozen=True, eq=False):
    """Windows with their joined values, the rows (first, last) of each input's stream, and the next read's start."""

    cut: WindowCut
    rows: Mapping[str, tuple[str, int, int]]
    positions: Mapping[str, int]


class JoinedReader:
    """Reader of the joined streams of one task. Keeps the first row of each stream that is still needed."""

    def __init__(self, task: str, inference: Inference, streams: Mapping[str, JoinedStream]) -> None:
        self._task, self._inference, self._streams = task, inference, streams
        self._positions: dict[str, int] | None = None
        # The last window that began to wait, by its end, and when that was.
        self._waiting: tuple[int, float] | None = None

    def join(
        self, store: Store, cut: WindowCut, t: Ints, first_row: int, now: ClockReading | None = None
    ) -> JoinedBatch:
        """Return the windows of rows at `t` (n,), from `first_row` on, that are ready, with their joined values.

        Without `now` no window waits. Raises StorageError.
        """
        ends = cut.starts + self._inference.rows - 1
        if not len(ends):
            return JoinedBatch(cut, {}, {})
        known = self._load_positions(store)
        times = t[ends]
        parts = {
            name: self._read(store, name, spec, known.get(name, 0), times)
            for name, spec in self._inference.manifest.joined.items()
        }
        ready = len(ends)
        if now is not None:
            ready = self._count_ready(parts, times, first_row + ends, now)
        if ready < len(ends):
            cut = WindowCut(cut.starts[:ready], int(cut.starts[ready]))
        rows = {
            name: (self._streams[name].name, part.first, part.first + len(part.rows) - 1)
            for name, part in parts.items()
            if len(part.rows)
        }
        joined = {name: JoinedRows(part.matrix, part.rows.t) for name, part in parts.items()}
        positions = known
        if ready:
            positions = {
                name: part.first + joins.first_needed(spec, part.rows.t, int(times[ready - 1]))
                for (name, spec), part in zip(self._inference.manifest.joined.items(), parts.values(), strict=True)
            }
        return JoinedBatch(self._inference.join(cut, t, joined), rows, positions)

    def save(self, tx: Transaction, batch: JoinedBatch) -> None:
        """Save the first rows that are still needed, in the batch's commit."""
        if batch.positions != self._positions:
            tx.save_state(self._task, task_keys.JOINED_ROWS, msgspec.json.encode(batch.positions))

    def confirm(self, batch: JoinedBatch) -> None:
        """Keep what was committed."""
        if len(batch.cut.starts):
            self._positions, self._waiting = dict(batch.positions), None

    def _load_positions(self, store: Store) -> dict[str, int]:
        if self._positions is None:
            self._positions = load_positions(store, self._task)
        return self._positions

    def _count_ready(self, parts: Mapping[str, _JoinedPart], times: Ints, end_rows: Ints, now: ClockReading) -> int:
        """Return how many of the first windows need not wait."""
        ready = len(times)
        for name, part in parts.items():
            is_open = times >= part.latest_us
            if not part.is_cut and self._has_waited(self._streams[name].wait_s, now):
                assert self._waiting is not None
                is_open &= end_rows > self._waiting[0]
            ready = min(ready, int(np.argmax(is_open)) if is_open.any() else ready)
        if ready < len(times) and self._waiting is None:
            self._waiting = int(end_rows[-1]), now.boot_s
        return ready

    def _has_waited(self, wait_s: float, now: ClockReading) -> bool:
        return self._waiting is not None and now.boot_s >= self._waiting[1] + wait_s

    def _read(self, store: Store, name: str, spec: JoinedInput, position: int, times: Ints) -> _JoinedPart:
        """Read the rows that windows at `times` need, and one of a later time if there is one."""
        stream = self._streams[name]
        first, last_us = max(position, store.first_row(stream.name), 1), int(times.max())
        pieces: list[Rows] = []
        at, count, latest_us = first - 1, 0, np.iinfo(np.int64).min
        while latest_us <= last_us and count < _MAX_ROWS:
            piece = store.read_rows(stream.name, stream.config.fields, at, _READ_ROWS)
            if piece is None:
                break
            at = piece.last
            if piece.loss_reason:
                # Lost rows cannot be joined: the rows after them begin anew.
                pieces, count, first = [], 0, at + 1
                continue
            pieces.append(piece.rows)
            count += len(piece.t)
            latest_us = max(latest_us, int(piece.t.max()))
            if drop := joins.first_needed(spec, piece.t, int(times.min())):
                # Of a stream that was stored long before, rows that no window needs make way.
                needed = piece.rows.slice(drop, len(piece.t))
                pieces, count, first = [needed], len(needed), piece.first + drop
        rows = concatenate(pieces)
        columns = [[f.name for f in stream.config.fields].index(field) for field in spec.fields]
        matrix = (
            features.stack_columns([rows.columns[i] for i in columns])
            if len(rows)
            else np.empty((0, len(spec.fields)), np.float32)
        )
        is_cut = latest_us <= last_us and count >= _MAX_ROWS
        return _JoinedPart(first, rows if len(rows) else EMPTY_ROWS, matrix, latest_us, is_cut)


class _JoinedPart(msgspec.Struct, frozen=True, eq=False):
    """Rows from `first` on with the fields' `matrix`; `latest_us`: their latest time; `is_cut`: more follow."""

    first: int
    rows: Rows
    matrix: Float32s
    latest_us: int
    is_cut: bool


def load_positions(store: Store, task: str) -> dict[str, int]:
    """Return the first row of each joined input's stream that `task` still needs."""
    try:
        return decoders.from_json(store.load_state(task, task_keys.JOINED_ROWS) or b"{}", dict[str, int])
    except msgspec.MsgspecError:
        return {}
