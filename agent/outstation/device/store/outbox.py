"""Outbox: messages that wait for delivery, and delivered ones until their retention ends.

The newest results of each task stay after that (`retention.NewestResults`). Waiting messages and their bytes are
counted as messages come and go, so that no query has to read all of them. Each message has a CRC: what the disk has
changed must not be sent as if the device had signed it.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec

from outstation.device.store import retention
from outstation.device.store.quota import PAGE_SIZE, Budget
from outstation.device.store.retention import AcknowledgedSeqs, NewestResults
from outstation.device.store.tables import meta
from outstation.foundation import ranges
from outstation.foundation.ranges import Ranges

# CAST: one flipped bit on the disk makes a text that cannot be read as text.
MESSAGE_COLUMNS = "seq, CAST(topic AS BLOB), CAST(payload AS BLOB), CAST(jws AS BLOB), CAST(time AS BLOB), crc"
_SIZE = "length(payload) + length(jws) + length(topic)"
_COUNT_RANGE = f"SELECT count(*), coalesce(sum({_SIZE}), 0) FROM outbox WHERE seq BETWEEN ? AND ?"
_LIST_ENTRIES = f"SELECT seq, topic, {_SIZE} FROM outbox WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
_INSERT = "INSERT INTO outbox (seq, topic, payload, jws, time, crc) VALUES (?, ?, ?, ?, ?, ?)"
_QUARANTINE = f"INSERT INTO quarantined_messages SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq = ?"
# Neighbours have the same distance to their place in the order.
_STORED_RANGES = """
    SELECT min(seq), max(seq) FROM (
        SELECT seq, seq - row_number() OVER (ORDER BY seq) AS run FROM outbox WHERE seq BETWEEN ? AND ?)
    GROUP BY run ORDER BY run
"""
_MAX_SEQ = 2**63 - 1
_NAMES = "SELECT key FROM meta WHERE key BETWEEN ? AND ? ORDER BY key"


class OutboxMessage(msgspec.Struct, frozen=True):
    """Message of the outbox; one that is not what was written is empty and not `intact`."""

    seq: int
    topic: str
    payload: bytes
    jws: str
    time: str
    intact: bool = True

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> OutboxMessage:
        seq, *parts, crc = row
        if not all(isinstance(part, bytes) for part in parts) or message_crc(seq, *parts) != crc:
            return cls(int(seq), "", b"", "", "", intact=False)
        topic, payload, jws, time = parts
        return cls(seq, topic.decode(), payload, jws.decode(), time.decode())

    @property
    def size(self) -> int:
        return len(self.payload) + len(self.jws) + len(self.topic)


class Backlog(msgspec.Struct, frozen=True):
    """Number of unacknowledged messages, and their bytes: payload, signature and topic."""

    messages: int = 0
    bytes: int = 0

    @classmethod
    def from_text(cls, text: str) -> Backlog:
        return cls(*(int(part) for part in text.split())) if text else cls()


class OutboxEntry(msgspec.Struct, frozen=True):
    """Kind and size of a message, without its content."""

    seq: int
    kind: str
    size: int


class Outbox:
    """Outbox inside a `Transaction`."""

    def __init__(self, db: sqlite3.Connection, budget: Budget) -> None:
        self._db, self._budget = db, budget
        self._backlog_change = [0, 0]

    @property
    def acknowledged(self) -> AcknowledgedSeqs:
        return AcknowledgedSeqs.from_json(meta.get(self._db, retention.ACKNOWLEDGED, ""))

    def add(self, message: OutboxMessage) -> None:
        """Add a message with its CRC."""
        crc = message_crc(
            message.seq, message.topic.encode(), message.payload, message.jws.encode(), message.time.encode()
        )
        self._db.execute(_INSERT, (message.seq, message.topic, message.payload, message.jws, message.time, crc))
        self._budget.spend(message.size + 64)
        self._adjust_backlog(1, message.size)
        kind, task = _kind_and_task(message.topic)
        if kind == "results" and task:
            self._put_newest(task, self._newest(task).append(message.seq, message.size))

    def newest_results(self) -> dict[str, set[int]]:
        """Return the seqs of the newest results of each task, which `outstation results` shows also once delivered."""
        prefix = retention.NEWEST_RESULTS
        # No character of a task's name sorts above "~".
        names = [str(key) for (key,) in self._db.execute(_NAMES, (prefix, prefix + "~")).fetchall()]
        return {name.removeprefix(prefix): self._newest(name.removeprefix(prefix)).seqs for name in names}

    def set_acknowledged(self, new: AcknowledgedSeqs) -> list[tuple[int, int]]:
        """Make exactly these messages the acknowledged ones.

        Messages that are no longer acknowledged wait again. Returns the ranges of those that are no longer stored.
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
        """Yield waiting messages behind seq `after`, at most `limit`, in order."""
        return self._entries(unacknowledged_ranges(self.acknowledged), after, limit)

    def payload(self, seq: int) -> bytes | None:
        """Return the payload of a message; None if it is missing or damaged."""
        row = self._db.execute(f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq = ?", (seq,)).fetchone()
        message = OutboxMessage.from_row(row) if row else None
        return message.payload if message is not None and message.intact else None

    def delete(self, seqs: Sequence[int]) -> list[int]:
        """Delete the first of these messages, as many as one transaction may, and return their seqs."""
        entries = list(self._entries(ranges.from_numbers(seqs), 0, _MAX_SEQ))
        # Only the page of its tree is written, not the overflow pages of a payload.
        count = self._budget.spend_affordable(min(entry.size, PAGE_SIZE) + 64 for entry in entries)
        acknowledged = self.acknowledged
        for entry in entries[:count]:
            if entry.seq not in acknowledged:
                self._adjust_backlog(-1, -entry.size)
        for first, last in ranges.from_numbers(entry.seq for entry in entries[:count]):
            self._db.execute("DELETE FROM outbox WHERE seq BETWEEN ? AND ?", (first, last))
        deleted = {entry.seq for entry in entries[:count]}
        for task, newest in self.newest_results().items():
            if deleted & newest:
                self._put_newest(task, self._newest(task).without(deleted))
        return [seq for seq in seqs if count == len(entries) or seq < entries[count].seq]

    def missing_seqs(self, through: int) -> list[tuple[int, int]]:
        """Return the seqs from 1 to `through` that are neither in the outbox nor acknowledged."""
        expected = ranges.subtract([(1, through)] if through else [], self.acknowledged.ranges)
        stored = [
            pair for first, last in expected for pair in self._db.execute(_STORED_RANGES, (first, last)).fetchall()
        ]
        return ranges.subtract(expected, stored)

    def quarantine(self, seq: int) -> None:
        """Move a damaged message to table `quarantined_messages`, for inspection."""
        self._db.execute(_QUARANTINE, (seq,))
        self.delete([seq])

    def drop_acknowledged(self, through: int, limit: int, spare: Collection[str] = ()) -> int:
        """Delete up to `limit` of the oldest acknowledged messages up to seq `through`, and return how many.

        The newest results of the tasks in `spare` stay.
        """
        covered = ranges.intersect(self.acknowledged.ranges, [(1, through)])
        newest = self.newest_results() if spare else {}
        spared = {seq for task in spare for seq in newest.get(task, ())}
        covered = ranges.subtract(covered, ranges.from_numbers(sorted(spared)))
        return len(self.delete([entry.seq for entry in self._entries(covered, 0, limit)]))

    def finish(self) -> None:
        """Write the size of the backlog."""
        if any(self._backlog_change):
            now = Backlog.from_text(meta.get(self._db, retention.BACKLOG, ""))
            text = f"{max(0, now.messages + self._backlog_change[0])} {max(0, now.bytes + self._backlog_change[1])}"
            meta.put(self._db, retention.BACKLOG, text)
            self._backlog_change = [0, 0]

    def _entries(self, seqs: Ranges, after: int, limit: int) -> Iterator[OutboxEntry]:
        for first, last in seqs:
            if last <= after or limit <= 0:
                continue
            rows = self._db.execute(_LIST_ENTRIES, (max(first, after + 1), last, limit)).fetchall()
            limit -= len(rows)
            for seq, topic, size in rows:
                yield OutboxEntry(int(seq), _kind_and_task(str(topic))[0], int(size or 0))

    def _newest(self, task: str) -> NewestResults:
        return NewestResults.from_json(meta.get(self._db, retention.NEWEST_RESULTS + task, ""))

    def _put_newest(self, task: str, newest: NewestResults) -> None:
        name, text = retention.NEWEST_RESULTS + task, newest.to_json()
        if newest.messages:
            self._budget.spend(len(name) + len(text) + 32)
            meta.put(self._db, name, text)
        else:
            meta.delete(self._db, name)

    def _measure(self, seqs: Ranges) -> Iterator[tuple[int, int]]:
        for first, last in seqs:
            yield self._db.execute(_COUNT_RANGE, (first, last)).fetchone()

    def _adjust_backlog(self, messages: int, size: int) -> None:
        self._backlog_change[0] += messages
        self._backlog_change[1] += size


def _kind_and_task(topic: str) -> tuple[str, str]:
    """Return kind and task of a topic; "" for what it does not have."""
    parts = [*topic.split("/"), "", "", "", "", ""]
    return parts[3], parts[4]


def message_crc(seq: int, topic: bytes, payload: bytes, jws: bytes, time: bytes) -> int:
    """Return the CRC-32 of a message and its number, the parts separated by their lengths."""
    parts = (topic, payload, jws, time)
    crc = zlib.crc32(f"{seq} {' '.join(str(len(part)) for part in parts)}\n".encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def unacknowledged_ranges(acknowledged: AcknowledgedSeqs) -> list[tuple[int, int]]:
    """Return the ranges in which unacknowledged messages can be."""
    return [*acknowledged.missing, (acknowledged.through + 1, _MAX_SEQ)]
