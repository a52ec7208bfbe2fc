"""Recordings as a stream, at their own rate times `speed`: what a simulated device runs.

Passes go over the recordings again and again, each pass in another order and each recording from another start, all
from one seed: row N of a replay is always the same, so a restart goes on where the last commit was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.clock import Now
from agent.config import Fault, ReplaySource, Stream
from agent.device.incoming.group import FULL_ROWS, Mark
from agent.device.incoming.intake import Offer
from agent.device.storage.rows import Raw, row_bytes
from agent.device.storage.store import Store
from agent.errors import UsageError
from agent.model.data import UNREADABLE

_TICK_S = 0.2
_FULL_S = 1.0
_PAUSE_S = 5.0
_LONGEST_SKIP = 100
_SPIKE_EVERY = 100
_NOISE_ROWS = 1000


@dataclass(frozen=True)
class Recordings:
    """`rows` (N, F) float32; recording r is rows `starts[r]` to `starts[r + 1]`, of `label[r]` and `subject[r]`."""

    rows: NDArray[np.float32]
    starts: NDArray[np.int64]
    label: NDArray[np.int64]
    labels: list[str]
    subject: NDArray[np.int64]
    fields: list[str]
    rate: float


def load(path: Path) -> Recordings:
    """Recordings of an `.npz`. Raises UsageError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as z:
            scale = np.asarray(z["scale"], np.float32) if "scale" in z else np.float32(1)
            return Recordings(
                rows=z["rows"].astype(np.float32) * scale,
                starts=z["starts"].astype(np.int64),
                label=z["label"].astype(np.int64),
                labels=[str(name) for name in z["labels"]],
                subject=z["subject"].astype(np.int64),
                fields=[str(name) for name in z["fields"]],
                rate=float(z["rate"]),
            )
    except UNREADABLE as error:
        raise UsageError(f"{path}: not readable as recordings: {error}") from None


@dataclass(frozen=True)
class Part:
    """One recording of a pass: rows `first`… of the replay (from 1) are rows `start`… of the recordings."""

    first: int
    start: int
    n: int
    label: int
    offset_s: float

    @property
    def last(self) -> int:
        return self.first + self.n - 1


@dataclass
class Playlist:
    """The order of recordings of a subject (None: of all), for ever, from one seed."""

    recordings: Recordings
    subject: int | None
    seed: int
    _chosen: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        everyone = np.arange(len(self.recordings.label))
        self._chosen = everyone if self.subject is None else everyone[self.recordings.subject == self.subject]
        if not len(self._chosen):
            raise UsageError(f"the recordings have no subject {self.subject}")

    def parts(self, after: int = 0) -> Iterator[Part]:
        """The parts that hold rows after row `after`."""
        first, offset, turn = 1, 0.0, 0
        while True:
            rng = np.random.default_rng([self.seed, turn])
            for r in rng.permutation(self._chosen):
                begin, end = int(self.recordings.starts[r]), int(self.recordings.starts[r + 1])
                start = begin + int(rng.integers(0, min(_LONGEST_SKIP, end - begin)))
                part = Part(first, start, end - start, int(self.recordings.label[r]), offset)
                if part.last > after:
                    yield part
                first = part.last + 1
                offset += part.n / self.recordings.rate + _PAUSE_S
            turn += 1


class Replay:
    """Plays into stream `name`. Backlog at the store slows it down; nothing is skipped."""

    def __init__(self, name: str, stream: Stream, source: ReplaySource, store: Store, start: Now) -> None:
        self._name, self._source, self._store = name, source, store
        recordings = load(Path(source.file))
        self._fields = [recordings.fields.index(f.name) for f in stream.fields if f.name in recordings.fields]
        self._names = [f.name for f in stream.fields]
        if len(self._fields) < len(self._names):
            missing = set(self._names) - set(recordings.fields)
            raise UsageError(
                f"{source.file}: has no {', '.join(sorted(missing))}; it has {', '.join(recordings.fields)}"
            )
        self._playlist = Playlist(recordings, source.subject, source.seed)
        # What is offered at once goes into one transaction.
        self._most_rows = max(1, min(FULL_ROWS, store.quota.transaction // 4 // row_bytes(stream)))
        self._parts: Iterator[Part] = iter(())
        self._part = Part(1, 0, 0, 0, 0.0)
        self._begin_us = self._first_time(start)

    def _first_time(self, start: Now) -> int:
        """The time of row 1, the same after a restart. A replay of known length ends now rather than tomorrow."""
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
        rate = self._playlist.recordings.rate
        t = self._begin_us / 1e6 + part.offset_s + np.arange(at, at + n) / rate
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
