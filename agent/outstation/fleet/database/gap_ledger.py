"""Gap ledger: which sequence numbers of a log arrived and which are missing, in a few ranges per log.

The ranges do not depend on the order in which messages, repeats, evictions and the end of the log arrive. Undeclared
and declared gaps together are the complement of the numbers that arrived up to `last_seq`, split where a declaration
begins or ends; adjacent gaps of one kind are merged.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping

import msgspec

from outstation.fleet.database.interface import Connection, Gap, LogId
from outstation.protocol.wire.messages import AuditPayload, LoggedPayload

EVICTED, NEW_LOG = "evicted", "new log"
# The largest integer that JSON carries safely.
_MAX_SEQ = 2**53 - 1
_UPSERT_END = """
    INSERT INTO log_ends VALUES (?, ?, ?) ON CONFLICT (device, log) DO UPDATE SET last_seq = excluded.last_seq"""


class LogChanges(msgspec.Struct):
    """Changes to one log by the messages of a transaction: new seqs, evicted ranges, and the end (0: not declared).

    `latest`: when its last message arrived. `predecessors`: log → (last seq, when it arrived) of each log that its
    messages continue.
    """

    arrived: list[int] = msgspec.field(default_factory=list)
    evicted: list[tuple[int, int]] = msgspec.field(default_factory=list)
    end_seq: int = 0
    latest: str = ""
    predecessors: dict[str, tuple[int, str]] = msgspec.field(default_factory=dict)


def add_changes(changes: dict[LogId, LogChanges], body: LoggedPayload, received: str) -> None:
    """Add what a new message changes in the ledger of its log, and of a log that it ends."""
    change = changes.setdefault((body.device, body.log), LogChanges())
    change.arrived.append(body.seq)
    change.latest = max(change.latest, received)
    for old, last in _parse_predecessors(body):
        known, since = change.predecessors.get(old, (last, received))
        change.predecessors[old] = min(known, last), min(since, received)
    change.evicted += parse_evictions(body)
    if end := parse_log_end(body):
        ended = changes.setdefault((body.device, end[0]), LogChanges())
        ended.end_seq = max(ended.end_seq, end[1])


def apply(db: Connection, changes: Mapping[LogId, LogChanges]) -> None:
    """Update tables logs, gaps and log_ends, in a transaction that holds the locks of the devices."""
    stored = db.logs([*changes])
    spans = {log: span for log, change in changes.items() if (span := _affected_span(change, stored[log][0] or 0))}
    gaps = db.gaps(spans)
    ledgers = {}
    for log, change in changes.items():
        last_seq, end = stored[log]
        ledger = ledgers[log] = GapLedger(last_seq or 0, end, gaps.get(log, ()))
        for seq in sorted(change.arrived):
            ledger.add_arrival(seq)
        ledger.declare_evicted(change.evicted)
        if change.end_seq:
            ledger.declare_end(change.end_seq)
    known = {log for log, (last_seq, _) in stored.items() if last_seq is not None}
    arrived = [(*log, ledgers[log].last_seq, change.latest) for log, change in changes.items() if change.arrived]
    db.store_logs(arrived, known)
    db.store_gaps(
        [(*log, first) for log, ledger in ledgers.items() for first in ledger.removed()],
        [(*log, *gap) for log, ledger in ledgers.items() for gap in ledger.added()],
    )
    db.executemany(_UPSERT_END, [(*log, ledgers[log].end) for log, change in changes.items() if change.end_seq])


def _affected_span(changes: LogChanges, last_seq: int) -> tuple[int, int] | None:
    """Return the seqs between which gaps may change; None where the log only grew."""
    if not changes.evicted and not changes.end_seq and min(changes.arrived, default=last_seq + 1) > last_seq:
        return None
    declared = [*changes.evicted, *([(1, changes.end_seq)] if changes.end_seq else [])]
    ends = [*changes.arrived, *(seq for pair in declared for seq in pair)]
    return min(ends), max(ends)


class GapLedger:
    """The gaps of one log within the span that a transaction affects."""

    def __init__(self, last_seq: int, end: int, gaps: Iterable[Gap]) -> None:
        self.last_seq, self.end = last_seq, end
        self._original = {first: (last, bool(declared)) for first, last, declared in gaps}
        self._gaps = dict(self._original)
        self._firsts = sorted(self._gaps)

    def removed(self) -> list[int]:
        """Return the first seqs of gaps that disappeared or changed."""
        return [first for first, gap in self._original.items() if self._gaps.get(first) != gap]

    def added(self) -> list[Gap]:
        """Return the gaps that are new or changed."""
        return [(first, *gap) for first, gap in self._gaps.items() if self._original.get(first) != gap]

    def add_arrival(self, seq: int) -> None:
        """Record a message that is new to the log."""
        if seq > self.last_seq:
            self._insert(self.last_seq + 1, min(seq - 1, self.end), declared=True)
            self._insert(max(self.last_seq, self.end) + 1, seq - 1, declared=False)
            self.last_seq = seq
            return
        gap = self._floor_gap(seq)
        if gap is None or gap[1] < seq:
            return
        first, last, declared = gap
        self._remove(first)
        self._insert(first, seq - 1, declared=declared)
        self._insert(seq + 1, last, declared=declared)

    def declare_evicted(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark the missing seqs in `ranges` as declared by the device."""
        for a, b in ranges:
            begin, end = bisect.bisect_right(self._firsts, a), bisect.bisect_right(self._firsts, b)
            nearby = [(first, *self._gaps[first]) for first in self._firsts[max(0, begin - 1) : end]]
            for first, last, declared in nearby:
                if declared or last < a:
                    continue
                self._remove(first)
                self._insert(first, min(last, a - 1), declared=False)
                self._insert(b + 1, last, declared=False)
                self._declare(max(first, a), min(last, b))

    def declare_end(self, last: int) -> None:
        """Record that the log ended at seq `last`: whatever is missing up to it, now or later, is declared."""
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
        index = bisect.bisect_right(self._firsts, seq)
        return (first := self._firsts[index - 1], *self._gaps[first]) if index else None

    def _insert(self, first: int, last: int, *, declared: bool) -> None:
        if first <= last:
            bisect.insort(self._firsts, first)
            self._gaps[first] = last, declared

    def _remove(self, first: int) -> None:
        del self._firsts[bisect.bisect_left(self._firsts, first)]
        del self._gaps[first]


def parse_evictions(body: object) -> list[tuple[int, int]]:
    """Return the seq ranges below its own that a message declares as evicted from the outbox, in any order."""
    # A reissued message has the numbers of the log that it was first written in.
    if not isinstance(body, AuditPayload) or body.event != EVICTED or body.reissued:
        return []
    return [(a, min(b, body.seq - 1)) for a, b in parse_ranges(body.evidence.get("seq")) if a < body.seq]


def parse_log_end(body: object) -> tuple[str, int] | None:
    """Return (log, last seq) of the log that the message's own log continues: missing seqs there never arrive."""
    return None if not isinstance(body, AuditPayload) or body.reissued else _parse_new_log(body)


def _parse_predecessors(body: LoggedPayload) -> list[tuple[str, int]]:
    """Return (log, last seq) of each log that a message names as the one before its own."""
    # A repeated message does not say where the old log ended.
    named = [(body.reissued.log, _MAX_SEQ)] if body.reissued and body.reissued.log != body.log else []
    end = _parse_new_log(body)
    return [*named, end] if end else named


def _parse_new_log(body: LoggedPayload) -> tuple[str, int] | None:
    if not isinstance(body, AuditPayload) or body.event != NEW_LOG:
        return None
    old, last = body.evidence.get("old"), body.evidence.get("through")
    return (old, min(last, _MAX_SEQ)) if isinstance(old, str) and old != body.log and type(last) is int else None


def parse_ranges(value: object) -> list[tuple[int, int]]:
    pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []
    return [(a, b) for a, b in pairs if type(a) is int and type(b) is int and 1 <= a <= b]
