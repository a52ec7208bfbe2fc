"""Rows of the tables that follow from single messages, read once in the order of the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from agent import clock
from agent.fleet.database.interface import Row
from agent.fleet.database.projection import RESULTS_TABLE, TABLES, TableRows
from agent.fleet.database.store import Devices, FleetStore

MessageKey = tuple[Any, Any, Any]
Report = Callable[[MessageKey, str], None]
_SQLITE_TYPE_RANKS: dict[type, int] = {type(None): 0, int: 1, bool: 1, float: 1, str: 2, bytes: 3}


class StoredTables:
    """The rows that messages added to their tables: `read` those of each message in order, then `finish`."""

    def __init__(self, store: FleetStore, devices: Devices, report: Report) -> None:
        self._tables = [_TableReader(table, store.projected_rows(table, devices), report) for table in TABLES]
        self._report = report

    def read(self, key: MessageKey) -> list[list[Row]]:
        """Return the rows of a message in each table."""
        return [table.consume(key) for table in self._tables]

    def compare(self, stored: list[list[Row]], expected: TableRows) -> Iterator[str]:
        """Yield how the rows that were read differ from those that the message gives."""
        for table, rows in zip(self._tables, stored, strict=True):
            if problem := _compare(table.name, rows, expected.get(table.name, [])):
                yield problem

    def finish(self) -> None:
        """Report the rows behind the last message."""
        for table in self._tables:
            table.skip_to(None)


def _compare(table: str, stored: list[Row], expected: list[Row]) -> str | None:
    if table == RESULTS_TABLE and len(stored) != len(expected):
        return f"reports {len(expected)} results, but table results has {len(stored)} of them"
    if expected and not stored:
        return f"is missing in table {table}"
    # PostgreSQL appends the column `rowid` to some tables.
    width = len(expected[0]) if expected else 0
    rows = [row[:width] for row in stored]
    if rows == expected or (len(rows) == len(expected) and sorted(rows, key=repr) == sorted(expected, key=repr)):
        return None
    if table != RESULTS_TABLE:
        return f"differs from its rows in table {table}"
    different = [result for result in expected if result not in rows]
    return f"differs from table results in row {(different or expected)[0][2]}"


class _TableReader:
    def __init__(self, name: str, rows: Iterator[Row], report: Report) -> None:
        self.name, self._report = name, report
        self._groups = ((key, [row[3:] for row in group]) for key, group in groupby(rows, key=lambda row: row[:3]))
        self._next = next(self._groups, None)

    def consume(self, key: MessageKey) -> list[Row]:
        """Return the rows of one message."""
        if self._next is None:
            return []
        if self._next[0] != key:
            self.skip_to(key)
        if self._next is None or self._next[0] != key:
            return []
        rows = self._next[1]
        self._next = next(self._groups, None)
        return rows

    def skip_to(self, key: MessageKey | None) -> None:
        """Report rows before `key`, which belong to no message; None is the end."""
        while self._next is not None and (key is None or sort_key(self._next[0]) < sort_key(key)):
            noun = "results" if self.name == RESULTS_TABLE else "rows"
            self._report(self._next[0], f"is not stored, but table {self.name} has {len(self._next[1])} {noun} of it")
            self._next = next(self._groups, None)


def is_time(value: Any) -> bool:
    try:
        clock.parse_rfc3339(value)
    except (TypeError, ValueError):
        return False
    return True


def sort_key(key: Row) -> list[tuple[int, Any]]:
    """Return a sort key with SQLite's order of values of any type: NULL, numbers, text, bytes."""
    return [(_SQLITE_TYPE_RANKS[type(part)], part) for part in key]
