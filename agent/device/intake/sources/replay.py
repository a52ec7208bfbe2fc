"""Recordings as a stream, at their own rate times `speed`: what a simulated device runs.

Row N of a replay is always the same, so a restart goes on where the last commit was. Rows have the times of the file
where it has any, however fast they come: drift windows and the time of day go by these, while schedules, what is kept
for how long, and when a message was written go by the device's clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.clock import Now
from agent.config import Fault, ReplaySource, Stream
from agent.device.intake.group_commit import FULL_ROWS, Mark
from agent.device.intake.server import Offer
from agent.device.intake.sources.recordings import Part, Playlist, load
from agent.device.store.rows import Raw, row_bytes
from agent.device.store.store import Store
from agent.errors import UsageError

_TICK_S = 0.2
_FULL_S = 1.0
_SPIKE_EVERY = 100
_NOISE_ROWS = 1000


def playlist(stream: Stream, source: ReplaySource) -> Playlist:
    """What `source` plays. Raises UsageError where that is nothing, or not what the stream needs."""
    recordings = load(Path(source.file))
    missing = {f.name for f in stream.fields} - set(recordings.fields)
    if missing:
        raise UsageError(f"{source.file}: has no {', '.join(sorted(missing))}; it has {', '.join(recordings.fields)}")
    return Playlist(recordings, source.subject, source.seed, source.scenes, source.skip)


class Replay:
    """Plays into stream `name`. Backlog at the store slows it down; nothing is skipped."""

    def __init__(self, name: str, stream: Stream, source: ReplaySource, store: Store, start: Now) -> None:
        """Raises UsageError."""
        self._name, self._source, self._store = name, source, store
        self._playlist = playlist(stream, source)
        self._names = [f.name for f in stream.fields]
        self._fields = [self._playlist.recordings.fields.index(name) for name in self._names]
        # What is offered at once goes into one transaction.
        self._most_rows = max(1, min(FULL_ROWS, store.quota.transaction // 4 // row_bytes(stream)))
        self._parts: Iterator[Part] = iter(())
        self._part = Part(1, 0, 0, 0, 0.0)
        self._begin_us = self._first_time(start)

    def _first_time(self, start: Now) -> int:
        """The time of row 1, the same after a restart. A replay of known length ends now rather than tomorrow.

        0 where rows have times of their own.
        """
        if self._playlist.recordings.t is not None:
            return 0
        kept = self._store.mark(f"replay:{self._name}", "begin")
        if kept:
            return kept
        length_s = 0.0
        if self._source.rows is not None:
            last = next(part for part in self._playlist.parts(self._source.rows - 1))
            length_s = last.offset_s + last.n / self._playlist.recordings.rate
        begin = start.wall_us - round(length_s * 1e6)
        # Vital: the agent starts on a full disk too.
        with self._store.transaction(vital=True) as tx:
            tx.set_mark(f"replay:{self._name}", "begin", begin)
        return begin

    async def run(self, offer: Offer) -> None:
        loop = asyncio.get_running_loop()
        source, item = f"replay:{self._name}", "row"
        first = self._store.mark(source, item) + 1
        pace = self._playlist.recordings.rate * self._source.speed
        begin, offered = loop.time(), 0
        self._parts = self._playlist.parts(first - 1)
        while self._source.rows is None or first <= self._source.rows:
            allowed = int((loop.time() - begin) * pace) - offered
            if allowed <= 0:
                await asyncio.sleep(_TICK_S)
                continue
            last = first + min(allowed, self._most_rows) - 1
            if self._source.rows is not None:
                last = min(last, self._source.rows)
            raw = _joined(list(self._pieces(first, last)))
            # One offer at a time, and the same again while the store is full: rows come in order, none is skipped.
            while (await offer(self._name, raw, Mark(source, item, last), range(first, last + 1))).full:
                await asyncio.sleep(_FULL_S)
            offered += last - first + 1
            first = last + 1

    def _pieces(self, first: int, last: int) -> Iterator[Raw]:
        """Rows `first` to `last`, recording by recording; `first` goes on where the last call ended."""
        while first <= last:
            if first > self._part.last:
                self._part = next(self._parts)
            n = min(last, self._part.last) - first + 1
            yield self._raw(self._part, first, n)
            first += n

    def _raw(self, part: Part, first: int, n: int) -> Raw:
        at = first - part.first
        rows = self._playlist.recordings.rows[part.start + at : part.start + at + n]
        own, rate = self._playlist.recordings.t, self._playlist.recordings.rate
        since = np.arange(at, at + n) / rate if own is None else own[part.start + at : part.start + at + n]
        t = self._begin_us / 1e6 + part.offset_s + since
        columns = {name: rows[:, i].astype(np.float64) for name, i in zip(self._names, self._fields, strict=True)}
        return Raw(n, t, injected(columns, self._source.faults, first))


def _joined(pieces: list[Raw]) -> Raw:
    """All rows of `pieces`; a value that is NaN by now is missing."""
    values = {}
    for name in pieces[0].values:
        column = np.concatenate([piece.values[name] for piece in pieces])
        gone = np.isnan(column)
        values[name] = [None if v != v else v for v in column.tolist()] if gone.any() else column
    return Raw(sum(piece.n for piece in pieces), np.concatenate([piece.t for piece in pieces]), values)


def injected(
    columns: dict[str, NDArray[np.float64]], faults: Sequence[Fault], first: int
) -> dict[str, NDArray[np.float64]]:
    """Readings from row `first` of the replay on with its faults, one after another; row N is always alike."""
    for fault in faults:
        broken = np.arange(first, first + len(columns[fault.fields[0]])) >= fault.from_row
        sources = reversed(fault.fields) if fault.kind == "swap" else fault.fields
        changed = {
            name: np.where(broken, _faulty(columns[source], fault, first, name), columns[name])
            for name, source in zip(fault.fields, sources, strict=True)
        }
        columns = columns | changed
    return columns


def _faulty(values: NDArray[np.float64], fault: Fault, first: int, name: str) -> NDArray[np.float64]:
    amount = fault.amount
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
            return np.where(np.arange(first, first + len(values)) % _SPIKE_EVERY == 0, values + amount, values)
        case "saturate":
            return np.clip(values, -amount, amount)
        case "noise":
            return values + amount * _normal(first, len(values), name)
        case "quantize":
            return np.round(values / amount) * amount
        case "swap":
            return values


def _normal(first: int, n: int, name: str) -> NDArray[np.float64]:
    """Normal values of rows `first`…, the same for a row however they are asked for."""
    block, stop = first // _NOISE_ROWS, (first + n - 1) // _NOISE_ROWS + 1
    drawn = [np.random.default_rng([i, *name.encode()]).normal(size=_NOISE_ROWS) for i in range(block, stop)]
    at = first - block * _NOISE_ROWS
    return np.concatenate(drawn)[at : at + n]
