"""Rebuild: write every table that follows from the messages again, where it differs from them.

It is an audit that corrects. Messages are verified and replayed as an audit does; the rows that differ are replaced,
the others stay, so a second run changes nothing. One transaction covers one device: a kill leaves each device as it was
or corrected. A device with a message that does not verify stays as it is.

Nothing signs the order of arrival. A row of `logs` that is missing returns with the time of its first message, and a
missing alert is numbered again. Alerts that the collector raised itself are in no message, so they stay as they are.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import msgspec

from outstation.fleet.audit import pruned as pruned_devices
from outstation.fleet.audit.audit import DeviceAuditor
from outstation.fleet.audit.audit_report import AuditReport
from outstation.fleet.audit.replay import COMPARED, Replay, RowDifference
from outstation.fleet.audit.stored_rows import MessageKey, StoredTables, describe_difference
from outstation.fleet.database.interface import Connection, Row
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.projection import TableRows
from outstation.fleet.database.schema.message_tables import ALERTS, GATHERED, LOGS, PROJECTED, SHARED
from outstation.fleet.database.store import DeviceRange, Devices, FleetStore
from outstation.protocol.wire.keys import PublicKey

_ROWS_PER_INSERT = 2_000
_ARRIVAL = "SELECT min(received) FROM messages WHERE device = ? AND log = ?"
_LOGS = "SELECT device, log, last_seq, since, latest, live FROM logs WHERE device = ? ORDER BY rowid"
# Else notifications would send alerts that returned as new ones, or skip new ones with a lower number. They compare all
# open alerts with what they sent, whatever the cursor.
_MOVE_CURSOR = "UPDATE notify_cursor SET cursor = (SELECT coalesce(max(rowid), 0) FROM alerts)"


class RebuildReport(msgspec.Struct):
    """Rows that were corrected, by table; devices that were not, and the problems of their evidence."""

    devices: int = 0
    messages: int = 0
    rows: dict[str, int] = msgspec.field(default_factory=dict)
    excluded: list[str] = msgspec.field(default_factory=list)
    invalid: list[dict[str, Any]] = msgspec.field(default_factory=list)
    invalid_count: int = 0

    @property
    def passed(self) -> bool:
        return not self.invalid_count


def rebuild(
    store: FleetStore,
    device: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    collectors: Sequence[PublicKey] = (),
) -> RebuildReport:
    """Correct the tables of all devices, or of one, while no collector runs; call `progress` after each hundred.

    `collectors`: keys with which retention statements are valid. Raises StorageError (Busy, Full).
    """
    audited, rows, excluded = AuditReport(), Counter[str](), list[str]()
    # It sees the rows as they were, whatever the transaction has written by then.
    with FleetStore(store.location, read_only=True) as reader:
        enrolled = reader.enrolled_devices()
        # A key costs 0.1 ms to parse: of a thousand devices, once, and not for each of them.
        keyring = Keyring(reader)
        for devices, names in [(device, [device])] if device is not None else _split(enrolled):
            report = AuditReport()
            try:
                with store.transaction() as db:
                    db.lock_devices(names)
                    corrections = _Corrections(db)
                    with reader.snapshot():
                        _correct(reader, keyring, devices, corrections, report, progress, collectors)
                    corrections.finish()
            except _NotVerified:
                excluded += names
            else:
                rows.update(corrections.counts)
                # What an audit says beyond the signatures is no fault of a table.
                report.invalid, report.invalid_count = [], 0
            audited.merge(report)
    changed = dict(sorted(rows.items()))
    return RebuildReport(audited.devices, audited.messages, changed, excluded, audited.invalid, audited.invalid_count)


class _NotVerified(Exception):
    """Rolls the transaction of a device back, whose evidence does not verify."""


def _split(enrolled: Sequence[str]) -> list[tuple[Devices, list[str]]]:
    """Return a range for each device, with its name; rows with a damaged name belong to that of their neighbour."""
    bounds = [None, *enrolled[1:], None]
    names = [[name] for name in enrolled] or [[]]
    return [(DeviceRange(*bound), name) for bound, name in zip(pairwise(bounds), names, strict=True)]


def _correct(
    reader: FleetStore,
    keyring: Keyring,
    devices: Devices,
    corrections: _Corrections,
    report: AuditReport,
    progress: Callable[[int], None],
    collectors: Sequence[PublicKey],
) -> None:
    with contextlib.closing(Replay()) as replay:
        pruned, problems = pruned_devices.load(reader, devices, collectors)
        for name, problem in problems.items():
            report.add_invalid((name, "", None), problem)
        tables = partial(_CorrectedTables, corrections)
        auditor = DeviceAuditor(reader, replay, report, progress, pruned, tables=tables, keyring=keyring)
        auditor.audit(devices, {})
        report.devices = len(auditor.names)
        if auditor.broken or problems:
            raise _NotVerified
        logs = []
        for difference in replay.find_differences(reader, devices):
            if difference.table == "logs":
                logs.append(difference)
            else:
                corrections.replace_gathered(difference)
        corrections.correct_logs(logs, replay)


class _CorrectedTables(StoredTables):
    """Replaces the rows that differ, instead of a report."""

    def __init__(self, corrections: _Corrections, *arguments: Any) -> None:
        self._corrections = corrections
        super().__init__(*arguments)
        self._columns = {table.name: table.columns for table in self._tables}

    def compare(self, stored: TableRows, expected: TableRows) -> Iterator[str]:
        for table in PROJECTED if stored != expected else ():
            rows = stored.get(table, []), expected.get(table, [])
            if describe_difference(table, *rows):
                self._corrections.replace_projected(table, self._columns[table], *rows)
        return iter(())

    def report_orphans(self, table: str, key: MessageKey, rows: list[Row]) -> None:
        retained = self._retained.pop(key, None) if table == ALERTS.name else None
        expected = [] if retained is None else [retained]
        self._corrections.replace_projected(table, self._columns[table], rows, expected)

    def report_missing(self, _key: MessageKey, row: Row) -> None:
        self._corrections.replace_projected(ALERTS.name, self._columns[ALERTS.name], [], [row])


class _Corrections:
    """Writes rows into the transaction. `counts`: rows that differed, by table."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self.counts = Counter[str]()
        self._inserts: dict[str, list[Row]] = {}

    def replace_projected(self, table: str, columns: Sequence[str], stored: list[Row], expected: list[Row]) -> None:
        """Replace the rows that one message gave."""
        # PostgreSQL appends the column `rowid` to some tables.
        width = len(expected[0]) if expected else len(columns)
        before, after = Counter(row[:width] for row in stored), Counter(expected)
        self.counts[table] += max((before - after).total(), (after - before).total())
        key = ("device", "log", "seq", *PROJECTED[table].indexed)
        source = " AND source = 'device'" if table in SHARED else ""
        if table == ALERTS.name and stored and expected:
            # Notifications go on behind the last rowid that they saw, so a corrected alert keeps its own.
            assignments = ", ".join(f'"{name}" = ?' for name in columns[:width])
            where, values = _match(columns, key, stored[0])
            self._db.execute(f"UPDATE {table} SET {assignments} WHERE {where}{source}", (*expected[0], *values))
            return
        for row in stored:
            where, values = _match(columns, key, row)
            self._db.execute(f"DELETE FROM {table} WHERE {where}{source}", values)
        self._insert(table, expected)

    def replace_gathered(self, difference: RowDifference) -> None:
        """Replace a row that several messages gave."""
        table = difference.table
        columns, width = COMPARED[table], len(GATHERED[table].key)
        self.counts[table] += 1
        if difference.stored is not None:
            where, values = _match(columns, columns[:width], difference.stored)
            self._db.execute(f"DELETE FROM {table} WHERE {where}", values)
        if difference.derived is not None:
            self._insert(table, [_to_flags(table, difference.derived)])

    def correct_logs(self, differences: Sequence[RowDifference], replay: Replay) -> None:
        """Correct rows of table logs in place: their order is that of arrival, by which the newest log is found."""
        columns, width = COMPARED[LOGS.name], len(LOGS.key)
        assignments = ", ".join(f"{name} = ?" for name in columns[width:])
        missing: dict[Any, list[Row]] = {}
        for difference in differences:
            self.counts["logs"] += 1
            where, key = _match(columns, columns[:width], difference.row)
            if difference.derived is None:
                self._db.execute(f"DELETE FROM logs WHERE {where}", key)
            elif difference.stored is None:
                device, *restored = difference.derived
                missing.setdefault(device, []).append(tuple(restored))
            else:
                values = _to_flags(LOGS.name, difference.derived)[width:]
                self._db.execute(f"UPDATE logs SET {assignments} WHERE {where}", (*values, *key))
        for device, logs in missing.items():
            rows = [tuple(row) for row in self._db.execute(_LOGS, (device,))]
            for log, last_seq, latest, live in logs:
                (since,) = self._db.execute(_ARRIVAL, (device, log)).fetchone()
                rows.append((device, log, last_seq, since or replay.load_since(device, log), latest, bool(live)))
            self._db.execute("DELETE FROM logs WHERE device = ?", (device,))
            self._db.bulk_insert("logs", sorted(rows, key=itemgetter(LOGS.names.index("since"))))

    def finish(self) -> None:
        for table in [*self._inserts]:
            self._write(table)
        if self.counts[ALERTS.name]:
            self._db.execute(_MOVE_CURSOR)

    def _insert(self, table: str, rows: list[Row]) -> None:
        self._inserts.setdefault(table, []).extend(rows)
        if len(self._inserts[table]) >= _ROWS_PER_INSERT:
            self._write(table)

    def _write(self, table: str) -> None:
        rows = self._inserts.pop(table, [])
        if rows and table in GATHERED:
            # In the order of the replay's columns, which is not that of the table.
            columns = COMPARED[table]
            names, places = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
            self._db.executemany(f"INSERT INTO {table} ({names}) VALUES ({places})", rows)
        elif rows:
            self._db.bulk_insert(table, rows)


def _match(columns: Sequence[str], key: Sequence[str], row: Row) -> tuple[str, Row]:
    """Return a condition for the key columns of a row, and its values."""
    conditions, values = [], []
    for name, value in zip(columns, row, strict=False):
        if name in key:
            # SQLite reads text that is not UTF-8 with surrogates.
            data = value.encode(errors="surrogateescape") if isinstance(value, str) else b""
            is_damaged = bool(data) and data.decode(errors="replace") != value
            conditions.append(f'"{name}" = CAST(? AS TEXT)' if is_damaged else f'"{name}" = ?')
            values.append(data if is_damaged else value)
    return " AND ".join(conditions), tuple(values)


def _to_flags(table: str, row: Row) -> Row:
    """Return a compared row with its flags as such; SQLite, where they were derived, has numbers."""
    types = (GATHERED[table][name].type for name in COMPARED[table])
    return tuple(bool(value) if kind == "boolean" else value for kind, value in zip(types, row, strict=True))
