"""The device store: readings, cursors, task state and outgoing messages in one SQLite file.

One process opens it to write (`recovery.open`), through one connection; all others open it read-only. Each write is one
transaction: when `transaction()` returns, it is on the disk; when it raises, nothing of it is there.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.store import retention, row_batch, task_keys, watermark
from outstation.device.store.journal import Journal, JournalView
from outstation.device.store.outbox import MESSAGE_COLUMNS, Backlog, OutboxMessage, unacknowledged_ranges
from outstation.device.store.quota import PAGE_SIZE, Quota, QuotaEnforcer
from outstation.device.store.retention import AcknowledgedSeqs
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import MAX_CODE, lost_category
from outstation.device.store.small_commits import SmallCommits
from outstation.device.store.tables import meta, row_crc, schema
from outstation.device.store.tables.sqlite_errors import SALVAGED_LATER, connect_read_only, translate_errors
from outstation.device.store.transaction import Transaction
from outstation.device.store.watermark import Watermark
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageBusy, StorageDamaged, StorageError, StorageFull, UsageError
from outstation.protocol.wire.log_chain import digest

T = TypeVar("T")

DATABASE = "outstation.db"

# Intake stops here, so that results, acknowledgements and deletions always find room.
INTAKE_SHARE = 0.9
_SIMULATED_CACHE_KIB = 256


class WriteAccess(Protocol):
    """The lock and the watermark that the writing process holds beside its connection."""

    watermark: Watermark

    def record_damage(self, cause: str) -> None:
        """Have the database salvaged at the next start."""
        ...

    def require_in_place(self, db: sqlite3.Connection, fold: Callable[[], None]) -> None:
        """Raise StorageMoved or StorageError if the store's paths lead elsewhere by now.

        `fold` commits the small commits to the database.
        """
        ...

    def close(self, db: sqlite3.Connection, *, is_intact: bool) -> None:
        """Close the connection and release the folder. An intact database is not checked at the next start."""
        ...


class Store:
    """Open store of a device. Thread-safe: every call takes the one lock."""

    def __init__(
        self,
        path: Path,
        db: sqlite3.Connection,
        quota: QuotaEnforcer,
        writer: WriteAccess | None,
        journal: Journal | None = None,
        view: JournalView | None = None,
    ) -> None:
        self.path, self.quota = path, quota.quota
        self._db, self._quota_enforcer, self._writer = db, quota, writer
        self._commits = SmallCommits(db, quota, journal)
        self._view = view
        self._lock = threading.RLock()
        self._is_intact = True
        self.log_id, self.boot = self.get_meta("log", ""), int(self.get_meta("boot", "0"))

    @classmethod
    def open_read_only(cls, folder: Path, *, max_size: int = 2**30) -> Store:
        """Open the store in `folder` beside the process that writes.

        Raises StorageError if there is none, or if it is a version's with other columns.
        """
        path = folder / DATABASE
        db = connect_read_only(path)
        try:
            with translate_errors(path):
                steps = schema.applied_steps(db)
                if schema.is_newer(steps):
                    raise StorageError(f"{path}: made by a newer version of outstation; use that version to read it")
                if damage := schema.find_damage(db, steps):
                    raise StorageDamaged(f"{path}: {damage}; {SALVAGED_LATER}")
                if schema.columns(steps) != schema.columns(schema.STEPS):
                    problem = "made by an older version of outstation; the agent migrates it when it starts next"
                    raise StorageError(f"{path}: {problem}, so restart the agent")
                row_crc.install(db, writes=False)
                if damage := row_crc.find_damage(db, large=False):
                    raise StorageDamaged(f"{path}: {damage}; {SALVAGED_LATER}")
            enforcer = QuotaEnforcer(path, Quota.from_max_size(max_size))
            return cls(path, db, enforcer, None, view=JournalView(folder, db))
        except BaseException:
            db.close()
            raise

    # --- transactions ---

    @contextlib.contextmanager
    def transaction(self, *, vital: bool = False, batch: bool = False, small: bool = False) -> Iterator[Transaction]:
        """Run one transaction: commit when the block ends, roll back when it raises.

        A `vital` transaction, which makes room or records a delivery, may use the reserve on a full disk. A `batch`
        may fill a part of the reserved pages. A `small` one is committed to the journal if that can hold it. Raises
        StorageFull, StorageBusy or StorageError.
        """
        with self._lock, self._translate_errors():
            self.require_in_place()
            budget = self._commits.begin(vital=vital, small=small)
            try:
                free_pages = self._quota_enforcer.free_pages(self._db)
                tx = Transaction(self._db, self.boot, budget)
                yield tx
                tx.finish()
                if not vital:
                    self._quota_enforcer.require_reserved_pages(self._db, free_pages, batch=batch)
                self._commits.commit()
            except BaseException:
                self._commits.roll_back()
                raise
            if self._writer is not None:
                self._writer.watermark.update(self._db, tx.progress)

    def require_in_place(self) -> None:
        """Raise StorageMoved if the data folder is no longer the one opened, StorageError if a file of it is not."""
        with self._lock, self._translate_errors():
            if self._writer is not None:
                self._writer.require_in_place(self._db, self._commits.fold)

    def fold(self) -> None:
        """Commit to the database what is only in the journal, for a reader with a connection of its own.

        Raises StorageFull, StorageError.
        """
        with self._lock, self._translate_errors():
            self.require_in_place()
            self._commits.fold()

    def exclusive(self) -> contextlib.AbstractContextManager[object]:
        """Keep other threads from reading and writing; transactions of this thread may run inside."""
        return self._lock

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Keep other threads away, and let queries include what is only in the journal."""
        with self._lock, self._translate_errors():
            if self._view is not None:
                self._view.refresh()
            self._commits.require_complete()
            yield

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Translate SQLite's errors, and have a damaged database checked at the next start."""
        try:
            with translate_errors(self.path):
                yield
        except (StorageFull, StorageBusy):
            raise
        except StorageError as error:
            self._is_intact = False
            if isinstance(error, StorageDamaged) and self._writer is not None:
                self._writer.record_damage(str(error))
            raise

    # --- reading ---

    def get_meta(self, key: str, default: str) -> str:
        return self.query(meta.get, key, default)

    def uptime_s(self, now: ClockReading) -> float:
        """Return the seconds that the device was on, over all boots."""
        return retention.uptime_s(self.get_meta(retention.UPTIME, ""), self.boot, now)

    def last_row(self, stream: str) -> int:
        """Return the number of the newest row of `stream`; 0 if there is none."""
        return self.query(row_batch.last_row, stream)

    def first_row(self, stream: str) -> int:
        """Return the number of the oldest stored row, or of the next row to come."""
        first = self._fetch_scalar(
            "SELECT first_row FROM chunks WHERE stream = (SELECT id FROM checked_streams WHERE name = ?) "
            "ORDER BY first_row LIMIT 1",
            stream,
        )
        return self.last_row(stream) + 1 if first is None else int(first)

    def find_row_near(self, stream: str, after: int, begin_us: int, end_us: int) -> int | None:
        """Return the first row after `after` in a chunk that may hold times from `begin_us` to before `end_us`.

        None if there is none. Other chunks are passed over without reading their rows.
        """
        values = {"stream": stream, "after": after, "begin": begin_us, "end": end_us}
        with self._reading():
            (row,) = self._db.execute(schema.SELECT_ROW_NEAR_TIME, values).fetchone() or (None,)
        return None if row is None else int(row)

    def cursor(self, task: str) -> int | None:
        """Return the last row that `task` consumed; None before its first batch."""
        row: int | None = self._fetch_scalar("SELECT row FROM checked_cursors WHERE task = ?", task)
        return row

    def position(self, task: str, stream: str) -> int:
        """Return the row of `stream` after which `task` continues: its cursor, or the row before the oldest one."""
        cursor = self.cursor(task)
        return self.first_row(stream) - 1 if cursor is None else cursor

    def first_consumed(self, task: str) -> int | None:
        row: int | None = self._fetch_scalar("SELECT first_row FROM checked_cursors WHERE task = ?", task)
        return row

    def load_state(self, task: str, name: str) -> bytes | None:
        value = self._fetch_scalar("SELECT value FROM checked_task_state WHERE task = ? AND name = ?", task, name)
        return None if value is None else bytes(value)

    def tasks_with_state(self, name: str) -> list[str]:
        """Return the tasks, also those of an earlier config, that have a state of this name."""
        rows = self._fetch_all("SELECT task FROM checked_task_state WHERE name = ? ORDER BY task", name)
        return [task for (task,) in rows]

    def counters(self) -> dict[str, int]:
        return {str(name): int(n) for name, n in self._fetch_all("SELECT name, n FROM checked_counters")}

    def source_position(self, source: str, item: str) -> int:
        """Return how far `source` has read `item` (a file, a client), as committed with its rows; 0 at first."""
        sql = "SELECT position FROM checked_source_positions WHERE source = ? AND item = ?"
        return int(self._fetch_scalar(sql, source, item) or 0)

    def categories(self, stream: str, field: str) -> list[str]:
        """Return category texts by code; code 0 is a missing value."""
        sql = "SELECT code, value FROM checked_categories WHERE stream = ? AND field = ?"
        texts = {int(code): str(value) for code, value in self._fetch_all(sql, stream, field)}
        # A record that a damaged journal lacks may have held any text; the next start repairs them.
        last = MAX_CODE if self._view is not None and not self._view.is_complete else max(texts, default=0)
        return ["", *(texts.get(code) or lost_category(code) for code in range(1, min(last, MAX_CODE) + 1))]

    def read_rows(self, stream: str, fields: Sequence[FieldConfig], after: int, limit: int) -> RowBatch | None:
        """Read up to about `limit` rows after row `after`; None if there are none. See `row_batch.read_batch`."""
        rows = self.query(row_batch.read_batch, stream, fields, after, limit)
        return None if rows is None else rows.join_small_parts()

    def unacknowledged_messages(self, after: int, limit: int) -> list[OutboxMessage]:
        """Return unacknowledged messages with seq > `after`, in order."""
        sql = f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
        rows: list[tuple[Any, ...]] = []
        for first, last in unacknowledged_ranges(self.acknowledged()):
            if last > after and len(rows) < limit:
                rows += self._fetch_all(sql, max(first, after + 1), last, limit - len(rows))
        return [OutboxMessage.from_row(row) for row in rows]

    def recent_messages(
        self, kind: str, task: str | None, limit: int, *, after: int | None = None
    ) -> list[OutboxMessage]:
        """Return the newest stored messages of a task, or of all tasks, delivered or not, damaged ones too, in order.

        With `after`, return the first ones after that seq instead.
        """
        order = "DESC" if after is None else "ASC"
        sql = f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq > ? AND topic GLOB ? ORDER BY seq {order} LIMIT ?"
        rows = self._fetch_all(sql, after or 0, f"*/*/*/{kind}/{task or '*'}", limit)
        messages = [OutboxMessage.from_row(row) for row in rows]
        return messages if after is not None else messages[::-1]

    def newest_by_topic(self, after: int) -> list[bytes]:
        """Return the newest stored payload of each topic with seq > `after`, oldest first, without damaged ones."""
        sql = f"""
            SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq IN (SELECT max(seq) FROM outbox WHERE seq > ? GROUP BY topic)
            ORDER BY seq
        """
        messages = map(OutboxMessage.from_row, self._fetch_all(sql, after))
        return [message.payload for message in messages if message.intact]

    def pending_messages(self, seqs: Sequence[int]) -> list[OutboxMessage]:
        """Return the messages among `seqs` that are in the outbox and not acknowledged."""
        acknowledged = self.acknowledged()
        seqs = [seq for seq in seqs if seq not in acknowledged]
        sql = f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq IN ({','.join('?' * len(seqs))}) ORDER BY seq"
        return [OutboxMessage.from_row(row) for row in self._fetch_all(sql, *seqs)]

    def log_head(self) -> tuple[int, str]:
        """Return the last seq and its digest, of one moment; (0, "") in a new log."""
        while True:
            seq, digest = self.get_meta("seq", "0"), self.get_meta("digest", "")
            # Another process may have written a message in between.
            if seq == self.get_meta("seq", "0"):
                return int(seq), digest

    def message_digest(self, seq: int) -> str | None:
        """Return the digest of message `seq`; None if it is not known here."""
        # Under one lock: a message committed in between would have its digest returned for this one.
        with self._lock:
            if seq == int(self.get_meta("seq", "0")):
                return self.get_meta("digest", "")
        sql = f"SELECT {MESSAGE_COLUMNS} FROM outbox WHERE seq IN (?, ?) ORDER BY seq"
        for message in (OutboxMessage.from_row(row) for row in self._fetch_all(sql, seq, seq + 1)):
            if message.intact:
                return digest(message.payload) if message.seq == seq else str(json.loads(message.payload)["prev"])
        return None

    def outbox_size(self) -> tuple[int, int]:
        """Return the number of waiting messages, and the last seq."""
        return self.backlog().messages, int(self.get_meta("seq", "0"))

    def backlog(self) -> Backlog:
        """Return the number and bytes of unacknowledged messages."""
        return Backlog.from_text(self.get_meta(retention.BACKLOG, ""))

    def acknowledged(self) -> AcknowledgedSeqs:
        """Return the seqs that the collector, or with delivery = "broker" the broker, is known to have."""
        return AcknowledgedSeqs.from_json(self.get_meta(retention.ACKNOWLEDGED, ""))

    def used_bytes(self) -> int:
        """Return the bytes of pages in use, without free ones."""
        pages = int(self._fetch_scalar("PRAGMA page_count") or 0)
        free = int(self._fetch_scalar("PRAGMA freelist_count") or 0)
        return (pages - free) * PAGE_SIZE

    def limit_bytes(self) -> int:
        """Return how many bytes the pages can use: the quota, or the room on the disk if that is less."""
        self.require_in_place()
        return self._quota_enforcer.limit_bytes(int(self._fetch_scalar("PRAGMA page_count") or 0))

    def is_disk_full(self) -> bool:
        """Return True if the disk lacks the room without which only vital transactions run. Raises StorageError."""
        with self._lock:
            try:
                self._quota_enforcer.check_disk_space(vital=False)
            except StorageFull:
                return True
            return False

    def recent_alerts(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest alerts, newest first."""
        rows = self._fetch_all("SELECT body FROM checked_alerts ORDER BY rowid DESC LIMIT ?", limit)
        return [json.loads(body) for (body,) in rows]

    def alerts_after(self, rowid: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Return (rowid, alert) of the stored alerts after a rowid, oldest first."""
        rows = self._fetch_all(
            "SELECT rowid, body FROM checked_alerts WHERE rowid > ? ORDER BY rowid LIMIT ?", rowid, limit
        )
        return [(number, json.loads(body)) for number, body in rows]

    def open_alerts(self, task: str) -> list[dict[str, Any]]:
        """Return the open alerts about a task's data, model and quality, in order of time."""
        rows = self._fetch_all(schema.SELECT_OPEN_ALERTS, task, task_keys.OPEN_ALERT_PREFIX)
        return sorted((json.loads(body) for (body,) in rows), key=lambda alert: str(alert["time"]))

    def query(self, query: Callable[..., T], *values: Any) -> T:
        """Run a query that takes the connection first, as those of `labels` do."""
        with self._reading():
            return query(self._db, *values)

    # --- opening and closing ---

    def declare_streams(self, streams: dict[str, StreamConfig]) -> None:
        """Declare the streams of the config. Raises UsageError if stored rows have other fields."""
        for name, stream in streams.items():
            fields = [[f.name, f.type] for f in stream.fields]
            row = self._fetch_one("SELECT fields, next_row FROM checked_streams WHERE name = ?", name)
            declared, next_row = row or ("", 1)
            if row is not None and watermark.matches_fields(declared, fields):
                if watermark.is_placeholder(declared):
                    self._declare_stream(name, fields)
            elif next_row == 1 or (watermark.is_placeholder(declared) and self.first_row(name) == next_row):
                self._declare_stream(name, fields)
            else:
                raise UsageError(
                    f"streams.{name}.fields: the store at {self.path} holds rows with fields {declared}; "
                    "give the changed stream a new name, so that no row is read with the wrong fields"
                )

    def _declare_stream(self, name: str, fields: object) -> None:
        with self.transaction(vital=True) as tx:
            tx.declare_stream(name, json.dumps(fields))

    def bind_device(self, fleet: str, device: str) -> None:
        """Bind the store to a device. Raises UsageError if its messages are signed for another one."""
        name = f"{fleet}/{device}"
        owner = self.get_meta("device", "")
        if owner == name:
            return
        if owner:
            raise UsageError(
                f"device.id: the store at {self.path} belongs to {owner}, whose signed messages wait in it; "
                f"`outstation join FILE` moves it to {name}, or give the new device a data_dir of its own"
            )
        with self.transaction(vital=True) as tx:
            tx.set_meta("device", name)

    def begin_boot(self, repair: Callable[[sqlite3.Connection], object]) -> None:
        """Count this boot, once, and give a new store its log id; `repair` runs first in the same transaction."""
        with self.transaction(vital=True) as tx:
            tx.progress.needs_refresh = True
            repair(self._db)
            if not self.get_meta("log", ""):
                tx.set_meta("log", str(uuid.uuid4()))
            this_boot = clock.boot_id()
            if self.get_meta("boot_id", "") != this_boot or not this_boot:
                tx.set_meta("boot_id", this_boot)
                tx.set_meta("boot", str(int(self.get_meta("boot", "0")) + 1))
        self.log_id, self.boot = self.get_meta("log", ""), int(self.get_meta("boot", "0"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def simulate_disk(self, size: int, free: int) -> None:
        """Let the store see a file system of `size` bytes with `free` ones, instead of the real one."""
        self._quota_enforcer.simulated_disk = (size, free)

    def begin_simulation(self) -> None:
        """Flush nothing, and use little memory; before any other use.

        A simulated power cut keeps what the kernel has; a thousand caches would fill the memory.
        """
        for pragma in ("synchronous=OFF", f"cache_size=-{_SIMULATED_CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}")

    def close(self) -> None:
        with self._lock:
            if self._writer is None:
                self._db.close()
            else:
                try:
                    self._commits.require_complete()
                except (StorageError, sqlite3.Error, MemoryError):
                    # The small commits are in the journal for the next start.
                    self._is_intact = False
                self._writer.close(self._db, is_intact=self._is_intact)
                self._writer = None
            self._commits.close()
            self._quota_enforcer.close()

    def _fetch_one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with self._reading():
            row: tuple[Any, ...] | None = self._db.execute(sql, values).fetchone()
            return row

    def _fetch_scalar(self, sql: str, *values: Any) -> Any:
        with self._reading():
            (value,) = self._db.execute(sql, values).fetchone() or (None,)
            return value

    def _fetch_all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._db.execute(sql, values).fetchall()
