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
MOST_PARTITIONS = 1024
# (device, log)
Log = tuple[str, str]
# (first, last, declared)
Gap = tuple[int, int, bool]

ADD_MESSAGE = "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (device, log, seq) DO NOTHING"


class Repeat(StorageBusy):
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

    def spoken(self, sql: str) -> str:
        """A statement with LEAST, GREATEST or TOTAL (a sum that does not overflow), in this database's words."""

    def each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        """The statement with each of these; the first row of each answer, None where it has none."""

    def lock(self, devices: Iterable[str]) -> None:
        """Nobody else changes what belongs to these devices until the transaction ends; call it once in each."""

    def alone(self, table: str) -> None:
        """Nobody else writes it until the transaction ends."""

    def add_messages(self, rows: Sequence[Row]) -> list[bool]:
        """Of each row of table messages, whether it is new: its place is empty, and so it was before in `rows`."""

    def payloads(self, places: Sequence[tuple[str, str, int]]) -> list[bytes | None]:
        """Of the message at each (device, log, seq); None where there is none."""

    def load(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows that nobody else adds."""

    def logs(self, which: Sequence[Log]) -> dict[Log, tuple[int | None, int]]:
        """(`through` of table logs, None where it is not there; `last` of table ends, 0 likewise) of each."""

    def store_logs(self, logs: Mapping[Log, int], known: set[Log], since: str) -> None:
        """Set `through` of each; those not `known` are added in their order."""

    def gaps(self, spans: Mapping[Log, tuple[int, int]]) -> dict[Log, list[Gap]]:
        """Those of each log that overlap its span, or touch it."""

    def store_gaps(self, gone: Sequence[tuple[str, str, int]], new: Sequence[tuple[str, str, int, int, bool]]) -> None:
        """Take away those that begin there, then add."""

    def undeclared(self, which: Sequence[Log], most: int) -> dict[Log, list[tuple[int, int]]]:
        """The first `most` of each log that no message declares, ascending."""

    def revoked(self, kids: Sequence[str]) -> dict[str, str | None]:
        """Since when each of these keys is; those that are not enrolled are left out."""

    def seen(self, devices: Sequence[str], now: str) -> None:
        """Note that these devices were heard of."""


class Database(Protocol):
    """An open database; one thread. Raises StorageError (Full, Busy) where it fails, UsageError where it is none."""

    name: str
    """For people: the file, or the URL without a password."""
    shared: bool
    """Whether several collectors may write it."""
    unstorable: tuple[type[Exception], ...]
    """What is raised for values that it cannot hold: one such message must not hold up the others."""

    def transaction(self) -> AbstractContextManager[Connection]: ...
    def snapshot(self) -> AbstractContextManager[Connection]: ...
    def execute(self, sql: str, values: Values = ()) -> Cursor: ...
    def stream(self, sql: str, values: Values = ()) -> Iterator[Row]: ...

    def lead(self, job: str) -> bool:
        """Whether this process does `job`, of all that have this database open; for as long as it is connected."""

    def close(self) -> None: ...


@lru_cache
def in_sqlite(sql: str) -> str:
    """What `spoken` gives in SQLite."""
    return sql.replace("GREATEST(", "max(").replace("LEAST(", "min(").replace("TOTAL(", "total(")


def is_postgresql(where: Path | str) -> bool:
    return isinstance(where, str) and where.startswith(("postgresql://", "postgres://"))


def named(where: Path | str) -> str:
    """For people: the absolute path, or the URL without a password."""
    if not is_postgresql(where):
        return str(Path(where).absolute())
    parts = urlsplit(str(where))
    user, at, host = parts.netloc.rpartition("@")
    query = "&".join(one for one in parts.query.split("&") if not one.startswith(("password=", "sslpassword=")))
    return urlunsplit(parts._replace(netloc=user.partition(":")[0] + at + host, query=query))


def opened(where: Path | str, *, read_only: bool = False, partitions: int = 1) -> Database:
    """`where`: a file, or a `postgresql://` URL; `partitions`: of a PostgreSQL database that has no tables yet."""
    if is_postgresql(where):
        # Its library is an extra, which a fleet with SQLite does without.
        from agent.fleet.database.postgresql import Postgresql

        return Postgresql(str(where), read_only=read_only, partitions=partitions)
    from agent.fleet.database.sqlite import Sqlite

    return Sqlite(Path(where), read_only=read_only)
