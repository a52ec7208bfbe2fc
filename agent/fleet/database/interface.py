"""Where a fleet's tables are: SQLite, or PostgreSQL for several collectors beside each other.

All SQL is written once, with `?` or `:name`, in words that both know; where they differ, or where PostgreSQL wants
one statement for many rows in place of many statements, it is a method of `Connection`. What is a flag is BOOLEAN in
PostgreSQL and 0 or 1 in SQLite, and `rowid` counts rows in the order in which they came, in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from agent.errors import StorageBusy

Row = tuple[Any, ...]
Values = Sequence[Any] | Mapping[str, Any]
MAX_PARTITIONS = 1024
# (device, log)
LogId = tuple[str, str]
# (first, last, declared)
Gap = tuple[int, int, bool]

INSERT_MESSAGE = "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, log, seq) DO NOTHING"


class TransactionConflict(StorageBusy):
    """Another process changed the same rows at the same moment; nothing of this transaction is there, do it again."""


class Cursor(Protocol):
    """The answer of a statement."""

    @property
    def description(self) -> Any: ...
    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """What a transaction or a snapshot gives."""

    def execute(self, sql: str, values: Any = ..., /) -> Cursor: ...
    def executemany(self, sql: str, rows: Any, /) -> object: ...

    def to_dialect(self, sql: str) -> str:
        """A statement with LEAST, GREATEST or TOTAL (a sum that does not overflow), in this database's words."""

    def execute_each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        """The statement with each of these; the first row of each answer, None where it has none."""

    def lock_devices(self, devices: Iterable[str]) -> None:
        """Nobody else changes what belongs to these devices until the transaction ends; call it once in each."""

    def lock_table(self, table: str) -> None:
        """Nobody else writes it until the transaction ends."""

    def add_messages(self, rows: Sequence[Row]) -> list[bool]:
        """Of each row of table messages, whether it is new: its place is empty, and so it was before in `rows`."""

    def payloads(self, places: Sequence[tuple[str, str, int]]) -> list[bytes | None]:
        """Of the message at each (device, log, seq); None where there is none."""

    def bulk_insert(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows that nobody else adds."""

    def logs(self, logs: Sequence[LogId]) -> dict[LogId, tuple[int | None, int]]:
        """(`through` of table logs, None where it is not there; `last` of table ends, 0 likewise) of each."""

    def store_logs(self, logs: Mapping[LogId, int], known: set[LogId], since: str) -> None:
        """Set `through` of each; those not `known` are added in their order."""

    def gaps(self, spans: Mapping[LogId, tuple[int, int]]) -> dict[LogId, list[Gap]]:
        """Those of each log that overlap its span, or touch it."""

    def store_gaps(
        self, removed: Sequence[tuple[str, str, int]], added: Sequence[tuple[str, str, int, int, bool]]
    ) -> None:
        """Take away those that begin there, then add."""

    def undeclared_gaps(self, logs: Sequence[LogId], limit: int) -> dict[LogId, list[tuple[int, int]]]:
        """The first `most` of each log that no message declares, ascending."""

    def revocation_times(self, kids: Sequence[str]) -> dict[str, str | None]:
        """Since when each of these keys is; those that are not enrolled are left out."""

    def update_last_seen(self, devices: Sequence[str], now: str) -> None:
        """Note that these devices were heard of."""


class Database(Protocol):
    """An open database; one thread. Raises StorageError (Full, Busy) where it fails, UsageError where it is none."""

    name: str
    """For people: the file, or the URL without a password."""
    shared: bool
    """Whether several collectors may write it."""
    unstorable_errors: tuple[type[Exception], ...]
    """What is raised for values that it cannot hold: one such message must not hold up the others."""

    def transaction(self) -> AbstractContextManager[Connection]: ...
    def snapshot(self) -> AbstractContextManager[Connection]: ...
    def execute(self, sql: str, values: Values = ()) -> Cursor: ...
    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]: ...

    def acquire_leadership(self, job: str) -> bool:
        """Whether this process does `job`, of all that have this database open; for as long as it is connected."""

    def close(self) -> None: ...


@lru_cache
def to_sqlite_dialect(sql: str) -> str:
    """What `spoken` gives in SQLite."""
    return sql.replace("GREATEST(", "max(").replace("LEAST(", "min(").replace("TOTAL(", "total(")


def is_postgresql(location: Path | str) -> bool:
    return isinstance(location, str) and location.startswith(("postgresql://", "postgres://"))


def display_name(location: Path | str) -> str:
    """For people: the absolute path, or the URL without a password."""
    if not is_postgresql(location):
        return str(Path(location).absolute())
    parts = urlsplit(str(location))
    user, at, host = parts.netloc.rpartition("@")
    query = "&".join(one for one in parts.query.split("&") if not one.startswith(("password=", "sslpassword=")))
    return urlunsplit(parts._replace(netloc=user.partition(":")[0] + at + host, query=query))


def open_database(location: Path | str, *, read_only: bool = False, partitions: int = 1) -> Database:
    """`where`: a file, or a `postgresql://` URL; `partitions`: of a PostgreSQL database that has no tables yet."""
    if is_postgresql(location):
        # Its library is an extra, which a fleet with SQLite does without.
        from agent.fleet.database.postgresql import PostgresqlDatabase

        return PostgresqlDatabase(str(location), read_only=read_only, partitions=partitions)
    from agent.fleet.database.sqlite import SqliteDatabase

    return SqliteDatabase(Path(location), read_only=read_only)
