"""Group commit: rows of all producers wait together for one transaction, and each producer learns what became of its.

A commit costs about 28 KB of flash writes whatever it holds, so few rows wait for it up to `[buffer] commit_every`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import msgspec
import numpy as np

from agent.clock import Now, Quality
from agent.config import Stream
from agent.device.intake import labels
from agent.device.intake.labels import Asked, Lot
from agent.device.store.clock_segments import GIVEN, QUALITIES
from agent.device.store.rows import Checked, Rows, concatenate
from agent.device.store.store import INTAKE_SHARE, Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull

FULL_ROWS = 16_384
# Beside so many what a commit itself writes is little.
_WORTH_BYTES = 128 << 10
NOT_STORED = "not stored"
# The most chunks that the rows of a stream in one commit are cut into, for the segments their times were read in.
_MOST_RUNS = 64
# What a label takes in the store, its index entries too.
_LABEL_BYTES = 1_000
# (segment, quality) of the clock that rows have their times from.
Stamped = tuple[int, Quality]


class Mark(msgspec.Struct, frozen=True):
    """How far a source has got, kept in the same transaction as its rows: what a full store refused is not counted.

    `position` None: its last row in the stream. Of more than `most` items of a source, those that sent last are known.
    """

    source: str
    item: str
    position: int | None
    most: int | None = None


class Outcome(msgspec.Struct, frozen=True):
    """Of one producer's part of a commit: lines dealt with so far, rows taken, lines rejected with a reason.

    `row` is the last row taken, counted from the first one of its stream; 0 where none was.
    """

    through: int
    accepted: int
    rejected: list[tuple[int, str]]
    full: bool = False
    row: int = 0


class _Part(msgspec.Struct, frozen=True):
    stream: str
    checked: Checked
    lines: list[int]
    now: Now
    bytes: int


class _Share(msgspec.Struct):
    through: int = 0
    rejected: dict[int, str] = msgspec.field(default_factory=dict)
    parts: list[_Part] = msgspec.field(default_factory=list)
    lots: list[tuple[Lot, int, Now]] = msgspec.field(default_factory=list)
    mark: Mark | None = None

    def reject(self, line: int, reason: str) -> None:
        self.rejected[line] = f"{self.rejected[line]}; {reason}" if line in self.rejected else reason

    def bytes(self) -> int:
        """What its rows will take in the store."""
        labels = sum(len(lot.labels) for lot, _, _ in self.lots)
        return sum(part.bytes for part in self.parts) + labels * _LABEL_BYTES

    def outcome(self, accepted: int, full: bool = False, row: int = 0) -> Outcome:
        return Outcome(self.through, accepted, sorted(self.rejected.items()), full, row)


Shares = dict[Hashable, _Share]


class Group:
    """Rows and labels that wait for the next commit. Used by one thread, but for `write`.

    `asked` tells which tasks take labels.
    """

    def __init__(
        self, store: Store, streams: Mapping[str, Stream], asked: Callable[[], Mapping[str, Asked]] = dict
    ) -> None:
        self._store, self._streams, self._asked = store, streams, asked
        self._shares: Shares = {}
        self._most_bytes = store.quota.transaction // 4
        self._rows = self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._shares)

    @property
    def is_full(self) -> bool:
        """Whether to commit now: more would make long waits, or too much for one transaction."""
        return self._rows >= FULL_ROWS or self._bytes >= self._most_bytes

    @property
    def is_worth_it(self) -> bool:
        """Whether it may be committed as soon as nothing more comes."""
        return self._bytes >= _WORTH_BYTES

    def add(self, producer: Hashable, stream: str, checked: Checked, lines: list[int], now: Now) -> None:
        """Rows of `producer` that came at `now`; `lines` are the lines they came in, one a row or one for all."""
        size = checked.rows.t.nbytes + sum(column.nbytes for column in checked.rows.columns)
        self._shares.setdefault(producer, _Share()).parts.append(_Part(stream, checked, lines, now, size))
        self._rows += len(checked.rows)
        self._bytes += size
        self._bytes += sum(2 * len(text) + 64 for texts in checked.categories.values() for text in texts)

    def label(self, producer: Hashable, lot: Lot, line: int, now: Now) -> None:
        """Labels of `producer` that came in one line."""
        self._shares.setdefault(producer, _Share()).lots.append((lot, line, now))
        self._bytes += len(lot.labels) * _LABEL_BYTES

    def reject(self, producer: Hashable, line: int, reason: str) -> None:
        self._shares.setdefault(producer, _Share()).reject(line, reason)

    def reach(self, producer: Hashable, through: int, mark: Mark | None = None) -> None:
        """`producer` has handed over its lines up to `through`."""
        share = self._shares.setdefault(producer, _Share())
        share.through, share.mark = through, mark

    def commit(self, now: Now) -> dict[Hashable, Outcome]:
        """`write` all that waits."""
        return self.write(self.take(), now)

    def take(self) -> Shares:
        """All that waits, to be written; more may be added meanwhile."""
        shares, self._shares = self._shares, {}
        self._rows = self._bytes = 0
        return shares

    def write(self, shares: Shares, now: Now) -> dict[Hashable, Outcome]:
        """In one transaction; what became of it for each producer. May run in another thread than the rest.

        Where the store is full every row is rejected and nothing is written. Raises StorageError for a sick disk:
        then nothing is known to be written and no producer may be told anything.
        """
        try:
            needed = self._store.used_bytes() + sum(share.bytes() for share in shares.values())
            if needed > self._store.limit_bytes() * INTAKE_SHARE:
                raise StorageFull("the store has reached its size ([buffer] max_size) and no used readings can go")
            with self._store.transaction() as tx:
                return self._write(tx, shares, now)
        except StorageFull as full:
            return {producer: _refuse(share, full) for producer, share in shares.items()}

    def _write(self, tx: Transaction, shares: Shares, now: Now) -> dict[Hashable, Outcome]:
        by_stream: dict[str, list[tuple[Rows, Stamped]]] = {}
        ends: dict[Hashable, tuple[str, int]] = {}
        counts: dict[Hashable, int] = {}
        for producer, share in shares.items():
            accepted = 0
            for part in share.parts:
                rows, refused = self._coded(tx, part.stream, part.checked)
                for index, reason in refused.items():
                    share.reject(part.lines[index if len(part.lines) > 1 else 0], reason)
                if len(rows):
                    parts = by_stream.setdefault(part.stream, [])
                    parts.append((rows, _stamped(tx, rows, part.now)))
                    ends[producer] = part.stream, sum(len(rows) for rows, _ in parts)
                    accepted += len(rows)
            counts[producer] = accepted + self._label(tx, share)
            tx.count("lines rejected", len(share.rejected))
        before = {stream: _append(tx, stream, parts, now) for stream, parts in by_stream.items()}
        outcomes = {}
        for producer, share in shares.items():
            stream, end = ends.get(producer, ("", 0))
            row = before[stream] + end if end else 0
            if share.mark is not None and (share.mark.position is not None or row):
                position = row if share.mark.position is None else share.mark.position
                tx.set_mark(share.mark.source, share.mark.item, position, share.mark.most)
            outcomes[producer] = share.outcome(counts[producer], row=row)
        tx.segments.observe(now)
        return outcomes

    def _label(self, tx: Transaction, share: _Share) -> int:
        """Write its labels; how many were accepted."""
        accepted, asked = 0, self._asked() if share.lots else {}
        for lot, line, now in share.lots:
            refused, n = labels.take_lot(tx, asked.get(lot.task), lot, now), len(lot.labels) + len(lot.bad)
            accepted += n - len(refused)
            if refused:
                share.reject(line, labels.shown(refused, n))
        return accepted

    def _coded(self, tx: Transaction, stream: str, checked: Checked) -> tuple[Rows, dict[int, str]]:
        """Category texts become codes; index → reason of rows whose text can have none."""
        columns, refused = list(checked.rows.columns), {}
        for index, texts in checked.categories.items():
            name = self._streams[stream].fields[index].name
            codes = np.array(tx.category_codes(stream, name, texts), np.int64)
            columns[index] = codes.astype("<u2")
            for row in np.flatnonzero(codes < 0):
                refused[int(row)] = (
                    f"{name} = {texts[row]!r} would be the 65,536th category; that many cannot be told apart"
                )
        rows = Rows(checked.rows.t, tuple(columns))
        if refused:
            kept = np.setdiff1d(np.arange(len(rows)), np.fromiter(refused, np.int64, len(refused)))
            rows = Rows(rows.t[kept], tuple(column[kept] for column in rows.columns))
        return rows, refused


def _append(tx: Transaction, stream: str, parts: Sequence[tuple[Rows, Stamped]], now: Now) -> int:
    """Add rows to a stream; the number of the last one before them."""
    last, count = 0, sum(len(rows) for rows, _ in parts)
    for (segment, quality), run in _runs(parts):
        last = tx.append(stream, concatenate(run), quality, segment=segment, boot_us=now.boot_us)
    return last - count


def _stamped(tx: Transaction, rows: Rows, now: Now) -> Stamped:
    held = tx.segments.holding(now, int(rows.t.min()), int(rows.t.max()))
    return (GIVEN, now.quality) if held is None else (held.number, QUALITIES[held.quality])


def _runs(parts: Sequence[tuple[Rows, Stamped]]) -> list[tuple[Stamped, list[Rows]]]:
    """Neighbours with the same stamp together. A producer that mixes times at will gets no chunk for each."""
    runs: list[tuple[Stamped, list[Rows]]] = []
    for rows, stamped in parts:
        if runs and (runs[-1][0] == stamped or len(runs) == _MOST_RUNS):
            if runs[-1][0] != stamped:
                runs[-1] = ((GIVEN, stamped[1]), runs[-1][1])
            runs[-1][1].append(rows)
        else:
            runs.append((stamped, [rows]))
    return runs


def _refuse(share: _Share, full: StorageFull) -> Outcome:
    """Every line with rows or labels in it is rejected, and only once where some of its rows already were."""
    lines = {line for part in share.parts if len(part.checked.rows) for line in part.lines}
    for line in lines | {line for _, line, _ in share.lots}:
        share.rejected[line] = f"{NOT_STORED}: {full}; send it again later"
    return share.outcome(0, full=True)
