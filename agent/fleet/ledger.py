"""Which seqs of one log came and which are missing: a few ranges, however many messages there were.

The ranges end up the same whatever order messages, repeats, evictions and the end of the log come in: undeclared and
declared gaps are the complement of what came below `through`, cut where a declaration begins or ends, never two of one
kind side by side.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import TypeGuard

from agent.wire.messages import Audit

EVICTED, NEW_LOG = "evicted", "new log"
# The largest that JSON carries safely.
_LAST = 2**53 - 1
_PUT = "INSERT INTO gaps VALUES (?, ?, ?, ?, ?)"
_END = "INSERT INTO ends VALUES (?, ?, ?) ON CONFLICT (device, log) DO UPDATE SET last = excluded.last"
_AT_OR_BELOW = (
    "SELECT first, last, declared FROM gaps WHERE device=? AND log=? AND first<=? ORDER BY first DESC LIMIT 1"
)
_OVERLAPPING = """
    SELECT first, last FROM gaps WHERE device = :device AND log = :log AND NOT declared AND last >= :a AND first <= :b
      AND first >= coalesce((SELECT max(first) FROM gaps WHERE device = :device AND log = :log AND first <= :a), 0)
"""


class Ledger:
    """The gaps of one (device, log), inside the caller's transaction."""

    def __init__(self, db: sqlite3.Connection, device: str, log: str, through: int) -> None:
        self._db, self._key, self.through = db, (device, log), through
        end = db.execute("SELECT last FROM ends WHERE device = ? AND log = ?", self._key).fetchone()
        self._end = int(end[0]) if end else 0

    def arrived(self, seq: int) -> None:
        """Take note of a message that was not there before."""
        if seq > self.through:
            self._put(self.through + 1, min(seq - 1, self._end), declared=True)
            self._put(max(self.through, self._end) + 1, seq - 1, declared=False)
            self.through = seq
            return
        gap = self._db.execute(_AT_OR_BELOW, (*self._key, seq)).fetchone()
        if gap is None or gap[1] < seq:
            return
        first, last, declared = gap
        self._drop(first)
        self._put(first, seq - 1, declared=declared)
        self._put(seq + 1, last, declared=declared)

    def evicted(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Mark what is missing in `ranges` as declared by the device."""
        for a, b in ranges:
            names = {"device": self._key[0], "log": self._key[1], "a": a, "b": b}
            for first, last in self._db.execute(_OVERLAPPING, names).fetchall():
                self._drop(first)
                self._put(first, min(last, a - 1), declared=False)
                self._put(b + 1, last, declared=False)
                self._declare(max(first, a), min(last, b))

    def ended(self, last: int) -> None:
        """A later log says so: what up to seq `last` is missing never comes, whether that is known here yet or not."""
        self._end = max(self._end, last)
        self._db.execute(_END, (*self._key, self._end))
        self.evicted([(1, self._end)])

    def _declare(self, first: int, last: int) -> None:
        before = self._db.execute(_AT_OR_BELOW, (*self._key, first - 1)).fetchone()
        if before and before[2] and before[1] == first - 1:
            first = before[0]
            self._drop(first)
        after = self._db.execute(_AT_OR_BELOW, (*self._key, last + 1)).fetchone()
        if after and after[2] and after[0] == last + 1:
            last = after[1]
            self._drop(after[0])
        self._put(first, last, declared=True)

    def _put(self, first: int, last: int, *, declared: bool) -> None:
        if first <= last:
            self._db.execute(_PUT, (*self._key, first, last, int(declared)))

    def _drop(self, first: int) -> None:
        self._db.execute("DELETE FROM gaps WHERE device = ? AND log = ? AND first = ?", (*self._key, first))


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
