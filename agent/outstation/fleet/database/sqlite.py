"""SQLite implementation of the fleet database: one file, one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outstation.fleet.database.interface import Cursor, Gap, LogId, MessageKey, Row, Values, display_name
from outstation.fleet.database.schema.migrations import MIGRATIONS, Migration
from outstation.foundation import input_files
from outstation.foundation.errors import StorageBusy, StorageDamaged, StorageError, StorageFull, UsageError

if TYPE_CHECKING:
    import sqlite_utils

LOCK_WAIT_S = 5.0
# A statement for many rows takes half the time of one for each. It has at most 999 values, as SQLite before 3.32 asks.
ROWS_PER_STATEMENT = 40
# Set each time the file is opened. A second value must be read back, where durability depends on it.
_PRAGMAS: tuple[tuple[str, str | None], ...] = (
    ("journal_mode=WAL", "wal"),
    # NORMAL lost acknowledged rows in 28 of 50 simulated power cuts, FULL in none.
    ("synchronous=FULL", "2"),
    ("busy_timeout=5000", None),
    ("cache_size=-16000", None),
    # A long audit holds checkpoints back; afterwards SQLite truncates the grown log to this size.
    ("journal_size_limit=67108864", None),
    ("trusted_schema=OFF", None),
)
_UNSTORABLE_ERRORS = (
    *(OverflowError, UnicodeEncodeError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError),
)
RESTORE = "the file is damaged: restore it from a backup, and devices send what is missing again"
_INSERT_MESSAGE = "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, log, seq) DO NOTHING"
_PAYLOAD = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
_GAPS = """
    SELECT first, last, declared FROM gaps WHERE device = :device AND log = :log AND first <= :b
      AND first >= coalesce((SELECT max(first) FROM gaps WHERE device = :device AND log = :log AND first <= :a), 0)
"""
UNDECLARED_GAPS = "SELECT first, last FROM gaps WHERE device = ? AND log = ? AND NOT declared ORDER BY first LIMIT ?"


def _read_integer(cell: bytes) -> int:
    """Return a cell of an integer column. SQLite stores any value there: damage must not become another type."""
    try:
        return int(cell)
    except ValueError:
        raise StorageDamaged(f"a number in the database is {cell[:40]!r}; {RESTORE}") from None


# For connections that ask for it by `detect_types`.
sqlite3.register_converter("INTEGER", _read_integer)
sqlite3.register_converter("BOOLEAN", _read_integer)


class SqliteConnection(sqlite3.Connection):
    """A connection with the methods of the interface; without round trips, one statement per row is fastest."""

    def to_dialect(self, sql: str) -> str:
        return _to_sqlite(sql)

    def execute_each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        return [self.execute(sql, row).fetchone() for row in rows]

    def lock_devices(self, devices: Iterable[str]) -> None:
        """Do nothing: the transaction is the only writer."""

    def lock_table(self, table: str) -> None:
        """Do nothing: the transaction is the only writer."""

    def add_messages(self, rows: Sequence[Row]) -> list[bool]:
        return [self.execute(_INSERT_MESSAGE, row).rowcount > 0 for row in rows]

    def payloads(self, keys: Sequence[MessageKey]) -> list[bytes | None]:
        return [payload for row in self.execute_each(_PAYLOAD, keys) for payload in row or (None,)]

    def bulk_insert(self, table: str, rows: Sequence[Row]) -> None:
        whole = len(rows) - len(rows) % ROWS_PER_STATEMENT
        for at in range(0, whole, ROWS_PER_STATEMENT):
            block = rows[at : at + ROWS_PER_STATEMENT]
            self.execute(_insert(table, len(rows[0]), len(block)), [*chain.from_iterable(block)])
        self.executemany(_insert(table, len(rows[0]), 1), rows[whole:])

    def insert_missing(self, table: str, rows: Sequence[Row]) -> None:
        if rows:
            self.executemany(_insert(table, len(rows[0]), 1, "INSERT OR IGNORE"), rows)

    def logs(self, logs: Sequence[LogId]) -> dict[LogId, tuple[int | None, int]]:
        arrived = self.execute_each("SELECT last_seq FROM logs WHERE device = ? AND log = ?", logs)
        ended = self.execute_each("SELECT last_seq FROM log_ends WHERE device = ? AND log = ?", logs)
        return {log: (a and a[0], b[0] if b else 0) for log, a, b in zip(logs, arrived, ended, strict=True)}

    def store_logs(self, logs: Sequence[tuple[str, str, int, str]], known: set[LogId]) -> None:
        update = "UPDATE logs SET last_seq = ?, latest = max(latest, ?) WHERE device = ? AND log = ?"
        for device, log, last_seq, latest in logs:
            if (device, log) in known:
                self.execute(update, (last_seq, latest, device, log))
            else:
                self.execute("INSERT INTO logs VALUES (?, ?, ?, ?, ?, TRUE)", (device, log, last_seq, latest, latest))

    def gaps(self, spans: Mapping[LogId, tuple[int, int]]) -> dict[LogId, list[Gap]]:
        return {
            log: self.execute(_GAPS, {"device": log[0], "log": log[1], "a": a - 1, "b": b + 1}).fetchall()
            for log, (a, b) in spans.items()
        }

    def store_gaps(self, removed: Sequence[MessageKey], added: Sequence[tuple[str, str, int, int, bool]]) -> None:
        self.executemany("DELETE FROM gaps WHERE device = ? AND log = ? AND first = ?", removed)
        self.executemany("INSERT INTO gaps VALUES (?, ?, ?, ?, ?)", added)

    def undeclared_gaps(self, logs: Sequence[LogId], limit: int) -> dict[LogId, list[tuple[int, int]]]:
        return {log: self.execute(UNDECLARED_GAPS, (*log, limit)).fetchall() for log in logs}

    def revocation_times(self, kids: Sequence[str]) -> dict[str, str | None]:
        rows = self.execute_each("SELECT revoked FROM keys WHERE kid = ?", [(kid,) for kid in kids])
        return {kid: revoked for kid, row in zip(kids, rows, strict=True) for revoked in row or ()}

    def update_last_seen(self, devices: Sequence[str], now: str) -> None:
        self.executemany("UPDATE devices SET last_seen = ? WHERE device = ?", [(now, device) for device in devices])


class SqliteDatabase:
    shared = False
    unstorable_errors: tuple[type[Exception], ...] = _UNSTORABLE_ERRORS

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self.read_only, self.name = path, read_only, display_name(path)
        self._lock: int | None = None
        self._collectors: int | None = None
        if read_only and not path.exists():
            raise UsageError(f"{path}: no database here yet; `outstation fleet enrol DEVICE` creates it")
        try:
            input_files.require_regular(path)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; see `db` in fleet.toml") from error
        with self._translate_errors():
            if not read_only and path.parent.is_dir():
                # Measurements are private to the owner of the file.
                path.touch(mode=0o600)
            mode = "ro" if read_only else "rwc"
            uri = f"{path.resolve().as_uri()}?mode={mode}"
            self.connection = sqlite3.connect(
                uri, uri=True, isolation_level=None, factory=SqliteConnection, detect_types=sqlite3.PARSE_DECLTYPES
            )
            # Damaged text must not stop the audit, which reports it. It is called for each text: the fastest form.
            self.connection.text_factory = methodcaller("decode", "utf-8", "surrogateescape")
        try:
            self._open()
            self._opened = os.stat(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; the last process to do so checkpoints while it holds the lock."""
        with contextlib.suppress(StorageError), self.lock_exclusively():
            self.connection.close()
        self.connection.close()
        for file in filter(None, (self._lock, self._collectors)):
            os.close(file)
        self._lock = self._collectors = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[SqliteConnection]:
        with self._translate_errors(), self.lock_exclusively():
            self._require_in_place()
            try:
                self.connection.execute("BEGIN IMMEDIATE")
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[SqliteConnection]:
        if self.connection.in_transaction:
            yield self.connection
            return
        with self._translate_errors():
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    def execute(self, sql: str, values: Values = ()) -> Cursor:
        with self._translate_errors():
            return self.connection.execute(sql, values)

    def as_stored(self, column: str) -> str:
        # An expression has no declared type, by which a converter is chosen.
        return f"+{column}"

    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]:
        with self._translate_errors():
            yield from self.connection.execute(sql, values)

    def acquire_leadership(self, job: str) -> bool:
        """Return True: a SQLite database has one collector."""
        return True

    def join_collectors(self) -> int:
        """Return 1. Raises StorageBusy while another collector has the database, or `fleet db migrate` copies it."""
        if not self.exclude_collectors():
            problem = (
                "another collector runs on it, or `outstation fleet db migrate` copies it. Stop that one, or move to "
                "PostgreSQL, where several share the messages: outstation fleet collect --share NAME"
            )
            raise StorageBusy(f"{self.path}: {problem}")
        return 1

    def exclude_collectors(self) -> bool:
        """Lock a file of its own until the database closes: the other one is locked for each transaction."""
        if self._collectors is None:
            self._collectors = self._open_lock_file(".collectors")
        try:
            fcntl.flock(self._collectors, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _open_lock_file(self, suffix: str) -> int:
        file = self.path.with_name(self.path.name + suffix)
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{file}: cannot be opened: {error.strerror}") from error

    @contextlib.contextmanager
    def lock_exclusively(self) -> Iterator[None]:
        """Exclude writes and checkpoints of other processes: SQLite before 3.51.3 can lose commits when two overlap."""
        if self._lock is None:
            yield
            return
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    problem = "another process holds its lock; try again when that one is done"
                    raise StorageBusy(f"{self.path}: {problem}") from None
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _open(self) -> None:
        # Eight megabytes, which a process with PostgreSQL does without.
        import sqlite_utils

        if not self.read_only:
            self._lock = self._open_lock_file(".lock")
        with self._translate_errors(), self.lock_exclusively():
            for pragma, wanted in _PRAGMAS if not self.read_only else ():
                self.connection.execute(f"PRAGMA {pragma}")
                actual = wanted and str(self.connection.execute(f"PRAGMA {pragma.partition('=')[0]}").fetchone()[0])
                if actual != wanted:
                    raise StorageError(f"{self.path}: PRAGMA {pragma} gave {actual}; it must be on a local disk")
            database = sqlite_utils.Database(self.connection, execute_plugins=False)
            migrations = _migrations()
            if {done.name for done in migrations.applied(database)} - {migration.name for migration in MIGRATIONS}:
                raise UsageError(f"{self.path}: created by a newer version of outstation; update it on this machine")
            if not self.read_only:
                migrations.apply(database)
            elif migrations.pending(database):
                raise UsageError(f"{self.path}: created by an older version; start `outstation fleet collect` once")

    def _require_in_place(self) -> None:
        """Raise StorageError if the path leads elsewhere: what is written here would be acknowledged and lost."""
        try:
            if os.path.samestat(os.stat(self.path), self._opened):
                return
        except OSError as error:
            problem = f"moved or deleted while it was open ({error.strerror}); put it back"
        else:
            former = f"{self.path.name}-wal and {self.path.name}-shm, which are the former file's"
            problem = f"replaced while it was open; stop this process, delete {former}, and start it again"
        raise StorageError(f"{self.path}: {problem}")

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except _UNSTORABLE_ERRORS:
            raise
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            kind = StorageFull if name == "SQLITE_FULL" else StorageError
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                kind = StorageBusy
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise StorageDamaged(f"{self.path}: {error}; {RESTORE}") from error
            raise kind(f"{self.path}: {error}") from error
        except UnicodeDecodeError as error:
            # SQLite's message quotes bytes of a damaged database.
            raise StorageDamaged(f"{self.path}: a text in it is not what was written; {RESTORE}") from error


def open_temporary() -> SqliteConnection:
    """Open an empty database, which grows from memory into a temporary file and ends with the connection."""
    connection = sqlite3.connect("", isolation_level=None, factory=SqliteConnection)
    for pragma in ("journal_mode=OFF", "cache_size=-16000"):
        connection.execute(f"PRAGMA {pragma}")
    with contextlib.closing(sqlite3.connect(":memory:")) as schema:
        schema.deserialize(_serialize_schema())
        schema.backup(connection)
    return connection


@lru_cache
def _serialize_schema() -> bytes:
    """Return an empty database. A statement that changes the schema parses all of it again: together 10 ms."""
    with contextlib.closing(sqlite3.connect(":memory:")) as schema:
        for statement in (statement for migration in MIGRATIONS for statement in migration.statements):
            schema.execute(_to_sqlite(statement))
        schema.commit()
        return schema.serialize()


def _migrations() -> sqlite_utils.Migrations:
    import sqlite_utils

    migrations = sqlite_utils.Migrations("outstation-fleet")
    for migration in MIGRATIONS:
        migrations(name=migration.name)(partial(_apply, migration))
    return migrations


def _apply(migration: Migration, database: sqlite_utils.Database) -> None:
    # One by one: executescript of sqlite3 commits first, and a crash would leave half of them.
    for statement in migration.statements:
        database.execute(_to_sqlite(statement))


@lru_cache
def _insert(table: str, columns: int, rows: int, verb: str = "INSERT") -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{verb} INTO {table} VALUES {', '.join([row] * rows)}"


@lru_cache
def _to_sqlite(sql: str) -> str:
    return sql.replace("GREATEST(", "max(").replace("LEAST(", "min(").replace("TOTAL(", "total(")
