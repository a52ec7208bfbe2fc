"""How a store is opened: who may, whether what is there is sound, with which pragmas, and what SQLite's errors mean.

- one process per folder (a lock file), on a file system of this machine only
- after an unclean stop the database is checked, within a time that does not grow with it
- a damaged one is set aside and salvaged (`salvage`); one that lost commits goes on where it had got (`catchup`)
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent import clock
from agent.device.machine.systemd import notify
from agent.device.recovery import findings, migrate, salvage
from agent.device.recovery.mounts import require_local
from agent.device.recovery.salvage import DATABASE
from agent.device.store import meta
from agent.device.store.watermark import Watermark
from agent.errors import StorageBusy, StorageDamaged, StorageError, StorageFull, UsageError

log = logging.getLogger("outstation")

CHECK_TIMEOUT_S = 20.0
_CHECK_MARGIN_S = 10.0
_REQUIRED_TABLES = {"meta", "streams", "chunks", "outbox"}
_SMALL_TABLES = ("meta", "streams", "cursors", "marks", "counters", "categories", "state")
_PROGRESS_STEPS = 20_000
_WRITE_VERSION_OFFSET, _MAX_WRITE_VERSION = 18, 2  # byte of the header; 2: with a write-ahead log


def open_database(folder: Path, pragmas: Sequence[tuple[str, str | None]]) -> tuple[sqlite3.Connection, Watermark]:
    """The one writing connection, sound and migrated, and the watermark beside it. Raises StorageError, UsageError."""
    path = folder / DATABASE
    try:
        watermark = Watermark(folder)
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}; check [device] data_dir, and who may write there") from error
    with contextlib.ExitStack() as undo:
        undo.callback(watermark.close)
        cause = salvage.read_cause(folder) or find_damage(folder, existed_before=watermark.state is not None)
        if cause is not None:
            _salvage(folder, cause, watermark)
        try:
            db = connect(path, pragmas)
        except StorageDamaged as damage:
            _salvage(folder, str(damage), watermark)
            db = connect(path, pragmas)
        undo.pop_all()
    return db, watermark


def connect(path: Path, pragmas: Sequence[tuple[str, str | None]]) -> sqlite3.Connection:
    """A connection with every pragma set, and those that safety hangs on read back; its tables are today's."""
    with translate_errors(path):
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
        try:
            for pragma, wanted in pragmas:
                connection.execute(f"PRAGMA {pragma}")
                if wanted is not None:
                    got = str(connection.execute(f"PRAGMA {pragma.split('=')[0]}").fetchone()[0])
                    if got != wanted:
                        raise StorageError(
                            f"{path}: PRAGMA {pragma} gives {got!r}; acknowledged rows would not be safe"
                        )
            migrate.migrate(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def connect_read_only(path: Path) -> sqlite3.Connection:
    """For everyone else, beside the daemon that writes."""
    with translate_errors(path):
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=5.0)


def find_damage(folder: Path, *, existed_before: bool) -> str | None:
    """What is wrong with the database in `folder`, as far as a bounded look shows; `known`: it was there before."""
    path = folder / DATABASE
    if not path.exists() or path.stat().st_size == 0:
        left = path.with_name(f"{DATABASE}-wal").exists()
        return "the database file is gone or empty" if left or (existed_before and path.exists()) else None
    with translate_errors(path):
        if not _is_written_by_us(path):
            return "its header names a format that is for reading only"
        try:
            _roll_back_journal(path)
            with contextlib.closing(connect_read_only(path)) as db:
                tables = {str(row[0]) for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if not tables and not existed_before:
                    return None
                if tables and not tables & _REQUIRED_TABLES:
                    raise UsageError(f"{path}: a database of another program; give this device a data_dir of its own")
                if not tables >= _REQUIRED_TABLES:
                    return f"its tables {', '.join(sorted(_REQUIRED_TABLES - tables))} are gone"
                if problem := meta.find_damage(db):
                    return problem
                return None if meta.get(db, findings.CLEAN_STOP, "") else _check_after_crash(db)
        except sqlite3.Error as error:
            if not is_corruption(error):
                raise
            return str(error)


def _roll_back_journal(path: Path) -> None:
    """What a kill left half done while the store was made or got its -wal: nobody who only reads can undo it."""
    if path.with_name(f"{path.name}-journal").exists():
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=5.0)) as db:
            db.execute("SELECT 1 FROM sqlite_master").fetchone()


def _is_written_by_us(path: Path) -> bool:
    """A damaged write version makes SQLite open a store for reading, and say so only when something is written.

    Source: SQLite, Database File Format, 1.3.3.
    """
    with path.open("rb") as file:
        header = file.read(_WRITE_VERSION_OFFSET + 1)
    return len(header) <= _WRITE_VERSION_OFFSET or header[_WRITE_VERSION_OFFSET] <= _MAX_WRITE_VERSION


def _check_after_crash(db: sqlite3.Connection) -> str | None:
    """After an unclean stop: the small tables whole, the large ones for as long as starting may take."""
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
            "the store is too large to be checked whole within %.0f s; what is damaged is found in use", CHECK_TIMEOUT_S
        )
        return None
    finally:
        db.set_progress_handler(None, 0)


def _quick_check(db: sqlite3.Connection, arguments: str) -> str | None:
    found = str(db.execute(f"PRAGMA quick_check{arguments}").fetchone()[0])
    return None if found == "ok" else found.replace("\n", " ")[:200]


def _salvage(folder: Path, cause: str, watermark: Watermark) -> None:
    log.critical("%s is damaged (%s); what can be read of it is copied into a new one", folder / DATABASE, cause)
    notify(f"EXTEND_TIMEOUT_USEC={round(600 * 1e6)}")
    salvage.salvage(folder, cause, watermark.state, watermark.first_page)


def save_first_page(folder: Path, db: sqlite3.Connection, watermark: Watermark) -> None:
    """Remember where the tables are: with that page gone, everything else in the file could not be found."""
    with contextlib.suppress(OSError, sqlite3.Error):
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with contextlib.suppress(OSError):
        watermark.save_first_page(folder / DATABASE)


def close_database(folder: Path, db: sqlite3.Connection, watermark: Watermark, *, is_intact: bool) -> None:
    """End a connection of `open_database`; a `sound` one need not be checked when it is opened again."""
    if is_intact:
        with contextlib.suppress(sqlite3.Error):
            findings.put(db, findings.CLEAN_STOP, "1")
            migrate.drop_backups(folder)
        watermark.sync()
    with contextlib.suppress(sqlite3.Error):
        db.close()
    watermark.close()


def acquire_lock(folder: Path) -> int:
    """Hold the folder's lock file for as long as this process lives; its descriptor."""
    require_local(folder)
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
def translate_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise storage_error(path, error) from error


def is_corruption(error: sqlite3.Error) -> bool:
    name = str(getattr(error, "sqlite_errorname", ""))
    # Of a header whose schema format or text encoding no version knows, SQLite says so in words only.
    unreadable = any(words in str(error) for words in ("Could not decode to UTF-8", "unsupported file format"))
    return name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or unreadable


def storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"{path}: the quota ([buffer] max_size) or the disk is full")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageBusy(f"{path}: locked by another process")
    if is_corruption(error):
        return StorageDamaged(f"{path}: {error}; the agent sets it aside and salvages it when it starts next")
    return StorageError(f"{path}: {name}: {error}")
