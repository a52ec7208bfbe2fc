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

from agent.fleet.database.interface import Connection, Gap, Log
from agent.wire.messages import Audit

EVICTED, NEW_LOG = "evicted", "new log"
# The largest that JSON carries safely.
_LAST = 2**53 - 1
_END = "INSERT INTO ends VALUES (?, ?, ?) ON CONFLICT (device, log) DO UPDATE SET last = excluded.last"


class News(msgspec.Struct):
    """What the messages of one transaction say of one log: seqs that are new, ranges declared, where it ended."""

    arrived: list[int] = msgspec.field(default_factory=list)
    evicted: list[tuple[int, int]] = msgspec.field(default_factory=list)
    ended: int = 0


def note(db: Connection, news: Mapping[Log, News], now: str) -> None:
    """Bring tables logs, gaps and ends up to date, inside a transaction that holds the devices' locks."""
    known = db.logs([*news])
    spans = {log: span for log, one in news.items() if (span := _touched(one, known[log][0] or 0))}
    gaps = db.gaps(spans)
    ledgers = {}
    for log, one in news.items():
        through, end = known[log]
        ledger = ledgers[log] = Ledger(through or 0, end, gaps.get(log, ()))
        for seq in sorted(one.arrived):
            ledger.arrived(seq)
        ledger.evicted(one.evicted)
        if one.ended:
            ledger.ended(one.ended)
    there = {log for log, (through, _) in known.items() if through is not None}
    db.store_logs({log: ledger.through for log, ledger in ledgers.items() if news[log].arrived}, there, now)
    db.store_gaps(
        [(*log, first) for log, ledger in ledgers.items() for first in ledger.gone()],
        [(*log, *gap) for log, ledger in ledgers.items() for gap in ledger.new()],
    )
    db.executemany(_END, [(*log, ledgers[log].end) for log, one in news.items() if one.ended])


def _touched(news: News, through: int) -> tuple[int, int] | None:
    """Between which seqs gaps matter; None where the log just went on."""
    if not news.evicted and not news.ended and min(news.arrived, default=through + 1) > through:
        return None
    declared = [*news.evicted, *([(1, news.ended)] if news.ended else [])]
    ends = [*news.arrived, *(seq for pair in declared for seq in pair)]
    return min(ends), max(ends)


class Ledger:
    """The gaps of one log, as far as they matter."""

    def __init__(self, through: int, end: int, gaps: Iterable[Gap]) -> None:
        self.through, self.end = through, end
        self._before = {first: (last, bool(declared)) for first, last, declared in gaps}
        self._gaps = dict(self._before)
        self._firsts = sorted(self._gaps)

    def gone(self) -> list[int]:
        """Where gaps began that are not there any more, or are others now."""
        return [first for first, gap in self._before.items() if self._gaps.get(first) != gap]

    def new(self) -> list[Gap]:
        """Those that were not there before."""
        return [(first, *gap) for first, gap in self._gaps.items() if self._before.get(first) != gap]

    def arrived(self, seq: int) -> None:
        """Take note of a message that was not there before."""
        if seq > self.through:
            self._put(self.through + 1, min(seq - 1, self.end), declared=True)
            self._put(max(self.through, self.end) + 1, seq - 1, declared=False)
            self.through = seq
            return
        gap = self._at_or_below(seq)
        if gap is None or gap[1] < seq:
            return
        first, last, declared = gap
        self._drop(first)
        self._put(first, seq - 1, declared=declared)
        self._put(seq + 1, last, declared=declared)

    def evicted(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark what is missing in `ranges` as declared by the device."""
        for a, b in ranges:
            for first, last in self._overlapping(a, b):
                self._drop(first)
                self._put(first, min(last, a - 1), declared=False)
                self._put(b + 1, last, declared=False)
                self._declare(max(first, a), min(last, b))

    def ended(self, last: int) -> None:
        """A later log says so: what up to seq `last` is missing never comes, whether that is known here yet or not."""
        self.end = max(self.end, last)
        self.evicted([(1, self.end)])

    def _declare(self, first: int, last: int) -> None:
        before = self._at_or_below(first - 1)
        if before and before[2] and before[1] == first - 1:
            first = before[0]
            self._drop(first)
        after = self._at_or_below(last + 1)
        if after and after[2] and after[0] == last + 1:
            last = after[1]
            self._drop(after[0])
        self._put(first, last, declared=True)

    def _at_or_below(self, seq: int) -> Gap | None:
        at = bisect.bisect_right(self._firsts, seq)
        return (first := self._firsts[at - 1], *self._gaps[first]) if at else None

    def _overlapping(self, a: int, b: int) -> list[tuple[int, int]]:
        """Undeclared ones."""
        begin, end = bisect.bisect_right(self._firsts, a), bisect.bisect_right(self._firsts, b)
        some = [(first, *self._gaps[first]) for first in self._firsts[max(0, begin - 1) : end]]
        return [(first, last) for first, last, declared in some if last >= a and not declared]

    def _put(self, first: int, last: int, *, declared: bool) -> None:
        if first <= last:
            bisect.insort(self._firsts, first)
            self._gaps[first] = last, declared

    def _drop(self, first: int) -> None:
        del self._firsts[bisect.bisect_left(self._firsts, first)]
        del self._gaps[first]


def evictions(body: object) -> list[tuple[int, int]]:
    """The seq ranges that a message declares as evicted from the outbox: all before itself, ascending or not."""
    # One that was written first in another log speaks of that one's numbers.
    if not isinstance(body, Audit) or body.event != EVICTED or body.reissued:
        return []
    return [(first, min(last, body.seq - 1)) for first, last in ranges(body.evidence.get("seq")) if first < body.seq]


def ended(body: object) -> tuple[str, int] | None:
    """(log, last seq) of the log that a message says its own goes on from: what is missing there never comes."""
    if not isinstance(body, Audit) or body.event != NEW_LOG or body.reissued:
        return None
    old, through = body.evidence.get("old"), body.evidence.get("through")
    return (old, min(through, _LAST)) if isinstance(old, str) and old != body.log and type(through) is int else None


def ranges(listed: object) -> list[tuple[int, int]]:
    """What of a list of [first, last] makes sense as such."""
    pairs = [tuple(pair) for pair in listed if isinstance(pair, list)] if isinstance(listed, list) else []
    return [pair for pair in pairs if _is_range(pair)]


def _is_range(pair: tuple[object, ...]) -> TypeGuard[tuple[int, int]]:
    if len(pair) != 2:
        return False
    first, last = pair
    return type(first) is int and type(last) is int and 1 <= first <= last
