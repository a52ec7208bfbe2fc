"""Transaction of the device store: everything that can be written, inside one SQLite transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from outstation.device.store import retention, task_keys
from outstation.device.store.clock_segments import PRODUCER_TIME, QUALITIES, ClockSegments
from outstation.device.store.command_log import CommandLog
from outstation.device.store.label_store import LabelStore
from outstation.device.store.outbox import Outbox, OutboxMessage
from outstation.device.store.quota import PAGE_SIZE, Budget
from outstation.device.store.rows import Rows, pack_chunk
from outstation.device.store.tables import meta, schema
from outstation.device.store.watermark import TransactionProgress
from outstation.foundation.clock import ClockReading

# Category of all texts that get no code of their own.
OTHER_CATEGORY = "(other)"
# A used code's `last_row` is written this far ahead, so that few commits write it.
_CATEGORY_LEASE_ROWS = 4096
_MAX_TIME_US = 2**63 - 1
_MAX_ALERTS = 1000


class TrimmedChunks(msgspec.Struct, frozen=True):
    """Deleted chunks, with rows `first` to `last`."""

    chunks: int
    first: int
    last: int
    bytes: int


class Transaction:
    """Writable view of the store inside `Store.transaction`."""

    def __init__(self, db: sqlite3.Connection, boot: int, budget: Budget) -> None:
        self._db, self._boot, self._budget = db, boot, budget
        self.outbox = Outbox(db, budget)
        self.commands = CommandLog(db)
        self.labels = LabelStore(db, budget)
        self.progress = TransactionProgress()
        self._log_head: tuple[int, str] | None = None
        self._segments: ClockSegments | None = None

    @property
    def connection(self) -> sqlite3.Connection:
        """Connection for the queries of `labels`, which write nothing."""
        return self._db

    @property
    def remaining_bytes(self) -> int:
        return self._budget.remaining

    # --- streams and rows ---

    def declare_stream(self, stream: str, fields: str) -> None:
        self._db.execute(
            "INSERT INTO streams (name, fields, next_row) VALUES (?, ?, 1) "
            "ON CONFLICT (name) DO UPDATE SET fields = excluded.fields",
            (stream, fields),
        )
        self.progress.needs_refresh = True

    @property
    def segments(self) -> ClockSegments:
        """Segments of the wall clock in this boot."""
        if self._segments is None:
            self._segments = ClockSegments(self._db, self._boot)
        return self._segments

    def append(self, stream: str, rows: Rows, quality: str, *, segment: int = PRODUCER_TIME, boot_us: int = 0) -> int:
        """Append rows to a stream as one chunk and return the number of the last row.

        `segment`: the clock segment of the rows' times; `boot_us`: boot time of the commit.
        """
        stream_id, first = self._db.execute(
            "SELECT id, next_row FROM checked_streams WHERE name = ?", (stream,)
        ).fetchone()
        clock = QUALITIES.index(quality)
        packed = pack_chunk(rows, (stream_id, first, self._boot, clock, segment, boot_us))
        self._budget.spend(len(packed.data) + 100)
        self._db.execute(
            schema.INSERT_CHUNK,
            (
                *(stream_id, first, packed.n, packed.first_t, packed.time_bytes, packed.data, packed.crc),
                *(self._boot, clock, segment, boot_us),
            ),
        )
        self._db.execute(schema.UPDATE_NEXT_ROW, (first + packed.n, stream_id))
        self.progress.rows[stream] = int(first) + packed.n
        return int(first) + packed.n - 1

    def latest_time(self, stream: str) -> int | None:
        """Return the latest time of rows that came with one, epoch µs; None if there are none."""
        sql = "SELECT latest_t FROM checked_streams WHERE name = ?"
        (latest,) = self._db.execute(sql, (stream,)).fetchone() or (None,)
        return None if latest is None else int(latest)

    def set_latest_time(self, stream: str, latest_us: int) -> None:
        self._db.execute(schema.UPDATE_LATEST_TIME, (latest_us, stream))

    def next_row(self, stream: str) -> int:
        """Return the number that the next row of `stream` will get."""
        sql = "SELECT next_row FROM checked_streams WHERE name = ?"
        (number,) = self._db.execute(sql, (stream,)).fetchone() or (1,)
        return int(number)

    def assign_category_codes(
        self, stream: str, field: str, texts: Sequence[str], *, limit: int, last_row: int
    ) -> tuple[list[int], list[int]]:
        """Return the code of each text, and the indices of those that are `(other)`: the field has `limit` categories.

        A new text takes a new code, or one that no stored row uses. `last_row`: highest number of a row with the texts.
        """
        fetched = self._db.execute(schema.SELECT_CATEGORIES, {"stream": stream, "field": field}).fetchall()
        codes: dict[str, int] = {"": 0} | {value: code for value, code, _, _ in fetched}
        distinct = dict.fromkeys(texts)
        new = [text for text in distinct if text not in codes]
        # The last place is for all others.
        places = max(0, limit - len(codes) + (OTHER_CATEGORY in codes))
        written = {text: code for code, text in enumerate(new[:places], len(codes))}
        if len(new) > places:
            end, keep = len(codes) + len(written), distinct | {OTHER_CATEGORY: None}
            unused = {c: text for text, c, is_used, _ in fetched if not is_used and text not in keep}
            for text, code in zip(new[places:], unused, strict=False):
                del codes[unused[code]]
                written[text] = code
            if len(written) < len(new) and OTHER_CATEGORY not in codes:
                written[OTHER_CATEGORY] = end
        codes |= written
        other = codes.get(OTHER_CATEGORY, 0)
        used = {text if text in codes else OTHER_CATEGORY for text in distinct}
        written |= {text: code for text, code, _, last in fetched if text in used and last < last_row}
        for text, code in written.items():
            self._budget.spend(len(stream) + len(field) + len(text.encode()) + 16)
            through = last_row + _CATEGORY_LEASE_ROWS
            self._db.execute(schema.REPLACE_CATEGORY, (stream, field, code, text, through))
        return [codes.get(text, other) for text in texts], [i for i, text in enumerate(texts) if text not in codes]

    def quarantine_rows(self, stream: str, first: int, last: int) -> None:
        """Move damaged chunks to table `quarantined_rows`, for inspection."""
        values = {"stream": stream, "first": first, "last": last}
        for (size,) in self._db.execute(schema.SELECT_CHUNK_SIZES, values).fetchall():
            self._budget.spend(size)
        self._db.execute(schema.COPY_TO_QUARANTINE, values)
        self._db.execute(schema.DELETE_CHUNKS, values)

    def trim_rows(
        self, stream: str, used_through: int, before_t: int, limit: int, received_by_us: int = _MAX_TIME_US
    ) -> TrimmedChunks | None:
        """Delete up to `limit` of the oldest chunks with rows up to `used_through` that begin before `before_t`.

        Chunks of this boot must also have been committed by boot time `received_by_us`. Deletes fewer if one
        transaction cannot hold them.
        """
        values = {"stream": stream, "used": used_through, "before": before_t, "limit": limit}
        values |= {"boot": self._boot, "received_by": received_by_us}
        chunks = self._db.execute(schema.SELECT_OLDEST_CHUNKS, values).fetchall()
        # A chunk's own page and its index entry: overflow pages are not written.
        count = self._budget.spend_affordable(min(size + 64, PAGE_SIZE) + 64 for _, _, _, size in chunks)
        chunks = chunks[:count]
        if not chunks:
            return None
        self._db.executemany("DELETE FROM chunks WHERE id = ?", ((chunk,) for chunk, *_ in chunks))
        self.set_meta(schema.TRIMMED_THROUGH + stream, str(chunks[-1][2]))
        return TrimmedChunks(len(chunks), int(chunks[0][1]), int(chunks[-1][2]), sum(int(size) for *_, size in chunks))

    # --- sources and tasks ---

    def set_source_position(self, source: str, item: str, position: int, max_items: int | None = None) -> None:
        """Save how far `source` has read `item`; of more than `max_items` items the last updated ones stay."""
        self._budget.spend(2 * (len(source) + len(item)) + 30)
        values = {"source": source, "item": item, "position": position, "max_items": max_items}
        if not self._db.execute(schema.UPDATE_SOURCE_POSITION, values).rowcount:
            self._db.execute(schema.INSERT_SOURCE_POSITION, values)
            if max_items is not None:
                self._db.execute(schema.PRUNE_SOURCE_POSITIONS, values)

    def source_position(self, source: str, item: str) -> int:
        """Return how far `source` has read `item`; 0 before its first position."""
        query = "SELECT position FROM checked_source_positions WHERE source = ? AND item = ?"
        (position,) = self._db.execute(query, (source, item)).fetchone() or (0,)
        return int(position)

    def delete_source_position(self, source: str, item: str) -> None:
        self._db.execute("DELETE FROM source_positions WHERE source = ? AND item = ?", (source, item))

    def cursor(self, task: str) -> int:
        """Return the last row that `task` consumed; 0 before its first batch."""
        (row,) = self._db.execute("SELECT row FROM checked_cursors WHERE task = ?", (task,)).fetchone() or (0,)
        return int(row)

    def advance_cursor(self, task: str, first: int, last: int) -> None:
        """Move the cursor of `task` to `last`; its first batch also saves `first` as where the task began."""
        self._db.execute(
            "INSERT INTO cursors (task, row, first_row) VALUES (?, ?, ?) "
            "ON CONFLICT (task) DO UPDATE SET row = excluded.row",
            (task, last, first),
        )
        self.progress.cursors[task] = last

    def save_state(self, task: str, name: str, value: bytes) -> None:
        """Save a value under a name of `task_keys`."""
        self._budget.spend(2 * (len(task) + len(name)) + len(value) + 32)
        self._db.execute("INSERT OR REPLACE INTO task_state (task, name, value) VALUES (?, ?, ?)", (task, name, value))

    def load_state(self, task: str, name: str) -> bytes | None:
        sql = "SELECT value FROM checked_task_state WHERE task = ? AND name = ?"
        value: bytes | None
        (value,) = self._db.execute(sql, (task, name)).fetchone() or (None,)
        return value

    def delete_state(self, task: str, name: str) -> None:
        self._db.execute("DELETE FROM task_state WHERE task = ? AND name = ?", (task, name))

    def rename_state(self, task: str, name: str, new: str) -> None:
        """Move a value, if there is one, to another name that has none."""
        sql = "SELECT length(value) FROM task_state WHERE task = ? AND name = ?"
        (size,) = self._db.execute(sql, (task, name)).fetchone() or (None,)
        if size is not None:
            self._budget.spend(2 * (len(task) + len(new)) + int(size) + 32)
            self._db.execute("UPDATE task_state SET name = ? WHERE task = ? AND name = ?", (new, task, name))

    # --- messages ---

    def log_head(self) -> tuple[int, str]:
        """Return the last seq and the digest of its payload; (0, "") in a new log."""
        if self._log_head is None:
            self._log_head = int(self.get_meta("seq", "0")), self.get_meta("digest", "")
        return self._log_head

    def enqueue(self, message: OutboxMessage, digest: str) -> None:
        """Add the next message of the log; `digest` is of its payload."""
        self._log_head = message.seq, digest
        self.outbox.add(message)

    def record_alert(self, alert: Mapping[str, Any]) -> None:
        """Store an alert for `outstation status`: the newest thousand, and every open one of a task."""
        body = json.dumps(alert)
        if alert.get("task") is not None and alert.get("alert") in schema.OPEN_ALERT_KINDS:
            if alert["state"] == "raised":
                self.save_state(alert["task"], task_keys.OPEN_ALERT_PREFIX + alert["id"], body.encode())
            else:
                self.delete_state(alert["task"], task_keys.OPEN_ALERT_PREFIX + alert["id"])
        self._budget.spend(len(body.encode()))
        self._db.execute("INSERT INTO alerts (body) VALUES (?)", (body,))
        self._db.execute(f"DELETE FROM alerts WHERE rowid <= (SELECT max(rowid) FROM alerts) - {_MAX_ALERTS}")

    def delete_old_alerts(self) -> bool:
        """Delete some of the oldest stored alerts, but not the newest fifty. Return False if there were none."""
        rows = self._db.execute(schema.SELECT_OLD_ALERTS).fetchall()
        count = self._budget.spend_affordable(min(size, PAGE_SIZE) + 64 for _, size in rows)
        self._db.executemany("DELETE FROM alerts WHERE rowid = ?", ((row,) for row, _ in rows[:count]))
        return count > 0

    # --- single values ---

    def increment_counter(self, name: str, n: int) -> None:
        if n:
            self._db.execute(schema.INCREMENT_COUNTER, (name, n))

    def counter(self, name: str) -> int:
        (n,) = self._db.execute("SELECT n FROM checked_counters WHERE name = ?", (name,)).fetchone() or (0,)
        return int(n)

    def get_meta(self, key: str, default: str) -> str:
        return meta.get(self._db, key, default)

    def set_meta(self, key: str, value: str) -> None:
        self._budget.spend(len(key) + len(value) + 32)
        meta.put(self._db, key, value)

    def delete_meta(self, key: str) -> None:
        meta.delete(self._db, key)

    def raise_time_floor(self, wall_us: int) -> None:
        """Record that this time has passed, as a source with a correct clock reported."""
        meta.put(self._db, "time floor", str(max(int(meta.get(self._db, "time floor", "0")), wall_us)))

    def uptime_s(self, now: ClockReading) -> float:
        """Return the seconds that the device was on, over all boots."""
        return retention.uptime_s(self.get_meta(retention.UPTIME, ""), self._boot, now)

    def save_uptime(self, now: ClockReading) -> None:
        """Save the uptime, from which it continues after a loss of power."""
        self.set_meta(retention.UPTIME, retention.uptime_json(self._boot, now, self.uptime_s(now)))

    def finish(self) -> None:
        """Write what was gathered during the transaction: backlog and log head."""
        self.outbox.finish()
        if self._log_head is not None:
            self.set_meta("seq", str(self._log_head[0]))
            self.set_meta("digest", self._log_head[1])
            self.progress.log_head = self._log_head
        self.progress.labels = self.labels.stored
        self.progress.needs_refresh |= self.commands.has_new_counter
