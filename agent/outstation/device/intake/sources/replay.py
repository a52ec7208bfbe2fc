"""Replay of recordings as a stream, at their own rate times `speed`, for simulated devices.

Row N of a replay is always the same, so a restart continues after the last commit. Rows keep the times of the file, if
it has any, at any speed: drift windows and the time of day use these, while schedules, retention and the times of
messages use the device's clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outstation.device.config import StreamConfig
from outstation.device.config.sources import ReplayFault, ReplaySource
from outstation.device.intake.group_commit import MAX_GROUP_ROWS, SourcePosition
from outstation.device.intake.source import SourceContext, SubmitRows
from outstation.device.intake.sources.recordings import Playlist, PlaylistItem
from outstation.device.store.rows import RawColumns, row_bytes
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import UsageError
from outstation.ml.datasets.recordings import load

_TICK_S = 0.2
_FULL_RETRY_S = 1.0
_SPIKE_INTERVAL_ROWS = 100
_NOISE_ROWS = 1000


def check(context: SourceContext, source: ReplaySource) -> str:
    """Describe the source. Raises UsageError."""
    recordings = load_playlist(context.stream, source).recordings
    return f"a replay of the {len(recordings.rows):,} rows in {source.file}"


def build(context: SourceContext, source: ReplaySource, store: Store) -> ReplayPlayer:
    """Build the source. Raises UsageError."""
    return ReplayPlayer(context.name, context.stream, source, store, clock.read())


def load_playlist(stream: StreamConfig, source: ReplaySource) -> Playlist:
    """Load the recordings. Raises UsageError if there are none, or none with the stream's fields."""
    recordings = load(Path(source.file))
    missing = {f.name for f in stream.fields} - set(recordings.fields)
    if missing:
        raise UsageError(f"{source.file}: has no {', '.join(sorted(missing))}; it has {', '.join(recordings.fields)}")
    return Playlist(recordings, source.subject, source.seed, source.scenes, source.skip)


class ReplayPlayer:
    """Player of recordings. A full store delays it; no row is skipped."""

    def __init__(
        self, name: str, stream: StreamConfig, source: ReplaySource, store: Store, start: ClockReading
    ) -> None:
        """Load the recordings. Raises UsageError."""
        self._name, self._source, self._store = name, source, store
        self._playlist = load_playlist(stream, source)
        self._field_names = [f.name for f in stream.fields]
        self._field_indices = [self._playlist.recordings.fields.index(name) for name in self._field_names]
        # Rows that are submitted at once go into one transaction.
        self._max_rows = max(1, min(MAX_GROUP_ROWS, store.quota.transaction_bytes // 4 // row_bytes(stream)))
        self._items: Iterator[PlaylistItem] = iter(())
        self._current_item = PlaylistItem(1, 0, 0, 0, 0.0)
        self._begin_us = self._load_start_us(start)

    def _load_start_us(self, start: ClockReading) -> int:
        """Return the time of row 1, which a restart keeps; 0 if rows have times of their own.

        A replay of known length ends now, so that its rows are not in the future.
        """
        if self._playlist.recordings.t is not None:
            return 0
        saved = self._store.source_position(f"replay:{self._name}", "begin")
        if saved:
            return saved
        length_s = 0.0
        if self._source.rows is not None:
            last = next(self._playlist.iter_items(self._source.rows - 1))
            length_s = last.offset_s + last.n / self._playlist.recordings.rate
        begin = start.wall_us - round(length_s * 1e6)
        # Vital: the daemon starts on a full disk, too.
        with self._store.transaction(vital=True) as tx:
            tx.set_source_position(f"replay:{self._name}", "begin", begin)
        return begin

    async def run(self, submit_rows: SubmitRows) -> None:
        loop = asyncio.get_running_loop()
        source, item = f"replay:{self._name}", "row"
        first = self._store.source_position(source, item) + 1
        pace = self._playlist.recordings.rate * self._source.speed
        begin, submitted = loop.time(), 0
        self._items = self._playlist.iter_items(first - 1)
        while self._source.rows is None or first <= self._source.rows:
            elapsed_s = loop.time() - begin
            allowed = int(elapsed_s * pace) - submitted
            if allowed <= 0:
                await asyncio.sleep(max(_TICK_S, (submitted + 1) / pace - elapsed_s))
                continue
            last = first + min(allowed, self._max_rows) - 1
            if self._source.rows is not None:
                last = min(last, self._source.rows)
            pieces = list(self._iter_pieces(first, last))
            values = {}
            for name in pieces[0].values:
                column = np.concatenate([piece.values[name] for piece in pieces])
                has_missing = np.isnan(column).any()
                values[name] = [None if v != v else v for v in column.tolist()] if has_missing else column
            raw = RawColumns(sum(piece.n for piece in pieces), np.concatenate([piece.t for piece in pieces]), values)
            position, numbers = SourcePosition(source, item, last), range(first, last + 1)
            # The same rows again while the store is full, so that none is skipped.
            while (await submit_rows(self._name, raw, position, numbers)).is_store_full:
                await asyncio.sleep(_FULL_RETRY_S)
            submitted += last - first + 1
            first = last + 1

    def _iter_pieces(self, first: int, last: int) -> Iterator[RawColumns]:
        """Yield rows `first` to `last` by recording; `first` continues where the last call ended."""
        while first <= last:
            if first > self._current_item.last:
                self._current_item = next(self._items)
            n = min(last, self._current_item.last) - first + 1
            yield self._build_piece(self._current_item, first, n)
            first += n

    def _build_piece(self, item: PlaylistItem, first: int, n: int) -> RawColumns:
        at = first - item.first
        rows = self._playlist.recordings.rows[item.start + at : item.start + at + n]
        own, rate = self._playlist.recordings.t, self._playlist.recordings.rate
        since = np.arange(at, at + n) / rate if own is None else own[item.start + at : item.start + at + n]
        t = self._begin_us / 1e6 + item.offset_s + since
        columns = {
            name: rows[:, i].astype(np.float64) for name, i in zip(self._field_names, self._field_indices, strict=True)
        }
        return RawColumns(n, t, inject_faults(columns, self._source.faults, first))


def inject_faults(
    columns: dict[str, NDArray[np.float64]], faults: Sequence[ReplayFault], first: int
) -> dict[str, NDArray[np.float64]]:
    """Apply faults one after another to readings from row `first` on; row N is always the same."""
    for fault in faults:
        is_faulty = np.arange(first, first + len(columns[fault.fields[0]])) >= fault.from_row
        sources = reversed(fault.fields) if fault.kind == "swap" else fault.fields
        changed = {
            name: np.where(is_faulty, _apply_fault(columns[source], fault, first, name), columns[name])
            for name, source in zip(fault.fields, sources, strict=True)
        }
        columns = columns | changed
    return columns


def _apply_fault(values: NDArray[np.float64], fault: ReplayFault, first: int, name: str) -> NDArray[np.float64]:
    amount = fault.amount or 0.0
    match fault.kind:
        case "gain" | "scale":
            return values * amount
        case "offset":
            return values + amount
        case "stuck":
            return np.full_like(values, amount)
        case "missing":
            return np.full_like(values, np.nan)
        case "spikes":
            return np.where(np.arange(first, first + len(values)) % _SPIKE_INTERVAL_ROWS == 0, values + amount, values)
        case "saturate":
            return np.clip(values, -amount, amount)
        case "noise":
            # Drawn in blocks, so that a row's noise is the same in any request.
            block, stop = first // _NOISE_ROWS, (first + len(values) - 1) // _NOISE_ROWS + 1
            drawn = [np.random.default_rng([i, *name.encode()]).normal(size=_NOISE_ROWS) for i in range(block, stop)]
            at = first - block * _NOISE_ROWS
            return values + amount * np.concatenate(drawn)[at : at + len(values)]
        case "quantize":
            return np.round(values / amount) * amount
        case "swap":
            return values
