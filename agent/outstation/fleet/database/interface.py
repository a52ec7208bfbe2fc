"""Protocols of the fleet database, which SQLite and PostgreSQL implement.

Statements are written once, with `?` or `:name`, in SQL that both databases understand. A method of `Connection` covers
each place where they differ, or where PostgreSQL needs one statement for many rows. Flags are BOOLEAN, which SQLite
stores as 0 or 1. The column `rowid` numbers the rows of a table in order of arrival in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from outstation.foundation.errors import StorageBusy

Row = tuple[Any, ...]
Values = Sequence[Any] | Mapping[str, Any]
MAX_PARTITIONS = 1024
# (device, log)
LogId = tuple[str, str]
# (device, log, seq)
MessageKey = tuple[str, str, int]
# (first, last, declared)
Gap = tuple[int, int, bool]


class TransactionConflict(StorageBusy):
    """Another process changed the same rows; the transaction was rolled back and can be tried again."""


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def description(self) -> Any: ...
    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A connection inside a transaction or snapshot."""

    def execute(self, sql: str, values: Any = ..., /) -> Cursor: ...
    def executemany(self, sql: str, rows: Any, /) -> object: ...

    def to_dialect(self, sql: str) -> str:
        """Translate LEAST, GREATEST and TOTAL (a sum that does not overflow) for this database."""

    def execute_each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        """Run the statement once per row; return the first row of each result, None where it is empty."""

    def lock_devices(self, devices: Iterable[str]) -> None:
        """Lock the rows of these devices until the transaction ends; at most once per transaction."""

    def lock_table(self, table: str) -> None:
        """Block other writers of the table until the transaction ends."""

    def add_messages(self, rows: Sequence[Row]) -> list[bool]:
        """Insert rows of table messages; return True for each whose key was free, also among `rows`."""

    def payloads(self, keys: Sequence[MessageKey]) -> list[bytes | None]:
        """Return the payload of the message at each (device, log, seq), None where there is none."""

    def bulk_insert(self, table: str, rows: Sequence[Row]) -> None:
        """Insert rows whose keys no other process inserts."""

    def insert_missing(self, table: str, rows: Sequence[Row]) -> None:
        """Insert the rows whose keys are free; they differ in their keys."""

    def logs(self, logs: Sequence[LogId]) -> dict[LogId, tuple[int | None, int]]:
        """Return (`last_seq` of table logs, None if absent; `last_seq` of table log_ends, 0 if absent) of each log."""

    def store_logs(self, logs: Sequence[tuple[str, str, int, str]], known: set[LogId]) -> None:
        """Set `last_seq` and `latest` of each (device, log, …); insert the logs that are not `known` in their order."""

    def gaps(self, spans: Mapping[LogId, tuple[int, int]]) -> dict[LogId, list[Gap]]:
        """Return the gaps of each log that overlap or touch its span."""

    def store_gaps(self, removed: Sequence[MessageKey], added: Sequence[tuple[str, str, int, int, bool]]) -> None:
        """Delete the gaps with these (device, log, first), then insert the others."""

    def undeclared_gaps(self, logs: Sequence[LogId], limit: int) -> dict[LogId, list[tuple[int, int]]]:
        """Return the first `limit` undeclared gaps of each log, ascending."""

    def revocation_times(self, kids: Sequence[str]) -> dict[str, str | None]:
        """Return when each enrolled key was revoked, None where it was not; omit unknown keys."""

    def update_last_seen(self, devices: Sequence[str], now: str) -> None:
        """Set `last_seen` of these devices."""


class Database(Protocol):
    """An open database, for one thread. Raises StorageError (Full, Busy) when it fails, UsageError when unusable."""

    name: str
    """Display name: the file, or the URL without its password."""
    shared: bool
    """True if several collectors may write it."""
    unstorable_errors: tuple[type[Exception], ...]
    """Exceptions for values that the database cannot store: such a message must not block the others."""

    def transaction(self) -> AbstractContextManager[Connection]: ...
    def snapshot(self) -> AbstractContextManager[Connection]: ...
    def execute(self, sql: str, values: Values = ()) -> Cursor: ...
    def as_stored(self, column: str) -> str:
        """Return an expression for a column that gives a damaged cell as it is, instead of StorageDamaged."""

    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]: ...

    def acquire_leadership(self, job: str) -> bool:
        """Return True if this process holds `job` among all that have the database open, until it disconnects."""

    def join_collectors(self) -> int:
        """Count this process among the collectors that have the database open; return how many there are."""

    def exclude_collectors(self) -> bool:
        """Return True if no collector has the database open; SQLite keeps them out until this one is closed."""

    def close(self) -> None: ...


def fetch_dicts(db: Connection | Database, sql: str, *values: Any) -> list[dict[str, Any]]:
    """Return the rows of a query as column → value."""
    cursor = db.execute(sql, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def is_postgresql(location: Path | str) -> bool:
    return isinstance(location, str) and location.startswith(("postgresql://", "postgres://"))


def display_name(location: Path | str) -> str:
    """Return the absolute path, or the URL without its password."""
    if not is_postgresql(location):
        return str(Path(location).absolute())
    parts = urlsplit(str(location))
    user, at, host = parts.netloc.rpartition("@")
    public = [item for item in parts.query.split("&") if not item.startswith(("password=", "sslpassword="))]
    return urlunsplit(parts._replace(netloc=user.partition(":")[0] + at + host, query="&".join(public)))
