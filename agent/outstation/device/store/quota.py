"""Storage quota: `[buffer] max_size` divided between database pages, write-ahead log, its index and a disk reserve.

The quota holds to the byte:
- outstation.db grows to `database_bytes` and no further (max_page_count); the last `reserved_pages` are for vital
  transactions, because deleting needs pages, too; a batch may fill a third of them, because rows can be deleted only
  after a batch has consumed them
- outstation.db-wal is checkpointed before a transaction if more than a quarter of it is used; a transaction counts what
  it writes and is refused before it would exceed `wal_bytes`
- outstation.db-shm is one piece of 32 KiB for a log of up to 16 MiB
- journal, of small commits, has a fixed size (`journal.SIZE`)
- `reserve` is a file that occupies disk space: if others fill the disk, it is released to record acknowledgements and
  delete data, and allocated again when there is space
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Iterable
from pathlib import Path

import msgspec

from outstation.foundation.errors import StorageError, StorageFull

PAGE_SIZE = 4096
_WAL_FRAME = PAGE_SIZE + 24
_WAL_HEADER = 32
_SHM, _JOURNAL = 32_768, 65_536
# Bytes of the log that small commits spend, as `Budget` counts them, until the journal is full.
_SMALL_COMMITS = 2 * _JOURNAL
_MAX_WAL, _MAX_RESERVE = 4 << 20, 2 << 20
_MIN_RESERVED_PAGES, _MAX_RESERVED_PAGES = 16, 32
# Pages of small tables, indexes and inner nodes that any transaction may touch.
_BASE = 10 * _WAL_FRAME
# Offset and format of mxFrame in the wal-index (https://www.sqlite.org/walformat.html).
_MX_FRAME_OFFSET, _MX_FRAME = 16, struct.Struct("=I")


class Quota(msgspec.Struct, frozen=True):
    """Bytes of each part; together with the index and the journal they make `max_size`."""

    database_bytes: int
    wal_bytes: int
    reserve_bytes: int

    @classmethod
    def from_max_size(cls, max_size: int) -> Quota:
        wal = min(_MAX_WAL, max_size // 4)
        reserve = min(_MAX_RESERVE, max_size // 8)
        return cls((max_size - wal - reserve - _SHM - _JOURNAL) // PAGE_SIZE * PAGE_SIZE, wal, reserve)

    @property
    def reserved_pages(self) -> int:
        """Pages that only a vital transaction may fill, and the first `batch_pages` of them a batch."""
        return min(_MAX_RESERVED_PAGES, max(_MIN_RESERVED_PAGES, self.database_bytes // PAGE_SIZE // 20))

    @property
    def batch_pages(self) -> int:
        """Reserved pages that a batch may fill: they hold a task's states and a few results."""
        return self.reserved_pages // 3

    @property
    def transaction_bytes(self) -> int:
        """Bytes that a transaction may always write, as `Budget` counts them."""
        return self.wal_bytes * 3 // 4 - _WAL_HEADER - _BASE


class Budget:
    """Bytes that one transaction may still write."""

    def __init__(self, remaining: int) -> None:
        self.remaining = remaining

    def spend(self, size: int) -> None:
        """Count a row of `size` bytes to write or delete. Raises StorageFull if it exceeds the transaction."""
        # A small row may leave half of its page empty; a large one fills overflow pages.
        cost = 2 * size if size < PAGE_SIZE else size + size // 64 + 3 * _WAL_FRAME
        if cost > self.remaining:
            raise StorageFull(f"{size} more bytes are too much for one transaction; raise [buffer] max_size")
        self.remaining -= cost

    def spend_affordable(self, costs: Iterable[int]) -> int:
        """Count and return how many of the first `costs` fit into half of the remaining bytes."""
        room, count = self.remaining // 2, 0
        for cost in costs:
            if cost > room:
                break
            room, count = room - cost, count + 1
            self.remaining -= cost
        return count


class QuotaEnforcer:
    """Keeper of one store's files within the quota and the disk."""

    def __init__(self, path: Path, quota: Quota) -> None:
        self._path, self.quota = path, quota
        self._wal = path.with_name(path.name + "-wal")
        self._shm: int | None = None
        # Bytes of the file system and free ones, in a simulation.
        self.simulated_disk: tuple[int, int] | None = None
        self._reserve = DiskReserve(path.with_name("reserve"))

    def make_room(self) -> None:
        """Make room to open the database: SQLite needs disk space for that, too."""
        self.check_disk_space(vital=True)

    def prepare_transaction(self, db: sqlite3.Connection, *, vital: bool, small: bool = False) -> Budget:
        """Make room for a transaction, of many commits if they are small.

        Raises StorageFull, StorageError, sqlite3.Error.
        """
        self.check_disk_space(vital=vital)
        used = self._wal_frames() * _WAL_FRAME
        if used > max(0, self.quota.wal_bytes // 4 - small * _SMALL_COMMITS) and self._restart_wal(db):
            # The index shows it only after the next transaction has begun to write.
            used = 0
        left = self.quota.wal_bytes - _WAL_HEADER - used - _BASE
        if left <= 0:
            raise StorageFull(
                f"{self._wal}: another program has been reading {self._path.name} for so long that the write-ahead log "
                "is full ([buffer] max_size); end that program"
            )
        return Budget(left)

    def require_reserved_pages(self, db: sqlite3.Connection, free_before: int, *, batch: bool) -> None:
        """Raise StorageFull if a transaction has filled reserved pages; `free_before`: `free_pages` at its start.

        A `batch` may fill `batch_pages` of them. Raises sqlite3.Error, too.
        """
        reserved = self.quota.reserved_pages - (self.quota.batch_pages if batch else 0)
        if self.free_pages(db) < min(free_before, reserved):
            raise StorageFull(f"{self._path}: the quota ([buffer] max_size) is full")

    def free_pages(self, db: sqlite3.Connection) -> int:
        """Return the pages that may still be filled, as a transaction of `db` sees them."""
        used, free = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_count", "freelist_count"))
        return self.quota.database_bytes // PAGE_SIZE - used + free

    def limit_bytes(self, page_count: int) -> int:
        """Return how many bytes pages can use on this disk; `page_count` pages are in the file now."""
        whole, free = self._disk_space()
        promised = max(0, self._reserve_size(whole) - self._reserve.size)
        promised += max(0, min(self.quota.wal_bytes // 4, whole // 8) - self._wal_size())
        return max(PAGE_SIZE, min(self.quota.database_bytes, page_count * PAGE_SIZE + free - promised))

    def close(self) -> None:
        """Close only after the connection: closing any descriptor of a file drops SQLite's locks on it."""
        if self._shm is not None:
            os.close(self._shm)
            self._shm = None

    def check_disk_space(self, *, vital: bool) -> None:
        """Raise StorageFull if the disk is full; a `vital` transaction may use the reserve. Raises StorageError."""
        whole, free = self._disk_space()
        size = self._reserve_size(whole)
        try:
            if vital:
                if free < size:
                    self._reserve.release()
            elif self._reserve.size < size and not (free >= 2 * size and self._reserve.allocate(size)):
                raise StorageFull(f"{self._path.parent}: the disk is full; make room on it")
        except OSError as error:
            raise StorageError(f"{error.filename}: {error.strerror}; the store needs a file there") from error

    def _restart_wal(self, db: sqlite3.Connection) -> bool:
        """Checkpoint the write-ahead log. Return True if it restarts from its beginning: nobody reads it."""
        timeout = db.execute("PRAGMA busy_timeout").fetchone()[0]
        # A reader may stay for hours: do not wait for it.
        db.execute("PRAGMA busy_timeout=0")
        try:
            busy, frames, moved = db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            return not busy and frames == moved
        finally:
            db.execute(f"PRAGMA busy_timeout={timeout}")

    def _wal_frames(self) -> int:
        if self._shm is None:
            with contextlib.suppress(FileNotFoundError):
                self._shm = os.open(self._path.with_name(self._path.name + "-shm"), os.O_RDONLY | os.O_CLOEXEC)
        header = os.pread(self._shm, _MX_FRAME.size, _MX_FRAME_OFFSET) if self._shm is not None else b""
        return int(_MX_FRAME.unpack(header)[0]) if len(header) == _MX_FRAME.size else 0

    def _wal_size(self) -> int:
        return self._wal.stat().st_size if self._wal.exists() else 0

    def _reserve_size(self, disk_bytes: int) -> int:
        return min(self.quota.reserve_bytes, disk_bytes // 8) // PAGE_SIZE * PAGE_SIZE

    def _disk_space(self) -> tuple[int, int]:
        """Return the bytes of the file system, and those that are available to us."""
        if self.simulated_disk is not None:
            return self.simulated_disk
        try:
            disk = os.statvfs(self._path.parent)
        except OSError as error:
            raise StorageError(f"{self._path.parent}: {error.strerror}; check [device] data_dir") from error
        return disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize


class DiskReserve:
    """File that occupies disk space. Crash-safe: its size is read from the disk, not remembered."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def size(self) -> int:
        try:
            return self._path.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def allocate(self, size: int) -> bool:
        """Allocate the file. Return False if the disk has no room."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)
        except OSError:
            self.release()
            return False
        return self.size >= size

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
