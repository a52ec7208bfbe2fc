"""Many rows in few round trips: the statements of a transaction in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.fleet.database.interface import Cursor, Gap, LogId, Row, Values
from agent.fleet.database.placeholders import to_psycopg

if TYPE_CHECKING:
    import psycopg

# `%b`: of arrays as text psycopg looks through each element for what must be quoted, at five times the price.
_LOCK_DEVICES = "SELECT FROM devices WHERE device = ANY(%b) ORDER BY device FOR NO KEY UPDATE"
# Who reads these rows by `rowid`, from where it was before, must not miss one with a lower number that came later.
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
    SELECT k.device, k.log, l.through, coalesce(e.last, 0) FROM unnest(%b::text[], %b::text[]) AS k (device, log)
    LEFT JOIN logs l ON l.device = k.device AND l.log = k.log
    LEFT JOIN ends e ON e.device = k.device AND e.log = k.log"""
_STORE_LOGS = """
    INSERT INTO logs (device, log, through, since)
    SELECT device, log, through, %s FROM unnest(%b::text[], %b::text[], %b::bigint[])
           WITH ORDINALITY AS k (device, log, through, nth) ORDER BY nth
    ON CONFLICT (device, log) DO UPDATE SET through = excluded.through"""
_GAPS = """
    SELECT g.device, g.log, g.first, g.last, g.declared
    FROM unnest(%b::text[], %b::text[], %b::bigint[], %b::bigint[]) AS k (device, log, a, b)
    CROSS JOIN LATERAL (
        SELECT * FROM gaps WHERE device = k.device AND log = k.log AND first <= k.b AND first >= coalesce((
            SELECT max(first) FROM gaps WHERE device = k.device AND log = k.log AND first <= k.a), 0)) g"""
_DROP_GAPS = """
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
    """As `agent.fleet.database.interface` has it; as long as `raw` is connected."""

    def __init__(self, raw: psycopg.Connection[Row]) -> None:
        self._raw = raw
        # Of each table that was added to, name and type of each.
        self._columns: dict[str, list[tuple[str, str]]] = {}

    def execute(self, sql: str, values: Values = (), /) -> Cursor:
        return self._raw.execute(to_psycopg(sql), values, binary=True)

    def executemany(self, sql: str, rows: Iterable[Values], /) -> None:
        if rows := [*rows]:
            with self._raw.cursor() as cursor:
                cursor.executemany(to_psycopg(sql), rows)

    def to_dialect(self, sql: str) -> str:
        # Of whole numbers this is a NUMERIC, which has room for any.
        return sql.replace("TOTAL(", "sum(")

    def execute_each(self, sql: str, rows: Iterable[Values]) -> list[Any]:
        text = to_psycopg(sql)
        with self._raw.pipeline():
            cursors = [self._raw.execute(text, row, binary=True) for row in rows]
            return [cursor.fetchone() for cursor in cursors]

    def lock_devices(self, devices: Iterable[str]) -> None:
        # In this order, so that nobody holds one that is waited for by whom it waits for.
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
        # By key: whoever stores one of them at this moment is waited for, and must not wait for this in turn.
        chosen = [rows[i] for _, i in sorted(first.items())]
        columns = [list(column) for column in zip(*chosen, strict=True)]
        new = {*self._raw.execute(_ADD_MESSAGES, columns, binary=True)}
        return [row[:3] in new and first[row[:3]] == i for i, row in enumerate(rows)]

    def payloads(self, places: Sequence[tuple[str, str, int]]) -> list[bytes | None]:
        if not places:
            return []
        found = self._raw.execute(_PAYLOADS, _transpose(places), binary=True)
        stored = {(device, log, seq): payload for device, log, seq, payload in found}
        return [stored.get(place) for place in places]

    def bulk_insert(self, table: str, rows: Sequence[Row]) -> None:
        if table == _SERIALIZED_TABLE:
            self.lock_table(table)
        if table not in self._columns:
            self._columns[table] = self._raw.execute(_COLUMN_TYPES, (table,)).fetchall()
        columns = self._columns[table][: len(rows[0])]
        listed = ", ".join(f'"{name}"' for name, _ in columns)
        # As text each value costs twice as much, on both sides.
        into = f"COPY {table} ({listed}) FROM STDIN (FORMAT BINARY)"
        with self._raw.cursor() as cursor, cursor.copy(into) as copy:
            copy.set_types([kind for _, kind in columns])
            for row in rows:
                copy.write_row(row)

    def logs(self, logs: Sequence[LogId]) -> dict[LogId, tuple[int | None, int]]:
        if not logs:
            return {}
        found = self._raw.execute(_LOGS, _transpose(logs), binary=True)
        return {(device, log): (through, last) for device, log, through, last in found}

    def store_logs(self, logs: Mapping[LogId, int], known: set[LogId], since: str) -> None:
        if logs:
            columns = _transpose([(*log, through) for log, through in logs.items()])
            self._raw.execute(_STORE_LOGS, (since, *columns))

    def gaps(self, spans: Mapping[LogId, tuple[int, int]]) -> dict[LogId, list[Gap]]:
        if not spans:
            return {}
        columns = _transpose([(*log, a - 1, b + 1) for log, (a, b) in spans.items()])
        found: dict[LogId, list[Gap]] = {}
        for device, log, *gap in self._raw.execute(_GAPS, columns, binary=True):
            found.setdefault((device, log), []).append((gap[0], gap[1], gap[2]))
        return found

    def store_gaps(
        self, removed: Sequence[tuple[str, str, int]], added: Sequence[tuple[str, str, int, int, bool]]
    ) -> None:
        if removed:
            self._raw.execute(_DROP_GAPS, _transpose(removed))
        if added:
            self.bulk_insert("gaps", added)

    def undeclared_gaps(self, logs: Sequence[LogId], limit: int) -> dict[LogId, list[tuple[int, int]]]:
        found: dict[LogId, list[tuple[int, int]]] = {log: [] for log in logs}
        if logs:
            for device, log, first, last in self._raw.execute(
                _UNDECLARED_GAPS, (*_transpose(logs), limit), binary=True
            ):
                found[device, log].append((first, last))
        return found

    def revocation_times(self, kids: Sequence[str]) -> dict[str, str | None]:
        return dict(self._raw.execute(_REVOCATION_TIMES, ([*kids],)).fetchall())

    def update_last_seen(self, devices: Sequence[str], now: str) -> None:
        if devices:
            self._raw.execute(_UPDATE_LAST_SEEN, (now, [*devices]))


def _transpose(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
