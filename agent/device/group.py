"""Group commit: rows of all producers wait together for one transaction, and each producer learns what became of its.

A commit costs about 28 KB of flash writes whatever it holds, so rows wait for it up to `[buffer] commit_every`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from agent.clock import Now
from agent.config import Stream
from agent.device.rows import Checked, Rows, concatenate
from agent.device.store import INTAKE_SHARE, Store
from agent.device.transaction import Transaction
from agent.errors import StorageFull

FULL_ROWS = 16_384


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a source has got, kept in the same transaction as its rows."""

    source: str
    item: str
    position: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one producer's part of a commit: lines dealt with so far, rows taken, lines rejected with a reason."""

    through: int
    accepted: int
    rejected: list[tuple[int, str]]
    full: bool = False


@dataclass(slots=True)
class _Share:
    through: int = 0
    rejected: list[tuple[int, str]] = field(default_factory=list)
    parts: list[tuple[str, Checked, list[int]]] = field(default_factory=list)
    mark: Mark | None = None


class Group:
    """Rows that wait for the next commit. Used by one thread."""

    def __init__(self, store: Store, streams: Mapping[str, Stream]) -> None:
        self._store, self._streams = store, streams
        self._shares: dict[Hashable, _Share] = {}
        self.rows = 0

    def __bool__(self) -> bool:
        return bool(self._shares)

    def add(self, producer: Hashable, stream: str, checked: Checked, lines: list[int]) -> None:
        """Rows of `producer`; `lines` are the lines they came in, one a row or one for all."""
        self._shares.setdefault(producer, _Share()).parts.append((stream, checked, lines))
        self.rows += len(checked.rows)

    def reject(self, producer: Hashable, line: int, reason: str) -> None:
        self._shares.setdefault(producer, _Share()).rejected.append((line, reason))

    def reach(self, producer: Hashable, through: int, mark: Mark | None = None) -> None:
        """`producer` has handed over its lines up to `through`."""
        share = self._shares.setdefault(producer, _Share())
        share.through, share.mark = through, mark

    def commit(self, now: Now) -> dict[Hashable, Outcome]:
        """Write all that waits, in one transaction; what became of it for each producer.

        Where the store is full every row is rejected and nothing is written. Raises StorageError for a sick disk:
        then nothing is known to be written and no producer may be told anything.
        """
        shares, self._shares, self.rows = self._shares, {}, 0
        try:
            if self._store.used_bytes() > self._store.max_bytes() * INTAKE_SHARE:
                raise StorageFull("the store has reached its size ([buffer] max_size) and no used readings can go")
            with self._store.transaction() as tx:
                return self._write(tx, shares, now)
        except StorageFull as full:
            return {
                producer: _refuse(share, f"not stored: {full}; send it again later")
                for producer, share in shares.items()
            }

    def _write(self, tx: Transaction, shares: dict[Hashable, _Share], now: Now) -> dict[Hashable, Outcome]:
        by_stream: dict[str, list[Rows]] = {}
        outcomes = {}
        for producer, share in shares.items():
            accepted = 0
            for stream, checked, lines in share.parts:
                try:
                    rows = self._coded(tx, stream, checked)
                except OverflowError as problem:
                    share.rejected += [(line, str(problem)) for line in lines]
                    continue
                if len(rows):
                    by_stream.setdefault(stream, []).append(rows)
                    accepted += len(rows)
            if share.mark is not None:
                tx.set_mark(share.mark.source, share.mark.item, share.mark.position)
            tx.count("lines rejected", len(share.rejected))
            outcomes[producer] = Outcome(share.through, accepted, sorted(share.rejected))
        for stream, parts in by_stream.items():
            rows = concatenate(parts)
            tx.append(stream, rows, now.quality)
            tx.count(f"rows.{stream}", len(rows))
        return outcomes

    def _coded(self, tx: Transaction, stream: str, checked: Checked) -> Rows:
        """Category texts become codes."""
        columns = list(checked.rows.columns)
        for index, texts in checked.categories.items():
            name = self._streams[stream].fields[index].name
            columns[index] = np.array(tx.category_codes(stream, name, texts), "<u2")
        return Rows(checked.rows.t, tuple(columns))


def _refuse(share: _Share, reason: str) -> Outcome:
    lines = sorted({line for _, _, numbers in share.parts for line in numbers})
    return Outcome(share.through, 0, sorted([*share.rejected, *((line, reason) for line in lines)]), full=True)
