"""All SQL of the device: readings, cursors, drift state and outgoing messages in one SQLite file.

One process owns the file (a lock file says so) and one connection writes; everyone else opens read-only. Each write is
one transaction: when `transaction()` returns, it is on the disk; when it raises, nothing of it is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlite_utils

from agent import clock
from agent.config import Field, Stream
from agent.device import schema
from agent.device.rows import Packed, Rows, concatenate, unpack
from agent.device.transaction import Pending, Transaction
from agent.errors import StorageBusy, StorageError, StorageFull, UsageError

PAGE = 4096
# Intake stops here, so that results, acknowledgements and deletions always find room.
INTAKE_SHARE = 0.9
_EMPTY = Rows(np.zeros(0, np.int64), ())


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows `first`…`last` of a stream (row numbers count from 1); `lost` where their chunk is damaged."""

    first: int
    rows: Rows
    lost: str | None = None
    lost_last: int = 0

    @property
    def last(self) -> int:
        return self.lost_last if self.lost else self.first + len(self.rows) - 1


class Store:
    """The open store of a device. Thread-safe: every call takes the one lock."""

    def __init__(self, folder: Path, *, max_size: int = 2**30, read_only: bool = False) -> None:
        self.path = folder / "outstation.db"
        self._lock = threading.RLock()
        self._owner: int | None = None
        self.boot = 0
        if not read_only:
            self._owner = _own(folder)
        with contextlib.ExitStack() as undo:
            undo.callback(self._disown)
            self._db = _connect(self.path, read_only, max_size)
            undo.callback(self._db.close)
            if not read_only:
                self._begin_boot()
            self.log_id = self.meta("log", "")
            self.boot = int(self.meta("boot", "0"))
            undo.pop_all()

    # --- transactions ---

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises StorageFull, StorageBusy or StorageError.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                tx = Transaction(self._db, self.boot)
                yield tx
                tx.finish()
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                raise _storage_error(self.path, error) from error
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    # --- reading ---

    def meta(self, key: str, default: str) -> str:
        row = self._one("SELECT value FROM meta WHERE key = ?", key)
        return default if row is None else str(row[0])

    def last_row(self, stream: str) -> int:
        """The number of the newest row of `stream`; 0 where there is none."""
        row = self._one("SELECT next_row - 1 FROM streams WHERE name = ?", stream)
        return int(row[0]) if row else 0

    def first_row(self, stream: str) -> int:
        """The number of the oldest row still kept, or of the next row to come."""
        row = self._one("SELECT min(first_row) FROM chunks JOIN streams s ON s.id = stream WHERE s.name = ?", stream)
        return int(row[0]) if row and row[0] is not None else self.last_row(stream) + 1

    def cursor(self, task: str) -> int | None:
        """The last row `task` consumed; None before its first batch."""
        row = self._one("SELECT row FROM cursors WHERE task = ?", task)
        return int(row[0]) if row else None

    def first_consumed(self, task: str) -> int | None:
        row = self._one("SELECT first FROM cursors WHERE task = ?", task)
        return int(row[0]) if row else None

    def state(self, task: str, name: str) -> bytes | None:
        row = self._one("SELECT value FROM state WHERE task = ? AND name = ?", task, name)
        return bytes(row[0]) if row else None

    def counters(self) -> dict[str, int]:
        return {str(name): int(n) for name, n in self._all("SELECT name, n FROM counters")}

    def mark(self, source: str, item: str) -> int:
        """How far `source` has got with `item` (a file, a client), as committed with its rows; 0 at first."""
        row = self._one("SELECT position FROM marks WHERE source = ? AND item = ?", source, item)
        return int(row[0]) if row else 0

    def categories(self, stream: str, field: str) -> list[str]:
        """Category texts by code; code 0 is missing."""
        found = self._all("SELECT value FROM categories WHERE stream = ? AND field = ? ORDER BY code", stream, field)
        return ["", *(str(row[0]) for row in found)]

    def take(self, stream: str, fields: Sequence[Field], after: int, limit: int) -> Batch | None:
        """Up to about `limit` rows after row `after`, as contiguous packed columns; None where there are none.

        Cost depends on the rows taken, not on the backlog. A chunk that is damaged comes alone, with `lost` set.
        """
        parts: list[Rows] = []
        first, count = after + 1, 0
        with self._lock, _errors(self.path):
            for first_row, *packed in self._db.execute(schema.TAKE, {"stream": stream, "after": after}):
                try:
                    rows = unpack(Packed(*packed), fields)
                except ValueError as damage:
                    if parts:
                        break
                    return Batch(first, _EMPTY, str(damage), self._before_next(stream, int(first_row)))
                skip = first + count - int(first_row)
                if skip < 0:
                    # Rows between were damaged and set aside; the caller sees them as lost.
                    if parts:
                        break
                    return Batch(first, _EMPTY, "rows were set aside as damaged", int(first_row) - 1)
                parts.append(rows.slice(skip, min(len(rows), skip + limit - count)))
                count += len(parts[-1])
                if count >= limit:
                    break
        return Batch(first, concatenate(parts)) if parts else None

    def _before_next(self, stream: str, first_row: int) -> int:
        """The last row of the chunk at `first_row`, by what comes after it: its own count may be damaged too."""
        row = self._one(
            "SELECT min(first_row) - 1 FROM chunks JOIN streams s ON s.id = stream WHERE s.name = ? AND first_row > ?",
            stream,
            first_row,
        )
        return int(row[0]) if row and row[0] is not None else self.last_row(stream)

    def unsent(self, after: int, limit: int) -> list[Pending]:
        """Messages of the outbox with seq > `after`, in order."""
        found = self._all(
            "SELECT seq, topic, payload, jws, time FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", after, limit
        )
        return [Pending(*row) for row in found]

    def pending(self, seqs: Sequence[int]) -> list[Pending]:
        """Those of `seqs` that are still in the outbox."""
        marks = ",".join("?" * len(seqs))
        found = self._all(
            f"SELECT seq, topic, payload, jws, time FROM outbox WHERE seq IN ({marks}) ORDER BY seq", *seqs
        )
        return [Pending(*row) for row in found]

    def outbox_size(self) -> tuple[int, int]:
        """Messages waiting, and the last seq ever given."""
        row = self._one("SELECT count(*) FROM outbox")
        return (int(row[0]) if row else 0), int(self.meta("seq", "0"))

    def used_bytes(self) -> int:
        """Bytes of pages in use, free ones not counted."""
        pages = int((self._one("PRAGMA page_count") or (0,))[0])
        free = int((self._one("PRAGMA freelist_count") or (0,))[0])
        return (pages - free) * PAGE

    def max_bytes(self) -> int:
        return int((self._one("PRAGMA max_page_count") or (0,))[0]) * PAGE

    def kept_span_us(self) -> int:
        """Time from the oldest chunk kept to the newest, µs."""
        row = self._one(
            "SELECT (SELECT first_t FROM chunks ORDER BY id DESC LIMIT 1) - "
            "(SELECT first_t FROM chunks ORDER BY id LIMIT 1)"
        )
        return int(row[0]) if row and row[0] is not None else 0

    def alerts(self, limit: int) -> list[dict[str, Any]]:
        """The newest alerts, newest first."""
        found = self._all("SELECT body FROM alerts ORDER BY rowid DESC LIMIT ?", limit)
        return [json.loads(row[0]) for row in found]

    # --- opening and closing ---

    def declare(self, streams: dict[str, Stream]) -> None:
        """Make the streams known. Raises UsageError where stored rows have other fields than the config says."""
        for name, stream in streams.items():
            wanted = [[f.name, f.type] for f in stream.fields]
            row = self._one("SELECT fields, next_row FROM streams WHERE name = ?", name)
            if row is None or (row[1] == 1 and json.loads(row[0]) != wanted):
                with self.transaction() as tx:
                    tx.declare(name, json.dumps(wanted))
            elif json.loads(row[0]) != wanted:
                raise UsageError(
                    f"streams.{name}.fields: the store at {self.path} holds rows with fields {row[0]}; "
                    "give the changed stream a new name, so that no row is read as something else"
                )

    def claim(self, fleet: str, device: str) -> None:
        """Bind the store to a device. Raises UsageError where it is another's: its messages are signed for that one."""
        name = f"{fleet}/{device}"
        owner = self.meta("device", name)
        if owner != name:
            raise UsageError(
                f"device.id: the store at {self.path} is of {owner}, whose signed messages wait in it; "
                "give the new device a data_dir of its own"
            )
        with self.transaction() as tx:
            tx.set_meta("device", name)

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._disown()

    def _begin_boot(self) -> None:
        """Count this boot, once, and give a new store its log id."""
        with self.transaction() as tx:
            if not self.meta("log", ""):
                tx.set_meta("log", str(uuid.uuid4()))
            this_boot = clock.boot_id()
            if self.meta("boot_id", "") != this_boot or not this_boot:
                tx.set_meta("boot_id", this_boot)
                tx.set_meta("boot", str(int(self.meta("boot", "0")) + 1))

    def _disown(self) -> None:
        if self._owner is not None:
            os.close(self._owner)
            self._owner = None

    def _one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        with self._lock, _errors(self.path):
            row: tuple[Any, ...] | None = self._db.execute(sql, values).fetchone()
            return row

    def _all(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock, _errors(self.path):
            return self._db.execute(sql, values).fetchall()


def _connect(path: Path, read_only: bool, max_size: int) -> sqlite3.Connection:
    with _errors(path):
        if read_only:
            return sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=5.0)
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            for pragma, wanted in schema.pragmas(max_size // PAGE):
                connection.execute(f"PRAGMA {pragma}")
                if wanted is not None:
                    got = str(connection.execute(f"PRAGMA {pragma.split('=')[0]}").fetchone()[0])
                    if got != wanted:
                        raise StorageError(
                            f"{path}: PRAGMA {pragma} gives {got!r}; acknowledged rows would not be safe"
                        )
            schema.migrations.apply(sqlite_utils.Database(connection, execute_plugins=False))
        except BaseException:
            connection.close()
            raise
        return connection


def _own(folder: Path) -> int:
    """Hold the folder's lock file for as long as this process lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}; check [device] data_dir, and who may write there") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise StorageBusy(
            f"{folder}: another outstation (process {owner}) uses this data folder; stop it first"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise _storage_error(path, error) from error


def _storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"{path}: the quota ([buffer] max_size) or the disk is full")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageBusy(f"{path}: locked by another process")
    return StorageError(f"{path}: {name}: {error}")
