"""What can be written to the device store, inside one transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from agent.clock import ClockReading
from agent.device.store import meta, retention, schema, task_keys
from agent.device.store.clock_segments import PRODUCER_TIME, QUALITIES, ClockSegments
from agent.device.store.command_log import CommandLog
from agent.device.store.labels import LabelStore
from agent.device.store.outbox import Outbox, decode_message_row, message_crc
from agent.device.store.quota import PAGE_SIZE, Budget
from agent.device.store.rows import Rows, pack_chunk
from agent.device.store.watermark import TransactionProgress

_MAX_CATEGORIES = 0xFFFF
_MAX_TIME_US = 2**63 - 1


class OutboxMessage(msgspec.Struct, frozen=True):
    """One message of the outbox."""

    seq: int
    topic: str
    payload: bytes
    jws: str
    time: str
    intact: bool = True

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> OutboxMessage:
        """From a row of `checked.COLUMNS`; one that is not what was written is empty and not `intact`."""
        parts = decode_message_row(row)
        return cls(*parts) if parts else cls(int(row[0]), "", b"", "", "", intact=False)


class TrimmedChunks(msgspec.Struct, frozen=True):
    """Chunks that were deleted: rows `first` to `last`."""

    chunks: int
    first: int
    last: int
    bytes: int


class Transaction:
    """What can be written; lives inside `Store.transaction`."""

    def __init__(self, db: sqlite3.Connection, boot: int, budget: Budget) -> None:
        self._db, self._boot, self._budget = db, boot, budget
        self.outbox = Outbox(db, budget)
        self.commands = CommandLog(db)
        self.labels = LabelStore(db, budget)
        self.progress = TransactionProgress()
        self._log_head: tuple[int, str] | None = None
        self._segments: ClockSegments | None = None

    @property
    def remaining_bytes(self) -> int:
        """Bytes that may still be written."""
        return self._budget.remaining

    def declare_stream(self, stream: str, fields: str) -> None:
        self._db.execute(
            "INSERT INTO streams (name, fields, next_row) VALUES (?, ?, 1) "
            "ON CONFLICT (name) DO UPDATE SET fields = excluded.fields",
            (stream, fields),
        )
        self.progress.needs_refresh = True

    @property
    def segments(self) -> ClockSegments:
        """The wall clock's segments of this boot."""
        if self._segments is None:
            self._segments = ClockSegments(self._db, self._boot)
        return self._segments

    def append(self, stream: str, rows: Rows, quality: str, *, segment: int = PRODUCER_TIME, boot_us: int = 0) -> int:
        """Add rows to a stream as one chunk; the number of the last one. `segment` whose clock gave the times."""
        stream_id, first = self._db.execute("SELECT id, next_row FROM streams WHERE name = ?", (stream,)).fetchone()
        packed = pack_chunk(rows)
        self._budget.spend(len(packed.data) + 100)
        self._db.execute(
            schema.INSERT_CHUNK,
            (
                *(stream_id, first, packed.n, packed.first_t, packed.time_bytes, packed.data, packed.crc),
                *(self._boot, QUALITIES.index(quality), segment, boot_us),
            ),
        )
        self._db.execute("UPDATE streams SET next_row = ? WHERE id = ?", (first + packed.n, stream_id))
        self.progress.rows[stream] = int(first) + packed.n
        return int(first) + packed.n - 1

    def assign_category_codes(self, stream: str, field: str, texts: Sequence[str]) -> list[int]:
        """The code of each text, new ones given; -1 where 65,535 texts are known and this is another one."""
        known = {
            str(value): int(code)
            for code, value in self._db.execute(
                "SELECT code, value FROM categories WHERE stream = ? AND field = ?", (stream, field)
            )
        }
        known[""] = 0
        for text in dict.fromkeys(texts):
            if text not in known and (code := len(known)) <= _MAX_CATEGORIES:
                known[text] = code
                self._budget.spend(len(stream) + len(field) + len(text.encode()) + 8)
                self._db.execute("INSERT INTO categories VALUES (?, ?, ?, ?)", (stream, field, code, text))
        return [known.get(text, -1) for text in texts]

    def advance_cursor(self, task: str, first: int, last: int) -> None:
        """Move the cursor of `task` to `last`; `first` is remembered once, as where the task began."""
        self._db.execute(
            "INSERT INTO cursors (task, row, first) VALUES (?, ?, ?) "
            "ON CONFLICT (task) DO UPDATE SET row = excluded.row",
            (task, last, first),
        )
        self.progress.cursors[task] = last

    def save_state(self, task: str, name: str, value: bytes) -> None:
        self._budget.spend(2 * (len(task) + len(name)) + len(value) + 32)
        self._db.execute("INSERT OR REPLACE INTO state (task, name, value) VALUES (?, ?, ?)", (task, name, value))

    def load_state(self, task: str, name: str) -> bytes | None:
        """What was kept under this name."""
        sql = "SELECT CAST(value AS BLOB) FROM state WHERE task = ? AND name = ?"
        found = self._db.execute(sql, (task, name)).fetchone()
        return found[0] if found else None

    def delete_state(self, task: str, name: str) -> None:
        self._db.execute("DELETE FROM state WHERE task = ? AND name = ?", (task, name))

    def rename_state(self, task: str, name: str, new: str) -> None:
        """Keep under another name, under which nothing is kept, what is kept under this one, if anything is."""
        size = self._db.execute("SELECT length(value) FROM state WHERE task = ? AND name = ?", (task, name)).fetchone()
        if size is not None:
            self._budget.spend(2 * (len(task) + len(new)) + int(size[0]) + 32)
            self._db.execute("UPDATE state SET name = ? WHERE task = ? AND name = ?", (new, task, name))

    def set_source_position(self, source: str, item: str, position: int, max_items: int | None = None) -> None:
        """Remember how far `source` got with `item`; of more than `most` items, those that were set last stay."""
        self._budget.spend(2 * (len(source) + len(item)) + 30)
        names = {"source": source, "item": item, "position": position, "most": max_items}
        if not self._db.execute(schema.UPDATE_SOURCE_POSITION, names).rowcount:
            self._db.execute(schema.INSERT_SOURCE_POSITION, names)
            if max_items is not None:
                self._db.execute(schema.PRUNE_SOURCE_POSITIONS, names)

    def delete_source_position(self, source: str, item: str) -> None:
        self._db.execute("DELETE FROM marks WHERE source = ? AND item = ?", (source, item))

    def increment_counter(self, name: str, n: int) -> None:
        if n:
            self._db.execute(
                "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n", (name, n)
            )

    def counter(self, name: str) -> int:
        row = self._db.execute("SELECT n FROM counters WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    @property
    def connection(self) -> sqlite3.Connection:
        """For the queries of `labelled`; nothing is written by it."""
        return self._db

    def raise_time_floor(self, wall_us: int) -> None:
        """Remember that this time has passed, on the word of someone whose clock is right."""
        meta.put(self._db, "time floor", str(max(int(meta.get(self._db, "time floor", "0")), wall_us)))

    def get_meta(self, key: str, default: str) -> str:
        return meta.get(self._db, key, default)

    def delete_meta(self, key: str) -> None:
        meta.drop(self._db, key)

    def cursor(self, task: str) -> int:
        """The last row that `task` used; 0 before its first batch."""
        row = self._db.execute("SELECT row FROM cursors WHERE task = ?", (task,)).fetchone()
        return int(row[0]) if row else 0

    def next_row(self, stream: str) -> int:
        """The number that the next row of `stream` will get."""
        row = self._db.execute("SELECT next_row FROM streams WHERE name = ?", (stream,)).fetchone()
        return int(row[0]) if row else 1

    def uptime_s(self, now: ClockReading) -> float:
        """Seconds that the device was on, all its boots together."""
        return retention.uptime_s(self.get_meta(retention.UPTIME, ""), self._boot, now)

    def set_meta(self, key: str, value: str) -> None:
        self._budget.spend(len(key) + len(value) + 32)
        meta.put(self._db, key, value)

    def log_head(self) -> tuple[int, str]:
        """The last seq given and the digest of its payload; (0, "") in a new log."""
        if self._log_head is None:
            self._log_head = int(self.get_meta("seq", "0")), self.get_meta("digest", "")
        return self._log_head

    def enqueue(self, message: OutboxMessage, digest: str) -> None:
        """Add the next message of the log; `digest` is of its payload."""
        parts = (message.topic.encode(), message.payload, message.jws.encode(), message.time.encode())
        self._db.execute(
            "INSERT INTO outbox (seq, topic, payload, jws, time, crc) VALUES (?, ?, ?, ?, ?, ?)",
            (message.seq, message.topic, message.payload, message.jws, message.time, message_crc(message.seq, *parts)),
        )
        self._log_head = message.seq, digest
        self.outbox.record_added(len(message.payload) + len(message.jws) + len(message.topic))

    def record_alert(self, alert: Mapping[str, Any]) -> None:
        """Keep an alert for local eyes: the newest thousand, and what is open of a task, however long ago it began."""
        body = json.dumps(alert)
        if alert.get("task") is not None and alert.get("alert") in schema.OPEN_ALERT_KINDS:
            if alert["state"] == "raised":
                self.save_state(alert["task"], task_keys.OPEN_ALERT_PREFIX + alert["id"], body.encode())
            else:
                self.delete_state(alert["task"], task_keys.OPEN_ALERT_PREFIX + alert["id"])
        self._budget.spend(len(body.encode()))
        self._db.execute("INSERT INTO alerts (body) VALUES (?)", (body,))
        self._db.execute("DELETE FROM alerts WHERE rowid <= (SELECT max(rowid) FROM alerts) - 1000")

    def delete_old_alerts(self) -> bool:
        """Delete some of the oldest alerts kept for local eyes, but for the newest fifty; whether there were any."""
        found = self._db.execute(schema.SELECT_OLD_ALERTS).fetchall()
        count = self._budget.spend_affordable(min(size, PAGE_SIZE) + 64 for _, size in found)
        self._db.executemany("DELETE FROM alerts WHERE rowid = ?", ((row,) for row, _ in found[:count]))
        return count > 0

    def quarantine_rows(self, stream: str, first: int, last: int) -> None:
        """Move damaged chunks out of the way of every task, bytes kept for a look."""
        values = {"stream": stream, "first": first, "last": last}
        for (size,) in self._db.execute(schema.SELECT_DAMAGED_SIZES, values).fetchall():
            self._budget.spend(size)
        self._db.execute(schema.COPY_TO_DAMAGED, values)
        self._db.execute(schema.DELETE_DAMAGED_CHUNKS, values)

    def trim_rows(
        self, stream: str, used_through: int, before_t: int, limit: int, received_by_us: int = _MAX_TIME_US
    ) -> TrimmedChunks | None:
        """Delete up to `limit` of the oldest chunks with rows up to `used_through` that begin before `before_t`.

        And that, where they came in this boot, came by `came_by_us` of its clock. Fewer where that would be too much
        for one transaction.
        """
        values = {"stream": stream, "used": used_through, "before": before_t, "limit": limit}
        values |= {"boot": self._boot, "came": received_by_us}
        found = self._db.execute(schema.SELECT_OLDEST_CHUNKS, values).fetchall()
        # A chunk's own page and its index entry; the pages it runs over to are not written.
        count = self._budget.spend_affordable(min(size + 64, PAGE_SIZE) + 64 for _, _, _, size in found)
        found = found[:count]
        if not found:
            return None
        self._db.executemany("DELETE FROM chunks WHERE id = ?", ((chunk,) for chunk, *_ in found))
        self.set_meta(schema.TRIMMED_THROUGH + stream, str(found[-1][2]))
        return TrimmedChunks(len(found), int(found[0][1]), int(found[-1][2]), sum(int(size) for *_, size in found))

    def finish(self) -> None:
        self.outbox.finish()
        if self._log_head is not None:
            self.set_meta("seq", str(self._log_head[0]))
            self.set_meta("digest", self._log_head[1])
            self.progress.log_head = self._log_head
        self.progress.needs_refresh |= self.commands.has_new_counter
