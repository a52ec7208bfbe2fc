"""PostgreSQL connection: statements that read or write many rows in one round trip.

Parameters of the shared statements are translated: `?` and `:name` become the placeholders of psycopg.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from outstation.fleet.database.interface import Cursor, Gap, LogId, MessageKey, Row, Values

if TYPE_CHECKING:
    import psycopg

# Quoted text and names keep their characters; psycopg looks for percent signs in them, too.
_PLACEHOLDER = re.compile(r"('(?:[^']|'')*'|\"[^\"]*\"|::)|\?|(?<![\w:]):([a-z_]+)|%")
# `%b`, binary: of arrays as text psycopg searches each element for characters to quote, at five times the cost.
_LOCK_DEVICES = "SELECT FROM devices WHERE device = ANY(%b) ORDER BY device FOR NO KEY UPDATE"
# Readers continue after the last `rowid` they saw; no row may appear later with a lower number.
_SERIALIZED_TABLE = "shadows"
_COLUMN_TYPES = """
    SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"""
_ADD_MESSAGES = """
    INSERT INTO messages (device, log, seq, kind, topic, payload, jws, received)
    SELECT * FROM unnest(%b::text[], %b::text[], %b::bigint[], %b::text[], %b::text[], %b::bytea[], %b::text[],
                         %b::text[])
    ON CONFLICT DO NOTHING RETURNING device, log, seq"""
_PAYLOADS = """
    SELECT m.device, m.log, m.seq, m.payload FROM unnest(%b::text[], %b::text[], %b::bigint[]) AS k (device, log, seq)
    JOIN messages m ON m.device = k.device AND m.log = k.log AND m.seq = k.seq"""
_LOGS = """
    SELECT k.device, k.log, l.last_seq, coalesce(e.last_seq, 0) FROM unnest(%b::text[], %b::text[]) AS k (device, log)
    LEFT JOIN logs l ON l.device = k.device AND l.log = k.log
    LEFT JOIN log_ends e ON e.device = k.device AND e.log = k.log"""
_STORE_LOGS = """
    INSERT INTO logs (device, log, last_seq, since, latest, live)
    SELECT device, log, last_seq, latest, latest, TRUE FROM unnest(%b::text[], %b::text[], %b::bigint[], %b::text[])
           WITH ORDINALITY AS k (device, log, last_seq, latest, nth) ORDER BY nth
    ON CONFLICT (device, log) DO UPDATE SET
        last_seq = excluded.last_seq, latest = greatest(logs.latest, excluded.latest)"""
_GAPS = """
    SELECT g.device, g.log, g.first, g.last, g.declared
    FROM unnest(%b::text[], %b::text[], %b::bigint[], %b::bigint[]) AS k (device, log, a, b)
    CROSS JOIN LATERAL (
        SELECT * FROM gaps WHERE device = k.device AND log = k.log AND first <= k.b AND first >= coalesce((
            SELECT max(first) FROM gaps WHERE device = k.device AND log = k.log AND first <= k.a), 0)) g"""
_DELETE_GAPS = """
    DELETE FROM gaps g USING unnest(%b::text[], %b::text[], %b::bigint[]) AS k (device, log, first)
    WHERE g.device = k.device AND g.log = k.log AND g.first = k.first"""
_UNDECLARED_GAPS = """
    SELECT g.device, g.log, g.first, g.last FROM unnest(%b::text[], %b::text[]) AS k (device, log)
    CROSS JOIN LATERAL (
        SELECT * FROM gaps WHERE device = k.device AND log = k.log AND NOT declared ORDER BY first LIMIT %s) g
    ORDER BY g.device, g.log, g.first"""
_REVOCATION_TIMES = "SELECT kid, revoked FROM keys WHERE kid = ANY(%b)"
_UPDATE_LAST_SEEN = "UPDATE devices SET last_seen = %s WHERE device = ANY(%b)"


class PostgresqlConnection:
    """A connection with the methods of the interface, valid while `raw` is connected."""

    def __init__(self, raw: psycopg.Connection[Row]) -> None:
        self._raw = raw
        # Table → (name, type) of each column, read at its first insert.
        self._columns: dict[str, list[tuple[str, str]]] = {}

    def execute(self, sql: str, values: Values = (), /) -> Cursor:
        return self._raw.execute(to_psycopg(sql), values, binary=True)

    def executemany(self, sql: str, rows: Iterable[Values], /) -> None:
        if rows := [*rows]:
            with self._raw.cursor() as cursor:
                cursor.executemany(to_psycopg(sql), rows)

    def to_dialect(self, sql: str) -> str:
        # The sum of integers is a NUMERIC, which does not overflow.
        return sql.replace("TOTAL(", "sum(")

    def execute_each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        text = to_psycopg(sql)
        with self._raw.pipeline():
            cursors = [self._raw.execute(text, row, binary=True) for row in rows]
            return [cursor.fetchone() for cursor in cursors]

    def lock_devices(self, devices: Iterable[str]) -> None:
        # Sorted, so that two transactions never wait for each other.
        if names := sorted(devices):
            self._raw.execute(_LOCK_DEVICES, (names,))

    def lock_table(self, table: str) -> None:
        self._raw.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")

    def add_messages(self, rows: Sequence[Row]) -> list[bool]:
        if not rows:
            return []
        first: dict[Any, int] = {}
        for i, row in enumerate(rows):
            first.setdefault(row[:3], i)
        # Sorted by key: two transactions that insert the same messages never wait for each other.
        unique = [rows[i] for _, i in sorted(first.items())]
        new = {*self._raw.execute(_ADD_MESSAGES, _transpose(unique), binary=True)}
        return [row[:3] in new and first[row[:3]] == i for i, row in enumerate(rows)]

    def payloads(self, keys: Sequence[MessageKey]) -> list[bytes | None]:
        if not keys:
            return []
        rows = self._raw.execute(_PAYLOADS, _transpose(keys), binary=True)
        stored = {(device, log, seq): payload for device, log, seq, payload in rows}
        return [stored.get(key) for key in keys]

    def bulk_insert(self, table: str, rows: Sequence[Row]) -> None:
        if table == _SERIALIZED_TABLE:
            self.lock_table(table)
        columns = self._read_columns(table)[: len(rows[0])]
        names = ", ".join(f'"{name}"' for name, _ in columns)
        # Text would cost twice as much per value, on both sides.
        statement = f"COPY {table} ({names}) FROM STDIN (FORMAT BINARY)"
        with self._raw.cursor() as cursor, cursor.copy(statement) as copy:
            copy.set_types([kind for _, kind in columns])
            for row in rows:
                copy.write_row(row)

    def insert_missing(self, table: str, rows: Sequence[Row]) -> None:
        if rows:
            arrays = ", ".join(f"%b::{kind}[]" for _, kind in self._read_columns(table))
            sql = f"INSERT INTO {table} SELECT * FROM unnest({arrays}) ON CONFLICT DO NOTHING"
            self._raw.execute(sql, _transpose(rows))

    def _read_columns(self, table: str) -> list[tuple[str, str]]:
        if table not in self._columns:
            self._columns[table] = self._raw.execute(_COLUMN_TYPES, (table,)).fetchall()
        return self._columns[table]

    def logs(self, logs: Sequence[LogId]) -> dict[LogId, tuple[int | None, int]]:
        if not logs:
            return {}
        rows = self._raw.execute(_LOGS, _transpose(logs), binary=True)
        return {(device, log): (last_seq, end) for device, log, last_seq, end in rows}

    def store_logs(self, logs: Sequence[tuple[str, str, int, str]], known: set[LogId]) -> None:
        if logs:
            self._raw.execute(_STORE_LOGS, _transpose(logs))

    def gaps(self, spans: Mapping[LogId, tuple[int, int]]) -> dict[LogId, list[Gap]]:
        if not spans:
            return {}
        columns = _transpose([(*log, a - 1, b + 1) for log, (a, b) in spans.items()])
        gaps: dict[LogId, list[Gap]] = {}
        for device, log, first, last, declared in self._raw.execute(_GAPS, columns, binary=True):
            gaps.setdefault((device, log), []).append((first, last, declared))
        return gaps

    def store_gaps(self, removed: Sequence[MessageKey], added: Sequence[tuple[str, str, int, int, bool]]) -> None:
        if removed:
            self._raw.execute(_DELETE_GAPS, _transpose(removed))
        if added:
            self.bulk_insert("gaps", added)

    def undeclared_gaps(self, logs: Sequence[LogId], limit: int) -> dict[LogId, list[tuple[int, int]]]:
        gaps: dict[LogId, list[tuple[int, int]]] = {log: [] for log in logs}
        if logs:
            rows = self._raw.execute(_UNDECLARED_GAPS, (*_transpose(logs), limit), binary=True)
            for device, log, first, last in rows:
                gaps[device, log].append((first, last))
        return gaps

    def revocation_times(self, kids: Sequence[str]) -> dict[str, str | None]:
        return dict(self._raw.execute(_REVOCATION_TIMES, ([*kids],)).fetchall())

    def update_last_seen(self, devices: Sequence[str], now: str) -> None:
        if devices:
            self._raw.execute(_UPDATE_LAST_SEEN, (now, [*devices]))


def _transpose(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


# Statements are constants, a few with the name of a table in them.
@lru_cache(maxsize=1000)
def to_psycopg(sql: str) -> str:
    """Translate `?` to `%s` and `:name` to `%(name)s`."""
    return _PLACEHOLDER.sub(_replace_placeholder, sql)


def _replace_placeholder(match: re.Match[str]) -> str:
    quoted, name = match.groups()
    if quoted:
        return str(quoted).replace("%", "%%")
    if name:
        return f"%({name})s"
    return "%s" if match.group() == "?" else "%%"
