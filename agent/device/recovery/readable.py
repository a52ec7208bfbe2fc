"""Reads what can be read of a damaged database: row by row where a page is bad, to what lies behind it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent.device.recovery import raw_pages

# Rows that fail one after the other before the rest of a table counts as lost: more than hang on one page of an index.
_MAX_FAILURES = 50_000
# Behind so many failures the steps get longer.
_SINGLE_STEP_FAILURES = 2_000
_MAX_ROWID = 2**63 - 1


class DamagedDatabase:
    """The tables of a database that may be damaged anywhere. `lost`: whether anything of a table could not be read."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.incomplete_tables: set[str] = set()

    def columns(self, table: str) -> list[str]:
        """Those of `table`; none where it is not there or cannot be read."""
        try:
            return [str(row[1]) for row in self._db.execute(f"PRAGMA table_info({table})")]
        except sqlite3.Error:
            self.incomplete_tables.add(table)
            return []

    def read_by_rowid(
        self, table: str, columns: list[str], gaps: list[tuple[int, int]], last: int = _MAX_ROWID
    ) -> Iterator[tuple[Any, ...]]:
        """(rowid, columns …) of every row that can be read, ascending; to `gaps` the rowids where none could."""
        sql = f"SELECT rowid, {', '.join(columns)} FROM {table} WHERE rowid >= ? ORDER BY rowid"
        at, failures, gap = -_MAX_ROWID, 0, 0
        while at <= last:
            got = False
            try:
                for row in self._db.execute(sql, (at,)):
                    if type(row[0]) is not int or row[0] < at:
                        raise sqlite3.DatabaseError("rowids run backwards")
                    if failures:
                        gaps.append((gap, row[0] - 1))
                        failures = 0
                    yield row
                    at, got = row[0] + 1, True
                if failures:
                    gaps.append((gap, last))
                return
            except sqlite3.Error:
                self.incomplete_tables.add(table)
            if got or not failures:
                gap, failures = max(at, 1), 0
            at = max(at, 0) + 1 + max(0, failures - _SINGLE_STEP_FAILURES)
            failures += 1
            if failures > _MAX_FAILURES:
                break
        gaps.append((gap, last))

    def read_by_key(self, table: str, key: list[str], columns: list[str]) -> Iterator[tuple[Any, ...]]:
        """Rows of a table WITHOUT ROWID: from its beginning to the damage, and from its end to the damage."""
        seen = set()
        width = len(key)
        for direction in ("", " DESC"):
            order = ", ".join(f"{name}{direction}" for name in key)
            try:
                for row in self._db.execute(f"SELECT {', '.join([*key, *columns])} FROM {table} ORDER BY {order}"):
                    if row[:width] not in seen:
                        seen.add(row[:width])
                        yield row
                return
            except sqlite3.Error:
                self.incomplete_tables.add(table)

    def read_orphaned_rows(self) -> Iterator[tuple[int, list[Any]]]:
        """(rowid, values) of every row of whatever table, deleted ones too, wherever a page of it is left."""
        path = str(self._db.execute("PRAGMA database_list").fetchone()[2])
        return raw_pages.read_leaf_rows(Path(path))

    def try_query(self, sql: str, *values: int) -> list[tuple[Any, ...]] | None:
        """All rows of a statement; None where one of them cannot be read."""
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error:
            return None
