"""Replay: derive the tables that gather many messages again, and compare them.

The gap ledger and the timestamp reconstruction do not depend on the order of arrival. So the verified messages go
through the same code into an empty temporary database, a few hundred at a time, and both are read in one order.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.fleet.audit.stored_rows import is_time, sort_key
from outstation.fleet.database import gap_ledger, log_succession
from outstation.fleet.database.alerts import merge_incidents
from outstation.fleet.database.gap_ledger import LogChanges, add_changes
from outstation.fleet.database.interface import LogId, Row
from outstation.fleet.database.projection import alert_rows, provenance_row
from outstation.fleet.database.schema.message_tables import ALERTS, GATHERED, INCIDENTS, RESULT_PROVENANCE, Table
from outstation.fleet.database.sqlite import open_temporary
from outstation.fleet.database.store import Devices, FleetStore
from outstation.fleet.database.timestamps import TimestampReconstruction
from outstation.foundation.errors import StorageError
from outstation.protocol.wire.messages import AlertPayload, LoggedPayload, ResultsPayload

_MESSAGES_PER_COMMIT = 500
_SOURCE = ALERTS.names.index("source")
# `logs.since` follows from the order of arrival, which no message states.
_NOT_DERIVED = frozenset({"since"})
# PostgreSQL rounds these floats to the nearest integer, SQLite towards zero.
_ROUNDED = frozenset({"disagreement_us", "start_error_us"})
# Table → columns of its rows that are compared, its key first.
COMPARED: dict[str, tuple[str, ...]] = {
    table.name: (*table.key, *(name for name in table.names if name not in {*table.key, *_NOT_DERIVED}))
    for table in GATHERED.values()
}
# A retention statement has the single alerts that stay, and no clocks of single results.
_NOT_IN_STATEMENTS = ("stamps", INCIDENTS.name)


class RowDifference(msgspec.Struct, frozen=True):
    """A row of one gathered table as it is stored and as the messages give it; None where it is missing."""

    table: str
    stored: Row | None
    derived: Row | None

    @property
    def row(self) -> Row:
        return self.derived or self.stored or ()

    def describe(self) -> str:
        if self.stored is None:
            return f"is missing in table {self.table}: its messages give {self._name_row(self.row)}"
        if self.derived is None:
            return f"table {self.table} has {self._name_row(self.stored)}, which no message gives"
        derived = self._name_row(self.derived)
        return f"table {self.table} has {self._name_row(self.stored)}, its messages give {derived}"

    def _name_row(self, row: Row) -> str:
        named = zip(COMPARED[self.table][2:], row[2:], strict=True)
        return ", ".join(f"{name} {value!r}" for name, value in named)


class Replay:
    """Derived tables of the messages so far: `add` each verified message, then `compare`.

    It begins empty, or with the tables in `file`. `db` is the temporary database.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.db = open_temporary()
        if file is None:
            self.db.execute("CREATE TABLE audited (device TEXT, log TEXT, state BLOB, PRIMARY KEY (device, log))")
        else:
            with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as source:
                source.backup(self.db)
        self._bodies: list[tuple[LoggedPayload, str]] = []

    def add(self, body: LoggedPayload, received: str) -> None:
        self._bodies.append((body, received))
        if len(self._bodies) >= _MESSAGES_PER_COMMIT:
            self.flush()

    def load(self, tables: Mapping[str, list[list[Any]]], alerts: Iterable[Row]) -> None:
        """Add the rows that pruned messages gave, and their alerts that are still open."""
        merge_incidents(self.db, alerts)
        for table, rows in tables.items():
            if rows and table in GATHERED:
                self.db.bulk_insert(table, [tuple(row) for row in rows])

    def dump(self) -> dict[str, list[list[Any]]]:
        """Return all rows by table, as a retention statement has them."""
        self.flush()
        tables = [table for table in GATHERED if table not in _NOT_IN_STATEMENTS]
        return {table: [[*row] for row in self.db.execute(f"SELECT * FROM {table}")] for table in tables}

    def log_ends(self) -> dict[tuple[Any, Any], int]:
        """Return the last seq of each log that a message so far declares ended."""
        rows = self.db.execute("SELECT device, log, last_seq FROM log_ends")
        return {(device, log): last_seq for device, log, last_seq in rows}

    def load_since(self, device: str, log: str) -> str:
        """Return when the first message of a log arrived, of the messages that the replay began with."""
        ((since,),) = self.db.execute("SELECT since FROM logs WHERE device = ? AND log = ?", (device, log))
        return str(since)

    def forget(self, device: str) -> None:
        """Drop what the messages of a device gave."""
        self.flush()
        for table in (*GATHERED, "audited"):
            self.db.execute(f"DELETE FROM {table} WHERE device = ?", (device,))

    def compare(self, store: FleetStore, devices: Devices, broken: Container[Any]) -> Iterator[tuple[Row, str]]:
        """Yield (device, log, seq or None) and the problem of each row that differs; skip `broken` devices."""
        for difference in self.find_differences(store, devices):
            device, log, number, *_ = difference.row
            if device not in broken:
                columns = COMPARED[difference.table]
                yield (device, log, number if columns[2] in ("seq", "first") else None), difference.describe()

    def find_differences(self, store: FleetStore, devices: Devices) -> Iterator[RowDifference]:
        """Yield the rows that differ from those that the messages so far give, by table and key."""
        self.flush()
        self._apply_operators_words(store, devices)
        self._merge_collector_alerts(store, devices)
        for name, table in GATHERED.items():
            columns, order = COMPARED[name], ", ".join(table.key)
            derived = self.db.execute(f"SELECT {', '.join(columns)} FROM {name} ORDER BY {order}")
            stored = store.derived_rows(name, columns, order, devices)
            yield from _compare_tables(table, stored, derived)

    def _apply_operators_words(self, store: FleetStore, devices: Devices) -> None:
        """End the logs that an operator ended: no signed message says so, only the stored row."""
        columns = ("device", "log", "successor", "last_seq", "until", "source")
        stored = store.derived_rows("log_successors", columns, "device, log, successor, source", devices)
        # A damaged row ends no log; it differs from what the messages give, which names it.
        words = [row for row in stored if row[-1] == log_succession.OPERATOR and _is_intact(row)]
        if words:
            self.db.bulk_insert("log_successors", words)
            [(*_, until, _), *_] = words
            log_succession.update_live_logs(self.db, {device for device, *_ in words}, until)

    def _merge_collector_alerts(self, store: FleetStore, devices: Devices) -> None:
        """Add the incidents of alerts that the collector raised, which no device signs."""
        stored = store.derived_rows("alerts", ALERTS.names, "device, log, seq, source", devices)
        # The replay raised alerts of two logs at once, too, at other times.
        self.db.execute("DELETE FROM incidents WHERE source = 'collector'")
        # A damaged row gives no incident.
        merge_incidents(self.db, [row for row in stored if row[_SOURCE] == "collector" and _is_intact_alert(row)])

    def close(self) -> None:
        self.db.close()

    def flush(self) -> None:
        if not self._bodies:
            return
        provenance = {provenance_row(body) for body, _ in self._bodies if isinstance(body, ResultsPayload)}
        timestamps, changes = TimestampReconstruction(self.db), dict[LogId, LogChanges]()
        for body, received in self._bodies:
            add_changes(changes, body, received)
            timestamps.add(body, received)
        try:
            # Else each row is a transaction of its own.
            self.db.execute("BEGIN")
            self.db.insert_missing(RESULT_PROVENANCE.name, [*provenance])
            timestamps.finish()
            gap_ledger.apply(self.db, changes)
            alerts = [body for body, _ in self._bodies if isinstance(body, AlertPayload)]
            merge_incidents(self.db, [row for body in alerts for row in alert_rows(body, b"")])
            log_succession.apply(self.db, changes, received)
            self.db.execute("COMMIT")
        except sqlite3.Error as error:
            problem = (
                f"the audit's temporary database: {error}; it needs room in the folder for temporary files ($TMPDIR)"
            )
            raise StorageError(problem) from error
        self._bodies = []


def _is_intact(successor_row: Row) -> bool:
    device, log, successor, last_seq, until, _ = successor_row
    return type(last_seq) is int and all(isinstance(name, str) for name in (device, log, successor)) and is_time(until)


def _is_intact_alert(row: Row) -> bool:
    device, task, *texts, seq, revision = row
    names = [device, *texts, *([] if task is None else [task])]
    # Text that is not UTF-8 was read with surrogates.
    is_text = all((isinstance(name, str) and name.isascii()) or _is_utf8(name) for name in names)
    return is_text and type(seq) is type(revision) is int


def _is_utf8(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _compare_tables(table: Table, stored: Iterator[Row], derived: Iterator[Row]) -> Iterator[RowDifference]:
    """Compare the rows of a table in the order of its key."""
    key_width = len(table.key)
    rounded = [name in _ROUNDED for name in COMPARED[table.name]]
    ours, theirs = next(derived, None), next(stored, None)
    while ours is not None or theirs is not None:
        if ours == theirs:
            ours, theirs = next(derived, None), next(stored, None)
            continue
        our_key = None if ours is None else sort_key(ours[:key_width])
        their_key = None if theirs is None else sort_key(theirs[:key_width])
        if ours is not None and (their_key is None or (our_key is not None and our_key < their_key)):
            yield RowDifference(table.name, None, ours)
            ours = next(derived, None)
        elif theirs is not None and (our_key is None or (their_key is not None and their_key < our_key)):
            yield RowDifference(table.name, theirs, None)
            theirs = next(stored, None)
        elif ours is not None and theirs is not None:
            if not _is_equal(ours, theirs, rounded):
                yield RowDifference(table.name, theirs, ours)
            ours, theirs = next(derived, None), next(stored, None)


def _is_equal(derived: Row, stored: Row, rounded: Sequence[bool]) -> bool:
    return all(
        a == b or (is_rounded and type(a) is type(b) is int and abs(a - b) <= 1)
        for a, b, is_rounded in zip(derived, stored, rounded, strict=True)
    )


def keep_devices(file: Path, names: Container[Any]) -> None:
    """Delete every device but those in `names` from a file of `Replay`."""
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        devices = [device for (device,) in db.execute("SELECT DISTINCT device FROM audited")]
        db.executemany("DELETE FROM audited WHERE device = ?", [(name,) for name in devices if name not in names])
        for table in GATHERED:
            db.execute(f"DELETE FROM {table} WHERE device NOT IN (SELECT device FROM audited)")
