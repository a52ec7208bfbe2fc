"""The outbox inside a transaction: what waits, what is acknowledged and kept for a while, what goes.

How many messages wait, and how many bytes they are, is counted as they come and go: no query looks at all of them.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from agent.device.store import meta, ranges, retention
from agent.device.store.quota import PAGE_SIZE, Budget
from agent.device.store.ranges import Ranges
from agent.device.store.retention import AcknowledgedSeqs

# CAST: one flipped bit on the disk makes a text that cannot be read as text.
MESSAGE_COLUMNS = "seq, CAST(topic AS BLOB), CAST(payload AS BLOB), CAST(jws AS BLOB), CAST(time AS BLOB), crc"


def message_crc(seq: int, topic: bytes, payload: bytes, jws: bytes, time: bytes) -> int:
    """CRC-32 over a message and its number, the parts kept apart by their lengths."""
    parts = (topic, payload, jws, time)
    crc = zlib.crc32(f"{seq} {' '.join(str(len(part)) for part in parts)}\n".encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def decode_message_row(row: tuple[Any, ...]) -> tuple[int, str, bytes, str, str] | None:
    """A row of COLUMNS as (seq, topic, payload, jws, time); None where its CRC does not match."""
    seq, *parts, crc = row
    if not all(isinstance(part, bytes) for part in parts) or message_crc(seq, *parts) != crc:
        return None
    topic, payload, jws, time = parts
    return seq, topic.decode(), payload, jws.decode(), time.decode()


_SIZE = "length(payload) + length(jws) + length(topic)"
_COUNT_RANGE = f"SELECT count(*), coalesce(sum({_SIZE}), 0) FROM outbox WHERE seq BETWEEN ? AND ?"
_LIST_ENTRIES = f"SELECT seq, topic, {_SIZE} FROM outbox WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
# Neighbours have the same distance to their place in the order.
_STORED_RANGES = """
    SELECT min(seq), max(seq) FROM (
        SELECT seq, seq - row_number() OVER (ORDER BY seq) AS run FROM outbox WHERE seq BETWEEN ? AND ?)
    GROUP BY run ORDER BY run
"""
_MAX_SEQ = 2**63 - 1


class Backlog(msgspec.Struct, frozen=True):
    """Messages that are not acknowledged, and their bytes: payload, signature and topic."""

    messages: int = 0
    bytes: int = 0

    @classmethod
    def from_text(cls, text: str) -> Backlog:
        return cls(*(int(part) for part in text.split())) if text else cls()


class OutboxEntry(msgspec.Struct, frozen=True):
    """What a message is and takes, without its content."""

    seq: int
    kind: str
    size: int


class Outbox:
    """Lives inside a `Transaction`."""

    def __init__(self, db: sqlite3.Connection, budget: Budget) -> None:
        self._db, self._budget = db, budget
        self._backlog_change = [0, 0]

    @property
    def acknowledged(self) -> AcknowledgedSeqs:
        return AcknowledgedSeqs.from_json(self._get_meta(retention.ACKNOWLEDGED))

    def record_added(self, size: int) -> None:
        self._budget.spend(size + 64)
        self._adjust_backlog(1, size)

    def set_acknowledged(self, new: AcknowledgedSeqs) -> list[tuple[int, int]]:
        """From now on exactly these are acknowledged.

        What was and is no more waits again; the ranges of that which are no longer kept.
        """
        old = self.acknowledged
        if new == old:
            return []
        for messages, size in self._measure(ranges.subtract(new.ranges, old.ranges)):
            self._adjust_backlog(-messages, -size)
        again = ranges.subtract(old.ranges, new.ranges)
        for messages, size in self._measure(again):
            self._adjust_backlog(messages, size)
        meta.put(self._db, retention.ACKNOWLEDGED, new.to_json())
        return ranges.subtract(again, ranges.from_numbers(entry.seq for entry in self._entries(again, 0, _MAX_SEQ)))

    def unacknowledged(self, after: int, limit: int) -> Iterator[OutboxEntry]:
        """What waits behind seq `after`, at most `limit`, in order."""
        return self._entries(unacknowledged_ranges(self.acknowledged), after, limit)

    def payload(self, seq: int) -> bytes | None:
        """None where there is no such message, or it is not what was written."""
        row = self._db.execute(f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq = ?", (seq,)).fetchone()
        parts = decode_message_row(row) if row else None
        return parts[2] if parts else None

    def delete(self, seqs: Sequence[int]) -> list[int]:
        """Delete of these messages, acknowledged or not, the first ones that one transaction may; which."""
        entries = list(self._entries(ranges.from_numbers(seqs), 0, _MAX_SEQ))
        # Only the page of its tree is written, not those that a payload runs over to.
        count = self._budget.spend_affordable(min(entry.size, PAGE_SIZE) + 64 for entry in entries)
        acknowledged = self.acknowledged
        for entry in entries[:count]:
            if entry.seq not in acknowledged:
                self._adjust_backlog(-1, -entry.size)
        for first, last in ranges.from_numbers(entry.seq for entry in entries[:count]):
            self._db.execute("DELETE FROM outbox WHERE seq BETWEEN ? AND ?", (first, last))
        return [seq for seq in seqs if count == len(entries) or seq < entries[count].seq]

    def missing_seqs(self, through: int) -> list[tuple[int, int]]:
        """What of seq 1 to `through` is neither in the outbox nor acknowledged."""
        wanted = ranges.subtract([(1, through)] if through else [], self.acknowledged.ranges)
        return ranges.subtract(wanted, [pair for first, last in wanted for pair in self._stored_ranges(first, last)])

    def quarantine(self, seq: int) -> None:
        """Move a damaged message out of everyone's way, bytes kept for a look."""
        self._db.execute(f"INSERT INTO damaged_messages SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq = ?", (seq,))
        self.delete([seq])

    def drop_acknowledged(self, through: int, limit: int) -> int:
        """Delete the oldest acknowledged messages up to seq `through`, at most `limit`; how many."""
        covered = ranges.intersect(self.acknowledged.ranges, [(1, through)])
        return len(self.delete([entry.seq for entry in self._entries(covered, 0, limit)]))

    def finish(self) -> None:
        """Write the counts."""
        if any(self._backlog_change):
            now = Backlog.from_text(self._get_meta(retention.BACKLOG))
            text = f"{max(0, now.messages + self._backlog_change[0])} {max(0, now.bytes + self._backlog_change[1])}"
            meta.put(self._db, retention.BACKLOG, text)
            self._backlog_change = [0, 0]

    def _stored_ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        return self._db.execute(_STORED_RANGES, (first, last)).fetchall()

    def _entries(self, seqs: Ranges, after: int, limit: int) -> Iterator[OutboxEntry]:
        for first, last in seqs:
            if last <= after or limit <= 0:
                continue
            found = self._db.execute(_LIST_ENTRIES, (max(first, after + 1), last, limit)).fetchall()
            limit -= len(found)
            for seq, topic, size in found:
                parts = str(topic).split("/")
                yield OutboxEntry(int(seq), parts[3] if len(parts) > 3 else "", int(size or 0))

    def _measure(self, seqs: Ranges) -> Iterator[tuple[int, int]]:
        for first, last in seqs:
            yield self._db.execute(_COUNT_RANGE, (first, last)).fetchone()

    def _adjust_backlog(self, messages: int, size: int) -> None:
        self._backlog_change[0] += messages
        self._backlog_change[1] += size

    def _get_meta(self, key: str) -> str:
        return meta.get(self._db, key, "")


def unacknowledged_ranges(acknowledged: AcknowledgedSeqs) -> list[tuple[int, int]]:
    """Where unacknowledged messages can be."""
    return [*acknowledged.missing, (acknowledged.through + 1, _MAX_SEQ)]
