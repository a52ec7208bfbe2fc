"""Rows of the tables that follow from single messages, read once in the order of the messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any

from outstation.fleet.database.interface import Row
from outstation.fleet.database.projection import TableRows
from outstation.fleet.database.schema.message_tables import ALERTS, PROJECTED, RESULTS
from outstation.fleet.database.store import Devices, FleetStore
from outstation.foundation import clock

MessageKey = tuple[Any, Any, Any]
Report = Callable[[MessageKey, str], None]
# (table, message, its rows)
OrphanReport = Callable[[str, MessageKey, list[Row]], None]
_SQLITE_TYPE_RANKS: dict[type, int] = {type(None): 0, int: 1, bool: 1, float: 1, str: 2, bytes: 3}


class StoredTables:
    """The rows that messages added to their tables: `read` those of each message in order, then `finish`."""

    def __init__(
        self, store: FleetStore, devices: Devices, report: Report, retained: dict[MessageKey, Row] | None = None
    ) -> None:
        """`retained`: rows of table alerts that stayed although their messages were pruned."""
        self._report, self._retained = report, retained or {}
        self._tables = [
            _TableReader(table, *store.projected_rows(table, devices), self._accept_orphans) for table in PROJECTED
        ]

    def read(self, key: MessageKey) -> TableRows:
        """Return the rows of a message by table, without the tables that have none."""
        place, stored = sort_key(key), TableRows()
        for table in self._tables:
            # Most messages have rows in one table.
            if table.place is not None and table.place <= place and (rows := table.consume(place)):
                stored[table.name] = rows
        return stored

    def compare(self, stored: TableRows, expected: TableRows) -> Iterator[str]:
        """Yield how the rows that were read differ from those that the message gives."""
        if stored == expected:
            return
        for table in PROJECTED:
            if problem := describe_difference(table, stored.get(table, []), expected.get(table, [])):
                yield problem

    def finish(self) -> None:
        """Report the rows behind the last message."""
        for table in self._tables:
            table.skip_to(None)
        for key, row in self._retained.items():
            self.report_missing(key, row)

    def report_missing(self, key: MessageKey, _row: Row) -> None:
        """Report that the alert of a pruned message is not stored, although it is open."""
        self._report(key, "was pruned, but its open alert is missing in table alerts")

    def report_orphans(self, table: str, key: MessageKey, rows: list[Row]) -> None:
        """Report the rows of a message that is not stored."""
        noun = "results" if table == RESULTS.name else "rows"
        self._report(key, f"is not stored, but table {table} has {len(rows)} {noun} of it")

    def _accept_orphans(self, table: str, key: MessageKey, rows: list[Row]) -> None:
        retained = self._retained.get(key) if table == ALERTS.name else None
        if retained is not None and [row[: len(retained)] for row in rows] == [retained]:
            del self._retained[key]
        else:
            self.report_orphans(table, key, rows)


def describe_difference(table: str, stored: list[Row], expected: list[Row]) -> str | None:
    """Return how a message's rows of one table differ from those that it gives; None if they are the same."""
    if table == RESULTS.name and len(stored) != len(expected):
        return f"reports {len(expected)} results, but table results has {len(stored)} of them"
    if expected and not stored:
        return f"is missing in table {table}"
    # PostgreSQL appends the column `rowid` to some tables.
    width = len(expected[0]) if expected else 0
    rows = [row[:width] for row in stored]
    if rows == expected or (len(rows) == len(expected) and sorted(rows, key=repr) == sorted(expected, key=repr)):
        return None
    if table != RESULTS.name:
        return f"differs from its rows in table {table}"
    different = [result for result in expected if result not in rows]
    return f"differs from table results in row {(different or expected)[0][2]}"


class _TableReader:
    """Reads a table message by message. `place`: sort key of the next message that has rows; None at the end."""

    def __init__(self, name: str, columns: list[str], rows: Iterator[Row], report: OrphanReport) -> None:
        self.name, self.columns, self._report = name, columns, report
        key: Callable[[Row], Row] = itemgetter(*(columns.index(column) for column in ("device", "log", "seq")))
        self._groups = groupby(rows, key)
        self.place: Row | None = None
        self._advance()

    def consume(self, place: Row) -> list[Row]:
        """Return the rows of the message at `place`."""
        self.skip_to(place)
        if self.place != place:
            return []
        rows = self._rows
        self._advance()
        return rows

    def skip_to(self, place: Row | None) -> None:
        """Report rows before `place`, which belong to no message; None is the end."""
        while self.place is not None and (place is None or self.place < place):
            self._report(self.name, self._key, self._rows)
            self._advance()

    def _advance(self) -> None:
        key, group = next(self._groups, ((), ()))
        self._key, self._rows = key, [*group]
        self.place = sort_key(key) if key else None


@lru_cache(maxsize=256)
def is_time(value: Any) -> bool:
    try:
        clock.parse_rfc3339(value)
    except (TypeError, ValueError):
        return False
    return True


def sort_key(key: Row) -> Row:
    """Return a sort key with SQLite's order of values of any type: NULL, numbers, text, bytes."""
    return tuple([part for value in key for part in (_SQLITE_TYPE_RANKS[type(value)], value)])
