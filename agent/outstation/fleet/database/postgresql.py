"""PostgreSQL implementation of the fleet database, which several collectors may share.

One connection, opened again when it is lost. Transactions are READ COMMITTED under the row locks of `lock_devices`;
snapshots are REPEATABLE READ. A connection pooler must be in session mode, because the leader holds an advisory lock
of its session and statements are prepared in it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from outstation.fleet.database.interface import Cursor, Row, TransactionConflict, Values, display_name
from outstation.fleet.database.postgresql_rows import PostgresqlConnection, to_psycopg
from outstation.fleet.database.schema import translation
from outstation.foundation.errors import StorageBusy, StorageError, StorageFull, UsageError
from outstation.foundation.extras import install_command

# Sessions with the shared lock: pg_locks shows its two halves as unsigned numbers.
_COUNT_COLLECTORS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND classid::bigint = hashtext(current_schema())::bigint & 4294967295
        AND objid::bigint = hashtext('collectors')::bigint & 4294967295"""

try:
    import psycopg
    from psycopg import errors
except ImportError as error:
    raise UsageError(
        f"a database in PostgreSQL needs the library psycopg ({error}); install it: {install_command('postgres')}"
    ) from None

logger = logging.getLogger(__name__)

# Limits on waiting for a network or server that is gone; the URL may override them.
_CONNECTION_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "60000",
    "application_name": "outstation",
}
_UNSTORABLE_ERRORS = (
    *(OverflowError, UnicodeEncodeError, psycopg.DataError, psycopg.IntegrityError),
    # An index cannot hold a name of several kilobytes.
    errors.ProgramLimitExceeded,
)
_CONFLICT_ERRORS = (errors.DeadlockDetected, errors.SerializationFailure)
_DISK_FULL_ERRORS = (errors.DiskFull, errors.OutOfMemory)
_FETCH_ROWS = 2000


class PostgresqlDatabase:
    shared = True
    unstorable_errors: tuple[type[Exception], ...] = _UNSTORABLE_ERRORS

    def __init__(self, url: str, *, read_only: bool = False, partitions: int = 1) -> None:
        self._url, self._read_only = url, read_only
        self.name = display_name(url)
        self._in_transaction = False
        self._stream_count = 0
        with self._translate_errors():
            self._connect()
            try:
                encoding = _read_setting(self._raw, "server_encoding")
                if encoding != "UTF8":
                    problem = f"its encoding is {encoding}; create the database with ENCODING 'UTF8'"
                    raise UsageError(f"{self.name}: {problem}")
                if read_only:
                    translation.require_current(self._raw, self.name)
                else:
                    if _read_setting(self._raw, "fsync") == "off":
                        problem = "fsync is off; a power failure of the server can lose acknowledged messages"
                        logger.warning("%s: %s", self.name, problem)
                    translation.migrate(self._raw, self.name, partitions)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        self._raw.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[PostgresqlConnection]:
        with self._begin("BEGIN ISOLATION LEVEL READ COMMITTED") as connection:
            yield connection
            self._raw.execute("COMMIT")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[PostgresqlConnection]:
        if self._in_transaction:
            yield self._connection
            return
        with self._begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY") as connection:
            yield connection
            self._raw.execute("ROLLBACK")

    def execute(self, sql: str, values: Values = ()) -> Cursor:
        with self._translate_errors():
            self._ensure_connected()
            return self._connection.execute(sql, values)

    def as_stored(self, column: str) -> str:
        return column

    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]:
        """Read rows through a server-side cursor; outside a snapshot the server materialises the result."""
        with self._translate_errors():
            self._ensure_connected()
            self._stream_count += 1
            name = f"stream_{self._stream_count}"
            with self._raw.cursor(name, binary=True, withhold=not self._in_transaction) as cursor:
                cursor.itersize = _FETCH_ROWS
                yield from cursor.execute(to_psycopg(sql), values)

    def acquire_leadership(self, job: str) -> bool:
        # Per schema: several fleets may share a database. The lock counts repeated requests, which does no harm.
        sql = "SELECT pg_try_advisory_lock(hashtext(current_schema()), hashtext(?))"
        return bool(self.execute(sql, (job,)).fetchone()[0])

    def join_collectors(self) -> int:
        self.execute("SELECT pg_try_advisory_lock_shared(hashtext(current_schema()), hashtext('collectors'))")
        return int(self.execute(_COUNT_COLLECTORS).fetchone()[0])

    def exclude_collectors(self) -> bool:
        return int(self.execute(_COUNT_COLLECTORS).fetchone()[0]) == 0

    @contextlib.contextmanager
    def _begin(self, begin: str) -> Iterator[PostgresqlConnection]:
        with self._translate_errors():
            self._ensure_connected()
            self._raw.execute(begin)
            self._in_transaction = True
            try:
                yield self._connection
            except BaseException:
                # A lost connection has rolled the transaction back already.
                with contextlib.suppress(psycopg.Error):
                    self._raw.execute("ROLLBACK")
                raise
            finally:
                self._in_transaction = False

    def _ensure_connected(self) -> None:
        """Connect again if the connection was lost, but never inside a transaction."""
        if self._raw.closed and not self._in_transaction:
            self._connect()

    def _connect(self) -> None:
        options = psycopg.conninfo.conninfo_to_dict(self._url)
        defaults = {name: value for name, value in _CONNECTION_DEFAULTS.items() if name not in options}
        connection = psycopg.connect(psycopg.conninfo.make_conninfo(self._url, **defaults), autocommit=True)
        try:
            if self._read_only:
                connection.execute("SET default_transaction_read_only = on")
            elif _read_setting(connection, "synchronous_commit") in ("off", "local"):
                # With a weaker setting, a power failure of the server loses acknowledged messages.
                connection.execute("SET synchronous_commit = on")
        except BaseException:
            connection.close()
            raise
        self._raw, self._connection = connection, PostgresqlConnection(connection)

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except _UNSTORABLE_ERRORS:
            raise
        except psycopg.Error as error:
            kind = StorageFull if isinstance(error, _DISK_FULL_ERRORS) else StorageError
            if isinstance(error, errors.LockNotAvailable):
                kind = StorageBusy
            if isinstance(error, _CONFLICT_ERRORS):
                kind = TransactionConflict
            lines = [*str(error).strip().splitlines(), type(error).__name__]
            raise kind(f"{self.name}: {lines[0]}") from error


def _read_setting(connection: psycopg.Connection[Any], name: str) -> str:
    (setting,) = connection.execute("SELECT current_setting(%s)", (name,)).fetchone() or ("",)
    return str(setting)
