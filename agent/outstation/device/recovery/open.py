"""Opening of the device store: lock, integrity check, salvage, migration, and repair of lost commits.

- one process opens a folder to write (a lock file), on a local file system only
- after an unclean stop the database is checked, within a time that does not grow with its size
- a damaged database goes to quarantine and what can be read is copied (`salvage`); one that lost commits continues at
  its watermark (`catch_up`)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from outstation.device.machine.systemd import notify
from outstation.device.recovery import catch_up, findings, migrate, replay, salvage
from outstation.device.recovery.open_files import LOCK, OpenFiles, require_not_moved
from outstation.device.store import journal
from outstation.device.store.journal import Journal, JournaledConnection
from outstation.device.store.quota import PAGE_SIZE, Quota, QuotaEnforcer
from outstation.device.store.store import DATABASE, Store
from outstation.device.store.tables import meta, row_crc, schema
from outstation.device.store.tables.sqlite_errors import (
    connect_read_only,
    is_corruption,
    require_regular,
    translate_errors,
)
from outstation.device.store.watermark import Watermark
from outstation.foundation import clock
from outstation.foundation.errors import StorageBusy, StorageDamaged, StorageError, UsageError

log = logging.getLogger("outstation")

CHECK_TIMEOUT_S = 20.0
_CHECK_MARGIN_S = 10.0
_SALVAGE_TIMEOUT_S = 600.0
_REQUIRED_TABLES = {"meta", "streams", "chunks", "outbox"}
_SMALL_TABLES = ("meta", "streams", "cursors", "source_positions", "counters", "categories", "task_state")
_PROGRESS_STEPS = 20_000
_SYNCHRONOUS_FULL = 2
# Byte of the file header; 2: with a write-ahead log.
_WRITE_VERSION_OFFSET, _MAX_WRITE_VERSION = 18, 2
# 9p is not among them: virtual machines and sandboxes have their root on it, and a write-ahead log that it cannot carry
# is refused when the pragmas are read back.
_NETWORK_FILE_SYSTEMS = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "coda", "ncpfs", "lustre", "glusterfs", "davfs",
    "fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.glusterfs", "fuse.davfs", "fuse.davfs2", "fuse.smbnetfs",
    "fuse.curlftpfs", "fuse.ceph", "fuse.gcsfuse",
})  # fmt: skip


def open_store(folder: Path, *, max_size: int = 2**30, synchronous: str = "FULL", with_journal: bool = True) -> Store:
    """Open the store in `folder` to write, sound and migrated. Raises StorageError, UsageError.

    A journal that is there is replayed in any case; no small commit goes to it without `with_journal`.
    """
    path = folder / DATABASE
    quota = Quota.from_max_size(max_size)
    pragmas = schema.pragmas(quota.database_bytes // PAGE_SIZE, quota.wal_bytes, synchronous)
    with contextlib.ExitStack() as undo:
        require_not_moved(folder)
        lock = acquire_lock(folder)
        undo.callback(os.close, lock)
        enforcer = QuotaEnforcer(path, quota)
        undo.callback(enforcer.close)
        enforcer.make_room()
        writer = _WriteAccess(folder, lock)
        undo.callback(writer.watermark.close)
        # NORMAL and OFF are for tests of what a power cut takes: the journal would keep it.
        file = _open_journal(folder) if with_journal and synchronous == "FULL" else None
        if file is not None:
            undo.callback(file.close)
        db = _open_database(folder, pragmas, writer.watermark)
        undo.callback(db.close)
        store = Store(path, db, enforcer, writer, file)

        def repair(db: sqlite3.Connection) -> None:
            replay.report(db, replay.replay(db, folder))
            if file is not None:
                file.begin(db)
            else:
                journal.end_progress(db)
            catch_up.catch_up(db, writer.watermark.state)

        # The first page says where the tables are: without it nothing else in the file could be read. Before the first
        # commit, because after a clean stop there is nothing to write back.
        with contextlib.suppress(OSError, sqlite3.Error):
            db.execute("PRAGMA wal_checkpoint(RESTART)")
        with contextlib.suppress(OSError):
            writer.watermark.save_first_page(path)
        store.begin_boot(repair)
        if file is not None:
            with contextlib.suppress(OSError):
                file.shrink()
        writer.files = OpenFiles(folder)
        undo.pop_all()
    return store


class _WriteAccess:
    """The lock and the watermark of the process that writes."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder, self._lock = folder, lock
        self.files: OpenFiles | None = None
        try:
            self.watermark = Watermark(folder)
        except OSError as error:
            raise _folder_error(folder, error) from error

    def record_damage(self, cause: str) -> None:
        salvage.write_damage_marker(self._folder, cause)

    def require_in_place(self, db: sqlite3.Connection, fold: Callable[[], None]) -> None:
        if self.files is not None:
            self.files.require_in_place(db, fold)

    def close(self, db: sqlite3.Connection, *, is_intact: bool) -> None:
        if is_intact and (self.files is None or self.files.is_folder_in_place()):
            with contextlib.suppress(sqlite3.Error):
                # In one commit with the small ones that are only in the journal; if it fails, they are replayed. The
                # checkpoint of the close flushes it.
                if not db.in_transaction and db.execute("PRAGMA synchronous").fetchone()[0] == _SYNCHRONOUS_FULL:
                    db.execute("PRAGMA synchronous=NORMAL")
                meta.put(db, findings.CLEAN_STOP, "1")
                if db.in_transaction:
                    db.execute("COMMIT")
                migrate.drop_backups(self._folder)
        with contextlib.suppress(sqlite3.Error):
            db.close()
        self.watermark.close()
        os.close(self._lock)


def _open_database(folder: Path, pragmas: schema.Pragmas, watermark: Watermark) -> sqlite3.Connection:
    """Return the one writing connection. Raises StorageError, UsageError."""
    path = folder / DATABASE
    require_regular(path)
    if path.exists():
        _make_private(path)
    cause = salvage.read_cause(folder) or _find_damage(folder, existed_before=watermark.state is not None)
    if cause is not None:
        _salvage(folder, cause, watermark)
    try:
        _make_private(path)
        return _connect(path, pragmas)
    except StorageDamaged as damage:
        _salvage(folder, str(damage), watermark)
        _make_private(path)
        return _connect(path, pragmas)


def _open_journal(folder: Path) -> Journal | None:
    """Open the journal; None on a disk without room for it. Raises StorageError."""
    try:
        return Journal(folder, _private_mode(folder))
    except OSError as error:
        log.warning("file %s in the data folder: %s; each commit goes to the database", journal.FILE_NAME, error)
        return None


def _private_mode(folder: Path) -> int:
    """Return the mode of files for their user alone; for the group too if the folder lets it in and nobody else."""
    return 0o600 if folder.stat().st_mode & 0o007 else 0o640


def _make_private(path: Path) -> None:
    """Create the database, and let nobody else read it."""
    try:
        mode = _private_mode(path.parent)
        if not path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        elif path.stat().st_mode & 0o007:
            # By its path: to close a descriptor of it would end SQLite's locks.
            path.chmod(mode)
    except OSError as error:
        raise _folder_error(path.parent, error) from error


def _connect(path: Path, pragmas: schema.Pragmas) -> sqlite3.Connection:
    """Connect, set every pragma, read back those that safety depends on, and migrate the tables."""
    with translate_errors(path):
        connection = sqlite3.connect(
            path, isolation_level=None, timeout=5.0, check_same_thread=False, factory=JournaledConnection
        )
        try:
            if path.stat().st_size == 0:
                # By a rollback journal each page of the tables is written once, by the write-ahead log twice.
                migrate.migrate(connection, path)
                # What changes the mode fits into one sector, so it needs no rollback journal on the disk.
                connection.execute("PRAGMA journal_mode=MEMORY")
            for pragma, expected in pragmas:
                connection.execute(f"PRAGMA {pragma}")
                if expected is not None:
                    value = str(connection.execute(f"PRAGMA {pragma.split('=')[0]}").fetchone()[0])
                    if value != expected:
                        raise StorageError(
                            f"{path}: PRAGMA {pragma} gives {value!r}; acknowledged rows would not be safe"
                        )
            migrate.migrate(connection, path)
            row_crc.install(connection, writes=True)
        except BaseException:
            connection.close()
            raise
        return connection


def _salvage(folder: Path, cause: str, watermark: Watermark) -> None:
    log.critical("%s is damaged (%s); everything readable is copied into a new database", folder / DATABASE, cause)
    notify(f"EXTEND_TIMEOUT_USEC={round(_SALVAGE_TIMEOUT_S * 1e6)}")
    salvage.salvage(folder, cause, watermark.state, watermark.first_page)


# --- integrity check ---


def _find_damage(folder: Path, *, existed_before: bool) -> str | None:
    """Return what is wrong with the database, as far as a check of bounded time shows."""
    path = folder / DATABASE
    if not path.exists() or path.stat().st_size == 0:
        has_wal = path.with_name(f"{DATABASE}-wal").exists()
        return "the database file is gone or empty" if has_wal or (existed_before and path.exists()) else None
    with translate_errors(path):
        if not _is_writable_format(path):
            return "its header names a format that is for reading only"
        try:
            # Undoes what a kill interrupted while the store was created: a read-only connection cannot.
            if path.with_name(f"{path.name}-journal").exists():
                with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
                    db.execute("SELECT 1 FROM sqlite_master").fetchone()
            with contextlib.closing(connect_read_only(path)) as db:
                tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if not tables and not existed_before:
                    return None
                if tables and not tables & _REQUIRED_TABLES:
                    raise UsageError(f"{path}: a database of another program; give this device a data_dir of its own")
                if not tables >= _REQUIRED_TABLES:
                    return f"its tables {', '.join(sorted(_REQUIRED_TABLES - tables))} are gone"
                return _find_damaged_row(db)
        except UnicodeDecodeError:
            # SQLite's message quotes bytes of the damaged database.
            return "a text in it is not what was written"
        except sqlite3.Error as error:
            if not is_corruption(error):
                raise
            return str(error)


def _find_damaged_row(db: sqlite3.Connection) -> str | None:
    steps = schema.applied_steps(db)
    if schema.is_newer(steps):
        # `migrate` refuses it.
        return None
    if problem := schema.find_damage(db, steps) or meta.find_damage(db):
        return problem
    is_clean = bool(meta.get(db, findings.CLEAN_STOP, ""))
    if len(steps) == len(schema.STEPS) and (problem := row_crc.find_damage(db, large=not is_clean)):
        return problem
    return None if is_clean else _check_after_crash(db)


def _is_writable_format(path: Path) -> bool:
    """Return False for a damaged write version, which SQLite opens read-only without an error.

    Source: SQLite, Database File Format, 1.3.3.
    """
    with path.open("rb") as file:
        header = file.read(_WRITE_VERSION_OFFSET + 1)
    return len(header) <= _WRITE_VERSION_OFFSET or header[_WRITE_VERSION_OFFSET] <= _MAX_WRITE_VERSION


def _check_after_crash(db: sqlite3.Connection) -> str | None:
    """Check the small tables completely, the large ones for as long as a start may take."""
    notify(f"EXTEND_TIMEOUT_USEC={round((CHECK_TIMEOUT_S + _CHECK_MARGIN_S) * 1e6)}")
    for table in _SMALL_TABLES:
        if problem := _quick_check(db, f"('{table}')"):
            return problem
    deadline = clock.boot_seconds() + CHECK_TIMEOUT_S
    db.set_progress_handler(lambda: clock.boot_seconds() > deadline, _PROGRESS_STEPS)
    try:
        return _quick_check(db, "(1)")
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorname", "") != "SQLITE_INTERRUPT":
            raise
        log.info(
            "the store is too large for a complete check within %.0f s; damage is found when it is read",
            CHECK_TIMEOUT_S,
        )
        return None
    finally:
        db.set_progress_handler(None, 0)


def _quick_check(db: sqlite3.Connection, arguments: str) -> str | None:
    result = str(db.execute(f"PRAGMA quick_check{arguments}").fetchone()[0])
    return None if result == "ok" else result.replace("\n", " ")[:200]


# --- lock and file system ---


def acquire_lock(folder: Path) -> int:
    """Lock the folder for the life of this process and return the lock file's descriptor."""
    require_local(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _folder_error(folder, error) from error
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


def _folder_error(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: {error.strerror}; check [device] data_dir, and who may write there")


def require_local(folder: Path) -> None:
    """Raise UsageError if `folder`, which need not exist yet, is on a network file system.

    SQLite's locks and shared memory are safe on local file systems only.
    Source: sqlite.org/wal.html, "WAL does not work over a network filesystem".
    """
    kind, mount = find_file_system(folder.resolve(), _read_mountinfo())
    if kind in _NETWORK_FILE_SYSTEMS:
        raise UsageError(
            f"device.data_dir: {folder} is on {mount}, a network file system ({kind}) where two machines can write one "
            "database and a commit can be lost; put it on a disk of this machine"
        )


def find_file_system(folder: Path, mountinfo: str) -> tuple[str, str]:
    """Return (type, mount point) of the file system of `folder`; empty if not known. Source: proc(5), mountinfo."""
    innermost = ("", "")
    for line in mountinfo.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split()
        if not dash or len(fields) < 5 or not after.split():
            continue
        mount = fields[4]
        if "\\" in mount:
            mount = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), mount)
        # A later mount on the same point covers the earlier one.
        if len(mount) >= len(innermost[1]) and f"{folder}/".startswith(f"{mount.rstrip('/')}/"):
            innermost = (after.split()[0], mount)
    return innermost


def _read_mountinfo() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
