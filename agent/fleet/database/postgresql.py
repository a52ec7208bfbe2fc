"""PostgreSQL: several collectors beside each other. One connection, made anew where it was lost.

Writing is READ COMMITTED under the locks of `Connection.lock`; what is read together is a REPEATABLE READ snapshot.
A pooler in between must be in session mode: who does a job (`lead`) holds a lock of its session, and what is executed
again is prepared in it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from agent.errors import StorageBusy, StorageError, StorageFull, UsageError
from agent.fleet.database import postgresql_schema
from agent.fleet.database.interface import Cursor, Repeat, Row, Values, named
from agent.fleet.database.placeholders import translated
from agent.fleet.database.postgresql_rows import Connection

try:
    import psycopg
    from psycopg import errors
except ImportError as error:
    raise UsageError(
        f"a database in PostgreSQL needs the library psycopg ({error}); install it: pip install 'outstation[postgres]'"
    ) from None

logger = logging.getLogger(__name__)

# What the network or a server that vanished may hold up; the URL may name others.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "outstation",
}
_UNSTORABLE = (
    *(OverflowError, UnicodeEncodeError, psycopg.DataError, psycopg.IntegrityError),
    # An index takes no name of several kilobytes.
    errors.ProgramLimitExceeded,
)
_REPEAT = (errors.DeadlockDetected, errors.SerializationFailure)
_FULL = (errors.DiskFull, errors.OutOfMemory)
_MOST_ROWS = 2000


class Postgresql:
    """The open database."""

    shared = True
    unstorable: tuple[type[Exception], ...] = _UNSTORABLE

    def __init__(self, url: str, *, read_only: bool = False, partitions: int = 1) -> None:
        self._url, self._read_only = url, read_only
        self.name = named(url)
        self._inside = False
        self._streams = 0
        with self._translated():
            self._connect()
        try:
            with self._translated():
                self._prepare(partitions)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._raw.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        with self._within("BEGIN ISOLATION LEVEL READ COMMITTED") as connection:
            yield connection
            self._raw.execute("COMMIT")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        if self._inside:
            yield self._connection
            return
        with self._within("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY") as connection:
            yield connection
            self._raw.execute("ROLLBACK")

    def execute(self, sql: str, values: Values = ()) -> Cursor:
        with self._translated():
            self._ready()
            return self._connection.execute(sql, values)

    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]:
        """Outside a snapshot the server keeps a copy until the end."""
        with self._translated():
            self._ready()
            self._streams += 1
            name = f"stream_{self._streams}"
            with self._raw.cursor(name, binary=True, withhold=not self._inside) as cursor:
                cursor.itersize = _MOST_ROWS
                yield from cursor.execute(translated(sql), values)

    def lead(self, job: str) -> bool:
        # Of this schema: several fleets may share a database. Asking again holds it once more, which does no harm.
        sql = "SELECT pg_try_advisory_lock(hashtext(current_schema()), hashtext(?))"
        return bool(self.execute(sql, (job,)).fetchone()[0])

    @contextlib.contextmanager
    def _within(self, begin: str) -> Iterator[Connection]:
        with self._translated():
            self._ready()
            self._raw.execute(begin)
            self._inside = True
            try:
                yield self._connection
            except BaseException:
                # Where the connection is gone, so is the transaction.
                with contextlib.suppress(psycopg.Error):
                    self._raw.execute("ROLLBACK")
                raise
            finally:
                self._inside = False

    def _ready(self) -> None:
        """A new connection in place of one that was lost, but never in the middle of a transaction."""
        if self._raw.closed and not self._inside:
            self._connect()

    def _connect(self) -> None:
        given = psycopg.conninfo.conninfo_to_dict(self._url)
        asked = psycopg.conninfo.make_conninfo(self._url, **{k: v for k, v in _DEFAULTS.items() if k not in given})
        connection = psycopg.connect(asked, autocommit=True)
        try:
            if self._read_only:
                connection.execute("SET default_transaction_read_only = on")
            elif _setting(connection, "synchronous_commit") in ("off", "local"):
                # Less, and what was acknowledged is lost with the server's power.
                connection.execute("SET synchronous_commit = on")
        except BaseException:
            connection.close()
            raise
        self._raw, self._connection = connection, Connection(connection)

    def _prepare(self, partitions: int) -> None:
        encoding = self._raw.execute("SHOW server_encoding").fetchone()
        if encoding != ("UTF8",):
            raise UsageError(f"{self.name}: is a database in {encoding and encoding[0]}; make one with ENCODING 'UTF8'")
        if not self._read_only and _setting(self._raw, "fsync") == "off":
            logger.warning("%s: has fsync off; what is acknowledged can be lost with the server's power", self.name)
        if self._read_only:
            postgresql_schema.require_current(self._raw, self.name)
        else:
            postgresql_schema.migrate(self._raw, self.name, partitions)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _UNSTORABLE:
            raise
        except psycopg.Error as error:
            kind = StorageFull if isinstance(error, _FULL) else StorageError
            if isinstance(error, errors.LockNotAvailable):
                kind = StorageBusy
            if isinstance(error, _REPEAT):
                kind = Repeat
            said = [*str(error).strip().splitlines(), type(error).__name__]
            raise kind(f"{self.name}: {said[0]}") from error


def _setting(connection: psycopg.Connection[Any], name: str) -> str:
    row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
    return str(row[0]) if row else ""
