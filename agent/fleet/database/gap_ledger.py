"""Which seqs of one log came and which are missing: a few ranges, however many messages there were.

The ranges end up the same whatever order messages, repeats, evictions and the end of the log come in: undeclared and
declared gaps are the complement of what came below `through`, cut where a declaration begins or ends, never two of one
kind side by side.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import msgspec

from agent.fleet.database.interface import Connection, Gap, LogId
from agent.wire.messages import AuditPayload

EVICTED, NEW_LOG = "evicted", "new log"
# The largest that JSON carries safely.
_MAX_SEQ = 2**53 - 1
_UPSERT_END = "INSERT INTO ends VALUES (?, ?, ?) ON CONFLICT (device, log) DO UPDATE SET last = excluded.last"


class LogChanges(msgspec.Struct):
    """What the messages of one transaction say of one log: seqs that are new, ranges declared, where it ended."""

    arrived: list[int] = msgspec.field(default_factory=list)
    evicted: list[tuple[int, int]] = msgspec.field(default_factory=list)
    end_seq: int = 0


def apply(db: Connection, changes: Mapping[LogId, LogChanges], now: str) -> None:
    """Bring tables logs, gaps and ends up to date, inside a transaction that holds the devices' locks."""
    known = db.logs([*changes])
    spans = {log: span for log, one in changes.items() if (span := _affected_span(one, known[log][0] or 0))}
    gaps = db.gaps(spans)
    ledgers = {}
    for log, one in changes.items():
        through, end = known[log]
        ledger = ledgers[log] = GapLedger(through or 0, end, gaps.get(log, ()))
        for seq in sorted(one.arrived):
            ledger.add_arrival(seq)
        ledger.declare_evicted(one.evicted)
        if one.end_seq:
            ledger.declare_end(one.end_seq)
    there = {log for log, (through, _) in known.items() if through is not None}
    db.store_logs({log: ledger.through for log, ledger in ledgers.items() if changes[log].arrived}, there, now)
    db.store_gaps(
        [(*log, first) for log, ledger in ledgers.items() for first in ledger.removed()],
        [(*log, *gap) for log, ledger in ledgers.items() for gap in ledger.added()],
    )
    db.executemany(_UPSERT_END, [(*log, ledgers[log].end) for log, one in changes.items() if one.end_seq])


def _affected_span(changes: LogChanges, through: int) -> tuple[int, int] | None:
    """Between which seqs gaps matter; None where the log just went on."""
    if not changes.evicted and not changes.end_seq and min(changes.arrived, default=through + 1) > through:
        return None
    declared = [*changes.evicted, *([(1, changes.end_seq)] if changes.end_seq else [])]
    ends = [*changes.arrived, *(seq for pair in declared for seq in pair)]
    return min(ends), max(ends)


class GapLedger:
    """The gaps of one log, as far as they matter."""

    def __init__(self, through: int, end: int, gaps: Iterable[Gap]) -> None:
        self.through, self.end = through, end
        self._original = {first: (last, bool(declared)) for first, last, declared in gaps}
        self._gaps = dict(self._original)
        self._firsts = sorted(self._gaps)

    def removed(self) -> list[int]:
        """Where gaps began that are not there any more, or are others now."""
        return [first for first, gap in self._original.items() if self._gaps.get(first) != gap]

    def added(self) -> list[Gap]:
        """Those that were not there before."""
        return [(first, *gap) for first, gap in self._gaps.items() if self._original.get(first) != gap]

    def add_arrival(self, seq: int) -> None:
        """Take note of a message that was not there before."""
        if seq > self.through:
            self._insert(self.through + 1, min(seq - 1, self.end), declared=True)
            self._insert(max(self.through, self.end) + 1, seq - 1, declared=False)
            self.through = seq
            return
        gap = self._floor_gap(seq)
        if gap is None or gap[1] < seq:
            return
        first, last, declared = gap
        self._remove(first)
        self._insert(first, seq - 1, declared=declared)
        self._insert(seq + 1, last, declared=declared)

    def declare_evicted(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark what is missing in `ranges` as declared by the device."""
        for a, b in ranges:
            for first, last in self._undeclared_overlaps(a, b):
                self._remove(first)
                self._insert(first, min(last, a - 1), declared=False)
                self._insert(b + 1, last, declared=False)
                self._declare(max(first, a), min(last, b))

    def declare_end(self, last: int) -> None:
        """A later log says so: what up to seq `last` is missing never comes, whether that is known here yet or not."""
        self.end = max(self.end, last)
        self.declare_evicted([(1, self.end)])

    def _declare(self, first: int, last: int) -> None:
        before = self._floor_gap(first - 1)
        if before and before[2] and before[1] == first - 1:
            first = before[0]
            self._remove(first)
        after = self._floor_gap(last + 1)
        if after and after[2] and after[0] == last + 1:
            last = after[1]
            self._remove(after[0])
        self._insert(first, last, declared=True)

    def _floor_gap(self, seq: int) -> Gap | None:
        at = bisect.bisect_right(self._firsts, seq)
        return (first := self._firsts[at - 1], *self._gaps[first]) if at else None

    def _undeclared_overlaps(self, a: int, b: int) -> list[tuple[int, int]]:
        """Undeclared ones."""
        begin, end = bisect.bisect_right(self._firsts, a), bisect.bisect_right(self._firsts, b)
        some = [(first, *self._gaps[first]) for first in self._firsts[max(0, begin - 1) : end]]
        return [(first, last) for first, last, declared in some if last >= a and not declared]

    def _insert(self, first: int, last: int, *, declared: bool) -> None:
        if first <= last:
            bisect.insort(self._firsts, first)
            self._gaps[first] = last, declared

    def _remove(self, first: int) -> None:
        del self._firsts[bisect.bisect_left(self._firsts, first)]
        del self._gaps[first]


def parse_evictions(body: object) -> list[tuple[int, int]]:
    """The seq ranges that a message declares as evicted from the outbox: all before itself, ascending or not."""
    # One that was written first in another log speaks of that one's numbers.
    if not isinstance(body, AuditPayload) or body.event != EVICTED or body.reissued:
        return []
    return [
        (first, min(last, body.seq - 1)) for first, last in parse_ranges(body.evidence.get("seq")) if first < body.seq
    ]


def parse_log_end(body: object) -> tuple[str, int] | None:
    """(log, last seq) of the log that a message says its own goes on from: what is missing there never comes."""
    if not isinstance(body, AuditPayload) or body.event != NEW_LOG or body.reissued:
        return None
    old, through = body.evidence.get("old"), body.evidence.get("through")
    return (old, min(through, _MAX_SEQ)) if isinstance(old, str) and old != body.log and type(through) is int else None


def parse_ranges(value: object) -> list[tuple[int, int]]:
    """What of a list of [first, last] makes sense as such."""
    pairs = [tuple(pair) for pair in value if isinstance(pair, list)] if isinstance(value, list) else []
    return [pair for pair in pairs if _is_range(pair)]


def _is_range(pair: tuple[object, ...]) -> TypeGuard[tuple[int, int]]:
    if len(pair) != 2:
        return False
    first, last = pair
    return type(first) is int and type(last) is int and 1 <= first <= last
