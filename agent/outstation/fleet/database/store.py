"""Fleet store: devices, keys, messages and their projections, in SQLite or PostgreSQL.

A message is stored once. Ingestion is idempotent and independent of order: any order and any repeats of the same
messages give the same tables. When `ingest` returns, its messages are durable; when it raises, none is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import msgspec

from outstation.fleet.database import key_table, log_succession
from outstation.fleet.database.alerts import (
    ALERTS,
    DRIFT_ALERTS,
    LEARNED_REFERENCES,
    OPEN_ALERTS,
    OPEN_FLEET_WIDE_ALERTS,
    OPEN_INCIDENTS,
    OPEN_REFERENCE_ALERTS,
    add_alerts,
    revoked_alert_row,
)
from outstation.fleet.database.ingest import Arrival, IngestBatch, IngestOutcome, Refusal
from outstation.fleet.database.interface import (
    Connection,
    Database,
    LogId,
    Row,
    TransactionConflict,
    fetch_dicts,
    is_postgresql,
)
from outstation.fleet.database.key_table import KeyMaker
from outstation.fleet.database.schema.message_tables import RESULTS, SHARED
from outstation.fleet.database.sqlite import SqliteDatabase
from outstation.foundation.errors import MessageRefused, StorageDamaged, UsageError
from outstation.protocol.wire.keys import PublicKey, parse_public_key
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.messages import LoggedPayload
from outstation.protocol.wire.verification import VerifiedMessage

MAX_MISSING_RANGES = 100
# Conflicting transactions are rare, and one of them always succeeds.
_MAX_ATTEMPTS = 5
# One device, or all if it is None; bind the device twice.
_DEVICE_FILTER = "(CAST(? AS TEXT) IS NULL OR device = ?)"
_LOG_RANGE = "device = ? AND log = ? AND seq BETWEEN ? AND ? ORDER BY seq"
_NEWEST_LOG = "rowid = (SELECT min(rowid) FROM logs WHERE device = l.device AND live)"

# MATERIALIZED: else SQLite counts in the order of the key, for which it reads all incidents.
_DEVICES = f"""
    WITH open_incidents AS MATERIALIZED ({OPEN_INCIDENTS})
    SELECT d.device, k.key, d.last_seen,
           CASE WHEN r.device IS NOT NULL THEN 'retired' WHEN k.key IS NULL THEN 'revoked' ELSE d.state END AS state,
           (SELECT last_seq FROM logs l WHERE l.device = d.device AND live ORDER BY rowid LIMIT 1) AS through,
           (SELECT count(*) FROM logs l WHERE l.device = d.device AND live) AS logs,
           coalesce(o.n, 0) AS alerts,
           (SELECT quality FROM anchors a WHERE a.device = d.device AND a.log = (
               SELECT log FROM logs l WHERE l.device = d.device AND live ORDER BY rowid LIMIT 1)
            ORDER BY a.seq DESC LIMIT 1) AS clock
    FROM devices d
    LEFT JOIN keys k ON k.device = d.device AND k.revoked IS NULL AND k.last_seq IS NULL
    LEFT JOIN retired_devices r ON r.device = d.device
    LEFT JOIN (SELECT device, count(*) AS n FROM open_incidents GROUP BY device) o ON o.device = d.device
    WHERE r.device IS NULL OR ?
    ORDER BY d.device
"""

_PROGRESS = """
    SELECT d.device,
           coalesce((SELECT max(row) FROM results r WHERE r.device = d.device), 0) AS rows,
           (SELECT CAST(coalesce(sum(window_count), 0) AS BIGINT) FROM drift_windows w WHERE w.device = d.device)
               AS windows,
           (SELECT count(*) FROM results r WHERE r.device = d.device) AS results,
           (SELECT count(*) FROM messages m WHERE m.device = d.device) AS messages,
           (SELECT state FROM drift_windows w WHERE w.device = d.device ORDER BY log, seq DESC LIMIT 1) AS drift
    FROM devices d ORDER BY d.device
"""

# Limits an acknowledgement: (log, through, missing) → (through, missing)
Trim = Callable[[LogId, int, list[tuple[int, int]]], tuple[int, list[tuple[int, int]]]]


class DeviceRange(msgspec.Struct, frozen=True):
    """Devices from `first` on, up to but not including `before`, in the database's order; None is no bound."""

    first: str | None = None
    before: str | None = None


Devices = str | DeviceRange | None


def filter_devices(devices: Devices) -> tuple[str, tuple[Any, ...]]:
    """Return a condition and its values for one device, a range, or all (None)."""
    if devices is None or isinstance(devices, str):
        return ("device = ?", (devices,)) if devices else ("TRUE", ())
    bounds = [("device >= ?", devices.first), ("device < ?", devices.before)]
    parts = [(sql, value) for sql, value in bounds if value is not None]
    return " AND ".join(sql for sql, _ in parts) or "TRUE", tuple(value for _, value in parts)


class Acknowledgement(msgspec.Struct, frozen=True):
    """The collector has stored all messages of `log` up to `through`, except the ranges in `missing`.

    `digest`: digest of the payload of message `through`, by which a device recognises its own; None if it is missing.
    """

    device: str
    log: str
    through: int
    missing: list[tuple[int, int]]
    digest: str | None = None


class FleetStore:
    """An open fleet database, for one thread. Methods raise StorageError (Full, Busy) if the database fails."""

    def __init__(self, location: Path | str, *, read_only: bool = False, partitions: int = 1) -> None:
        """Open a file, or a `postgresql://` URL; `partitions` applies when a PostgreSQL database has no tables yet."""
        self._database: Database
        if is_postgresql(location):
            # psycopg is an extra, which a fleet with SQLite does without.
            from outstation.fleet.database.postgresql import PostgresqlDatabase

            self._database = PostgresqlDatabase(str(location), read_only=read_only, partitions=partitions)
        else:
            self._database = SqliteDatabase(Path(location), read_only=read_only)
        self.location, self.name, self.shared = location, self._database.name, self._database.shared
        # Transactions retried because another collector changed the same rows.
        self.retry_count = 0

    @property
    def path(self) -> Path:
        return Path(self.location)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def transaction(self) -> AbstractContextManager[Connection]:
        """Begin a write transaction: committed when the block ends, rolled back when it raises."""
        return self._database.transaction()

    def snapshot(self) -> AbstractContextManager[Connection]:
        """Begin a read snapshot: all reads inside see one moment, that of the outer snapshot if nested."""
        return self._database.snapshot()

    def stream(self, sql: str, values: Sequence[Any] = ()) -> Iterator[Row]:
        """Return the rows one by one, in bounded memory."""
        return self._database.stream(sql, values)

    def acquire_leadership(self, job: str) -> bool:
        """Return True if this process holds `job` among all collectors of this database."""
        return self._database.acquire_leadership(job)

    def join_collectors(self) -> int:
        """Count this process among the collectors of this database; return how many there are."""
        return self._database.join_collectors()

    def exclude_collectors(self) -> bool:
        """Return True if no collector runs on this database; SQLite keeps them out until this store is closed."""
        return self._database.exclude_collectors()

    def keys_version(self) -> int:
        """Return a number that grows with every change of the keys."""
        rows = self.fetch_all("SELECT +value FROM meta WHERE name = 'keys_version'")
        if not rows or type(rows[0][0]) is not int:
            raise StorageDamaged(f"{self.name}: table meta has no number keys_version; restore the database")
        return int(rows[0][0])

    def enrolled_keys(self) -> list[tuple[str, str, str, bool, str | None, int | None]]:
        """Return (kid, device, base64url key, revoked, log, last seq) of every key ever enrolled, as it is stored."""
        rows = self.fetch_all("SELECT kid, device, key, revoked, log, +last_seq FROM keys")
        return [(kid, device, text, revoked is not None, *bound) for kid, device, text, revoked, *bound in rows]

    def active_key(self, device: str) -> PublicKey | None:
        """Return the key that may sign for `device`; None before it is enrolled."""
        sql = "SELECT key FROM keys WHERE device = ? AND revoked IS NULL AND last_seq IS NULL"
        rows = self.fetch_all(sql, device)
        return parse_public_key(rows[0][0]) if rows else None

    def enrol(
        self,
        device: str,
        key: PublicKey,
        *,
        replace: bool,
        now: str,
        keep_through: int | None = None,
        made_by: KeyMaker = "device",
        before_commit: Callable[[], None] = lambda: None,
    ) -> bool:
        """Let `key` sign for `device`; see `key_table.enrol`. Raises UsageError if the device has another key.

        `before_commit` is called once the change is certain; if it raises, nothing changes.
        """
        with self.transaction() as db:
            new = key_table.enrol(db, device, key, replace=replace, keep_through=keep_through, now=now, made_by=made_by)
            before_commit()
        return new

    def revoke(
        self, device: str, kid: str | None, now: str, *, before_commit: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Revoke all keys of `device`, or only `kid`, raise an alert for each, and return their kids.

        `before_commit` is called as in `enrol`.
        """
        with self.transaction() as db:
            kids = key_table.revoke(db, device, kid, now)
            add_alerts(db, [revoked_alert_row(device, revoked, now) for revoked in kids])
            before_commit()
        return kids

    def retire(self, device: str, by: str, now: str) -> None:
        """List `device` no longer, until it is enrolled again. Raises UsageError if a key of it may still sign."""
        with self.transaction() as db:
            key_table.retire(db, device, by, now)

    def accept_log(self, device: str, log: str, now: str) -> list[str]:
        """Make `log` the only live one of `device`, on an operator's word; return the others. Raises UsageError."""
        with self.transaction() as db:
            db.lock_devices([device])
            if db.execute("SELECT 1 FROM logs WHERE device = ? AND log = ?", (device, log)).fetchone() is None:
                raise UsageError(
                    f"device {device!r} has no log {log!r}; `outstation fleet log accept {device}` lists them"
                )
            ended = log_succession.end_logs(db, device, log, now)
            log_succession.update_live_logs(db, [device], now)
        return ended

    def device_logs(self, device: str) -> list[dict[str, Any]]:
        """Return log, last_seq, since, latest and live of each log of a device, in order of arrival."""
        sql = "SELECT log, last_seq, since, latest, live FROM logs WHERE device = ? ORDER BY rowid"
        return [{**row, "live": bool(row["live"])} for row in self._fetch_dicts(sql, device)]

    def ingest(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal], now: str) -> list[IngestOutcome]:
        """Store arrivals and refusals in one transaction, and return the outcome of each arrival.

        Raises StorageError, and MessageRefused if some message has a value that cannot be stored: then ingest them one
        by one.
        """
        attempts = 0
        while True:
            try:
                with self.transaction() as db:
                    batch = IngestBatch(db, refusals, now)
                    outcomes = batch.add(arrivals)
                    batch.finish()
                return outcomes
            except self._database.unstorable_errors as error:
                raise MessageRefused("not storable", str(error)) from error
            except TransactionConflict:
                self.retry_count += 1
                attempts += 1
                if attempts == _MAX_ATTEMPTS:
                    raise

    def raise_alert(self, row: Row) -> None:
        """Store an alert that the collector raises itself, unless it exists."""
        with self.transaction() as db:
            add_alerts(db, [row])

    def has_message(self, message: VerifiedMessage) -> bool:
        """Return True if exactly this message is stored."""
        return self._stored_payloads(message) == [(message.payload,)]

    def has_conflicting_message(self, message: VerifiedMessage) -> bool:
        """Return True if a message with another payload has its sequence number."""
        return self._stored_payloads(message) not in ([], [(message.payload,)])

    def acknowledgement(self, device: str, log: str) -> Acknowledgement:
        """Return the acknowledgement of a log; with more than 100 missing ranges it ends at the first 100."""
        return self.acknowledgements([(device, log)])[0]

    def acknowledgements(self, logs: Iterable[LogId], trim: Trim | None = None) -> list[Acknowledgement]:
        """Return the acknowledgement of each log from one snapshot, whichever collector stored the messages."""
        keys = [*logs]
        with self.snapshot() as db:
            through = {log: last_seq or 0 for log, (last_seq, _) in db.logs(keys).items()}
            missing = db.undeclared_gaps(keys, MAX_MISSING_RANGES + 1)
            for log, ranges in missing.items():
                if len(ranges) > MAX_MISSING_RANGES:
                    through[log] = ranges.pop()[0] - 1
                if trim is not None:
                    through[log], missing[log] = trim(log, through[log], ranges)
            newest = db.payloads([(*log, through[log]) for log in keys])
        return [
            Acknowledgement(*log, through[log], missing[log], None if payload is None else digest(payload))
            for log, payload in zip(keys, newest, strict=True)
        ]

    def newest_logs(self) -> list[tuple[str, str]]:
        """Return (device, log) of the newest log of each device."""
        return self.fetch_all(f"SELECT device, log FROM logs l WHERE {_NEWEST_LOG} ORDER BY device")

    def enrolled_devices(self) -> list[str]:
        """Return every device ever enrolled, in order, without damaged names."""
        rows = self.fetch_all("SELECT device FROM devices ORDER BY device")
        return [device for (device,) in rows if isinstance(device, str)]

    def active_devices(self) -> list[str]:
        """Return the devices with a key that may sign, in order: none that is revoked or retired."""
        rows = self.fetch_all("SELECT DISTINCT device FROM keys WHERE revoked IS NULL AND last_seq IS NULL")
        return sorted(device for (device,) in rows if isinstance(device, str))

    def devices(self, *, with_retired: bool = False) -> list[dict[str, Any]]:
        """Return device, key, state, last_seen, through (of its newest log), logs (that live), alerts (open), clock.

        `state` is the device's own, or `revoked` if no key of it may sign, or `retired`.
        """
        return self._fetch_dicts(_DEVICES, with_retired)

    def alerts(self, device: str | None = None, *, closed: bool = False) -> list[dict[str, Any]]:
        """Return open alerts, or with `closed` all that were ever raised or cleared; oldest first."""
        messages = ALERTS if closed else OPEN_ALERTS
        sql = f"SELECT * FROM ({messages}) messages WHERE {_DEVICE_FILTER} ORDER BY time, device, seq"
        return [{**row, "open": bool(row["open"])} for row in self._fetch_dicts(sql, device, device)]

    def progress(self) -> list[dict[str, Any]]:
        """Return rows, drift windows, results, messages, last `drift` state and open alert summaries per device."""
        rows = self._fetch_dicts(_PROGRESS)
        for row in rows:
            row["open"] = [alert["summary"] for alert in self.alerts(row["device"])]
        return rows

    def labels(self, device: str) -> list[tuple[int, str]]:
        """Return (row, label) of every result of `device` with a label."""
        sql = "SELECT row, label FROM results WHERE device = ? AND label IS NOT NULL ORDER BY row"
        return self.fetch_all(sql, device)

    def values(self, device: str) -> list[tuple[int, float]]:
        """Return (row, value) of every result of `device` with a value."""
        sql = "SELECT row, value FROM results WHERE device = ? AND value IS NOT NULL ORDER BY row"
        return self.fetch_all(sql, device)

    def newest_metric(self, device: str, metric: str, output: str = "") -> float | None:
        """Return a metric of all results from the newest quality message of an output that has it; None without one."""
        sql = """
            SELECT value FROM metrics
            WHERE device = ? AND metric = ? AND slice = '' AND source = 'device' AND output = ?
            ORDER BY log, seq DESC LIMIT 1"""
        rows = self.fetch_all(sql, device, metric, output)
        return rows[0][0] if rows else None

    def drift_alerts(self, since: str, until: str) -> list[tuple[str, str, str, str, int, int]]:
        """Return (task, device, subject, time, open, count since `since`) of each last drift alert before `until`."""
        return self.fetch_all(DRIFT_ALERTS, since, until)

    def open_fleet_wide_alerts(self) -> list[tuple[str, str, int]]:
        """Return (task, subject, seq) of each open alert of fleet-wide drift."""
        return self.fetch_all(OPEN_FLEET_WIDE_ALERTS)

    def learned_references(self) -> list[tuple[str, str, str, int]]:
        """Return (device, task, fields as JSON, accepted) of the newest reference that each device learned."""
        return self.fetch_all(LEARNED_REFERENCES)

    def open_reference_alerts(self) -> list[tuple[str, str, int]]:
        """Return (device, task, seq) of each open alert of a reference unlike the fleet's."""
        return self.fetch_all(OPEN_REFERENCE_ALERTS)

    def gaps(self, device: str | None = None) -> list[dict[str, Any]]:
        """Return device, log, from, to and declared of each missing range of sequence numbers."""
        columns = 'device, log, first AS "from", last AS "to", declared'
        sql = f"SELECT {columns} FROM gaps WHERE {_DEVICE_FILTER} ORDER BY 1, 2, 3"
        return [{**row, "declared": bool(row["declared"])} for row in self._fetch_dicts(sql, device, device)]

    def refusals(self) -> list[dict[str, Any]]:
        """Return device ('' for names that are not enrolled), reason, count, first and last of all refusals."""
        return self._fetch_dicts("SELECT * FROM refusals ORDER BY device, reason")

    def logs(self, devices: Devices = None) -> list[tuple[str, str, int]]:
        """Return (device, log, last seq) of every log, in order, as they are stored."""
        where, values = filter_devices(devices)
        return self.fetch_all(f"SELECT device, log, +last_seq FROM logs WHERE {where} ORDER BY device, log", *values)

    def count_messages(self, device: str | None = None) -> int:
        return int(self.fetch_all(f"SELECT count(*) FROM messages WHERE {_DEVICE_FILTER}", device, device)[0][0])

    def evidence(self, devices: Devices = None) -> Iterator[Row]:
        """Return (device, log, seq, kind, topic, payload, jws, received) of each message, by the first three.

        This and the other methods for the audit return each value as it is stored: the audit names a damaged one.
        """
        where, values = filter_devices(devices)
        columns = "device, log, +seq, kind, topic, payload, jws, received"
        return self.stream(f"SELECT {columns} FROM messages WHERE {where} ORDER BY device, log, seq", values)

    def message_keys(self, device: str, log: str, first: int, last: int) -> Iterator[tuple[int, str]]:
        """Return (seq, received) of each message from `first` to `last` of a log."""
        return self.stream(f"SELECT seq, received FROM messages WHERE {_LOG_RANGE}", (device, log, first, last))

    def log_messages(self, device: str, log: str, first: int, last: int) -> Iterator[Row]:
        """Return (seq, kind, topic, payload, jws, received) of each message from `first` to `last` of a log."""
        columns = "seq, kind, topic, payload, jws, received"
        return self.stream(f"SELECT {columns} FROM messages WHERE {_LOG_RANGE}", (device, log, first, last))

    def retention_rows(self, devices: Devices = None) -> Iterator[Row]:
        """Return (device, n, payload, jws, state) of each retention statement, by device and n."""
        where, values = filter_devices(devices)
        return self.stream(
            f"SELECT device, +n, payload, jws, state FROM retention WHERE {where} ORDER BY device, n", values
        )

    def key_rows(self, devices: Devices = None) -> Iterator[Row]:
        """Return (device, kid, key, log, last seq) of each key: what verification depends on, by device."""
        where, values = filter_devices(devices)
        return self.stream(f"SELECT device, kid, key, log, +last_seq FROM keys WHERE {where} ORDER BY 1, 2", values)

    def audit_messages(self, devices: Devices, substring: bytes) -> Iterator[Row]:
        """Return (device, topic, payload, jws) of each stored audit message whose payload contains `substring`."""
        where, values = filter_devices(devices)
        sql = "SELECT device, topic, payload, jws FROM messages WHERE kind = 'audit' AND instr(payload, ?) > 0"
        return self.stream(f"{sql} AND {where}", (substring, *values))

    def projected_rows(self, table: str, devices: Devices = None) -> tuple[list[str], Iterator[Row]]:
        """Return a table's columns, and each row that a message gave, in the order of `evidence`."""
        source = "source = 'device'" if table in SHARED else "TRUE"
        condition, values = filter_devices(devices)
        where = f"{source} AND {condition}"
        order = "device, log, seq, row, t" if table == RESULTS.name else "device, log, seq"
        names = [column[0] for column in self._database.execute(f"SELECT * FROM {table} LIMIT 0").description]
        columns = self._as_stored(names)
        return names, self.stream(f"SELECT {columns} FROM {table} WHERE {where} ORDER BY {order}", values)

    def derived_rows(self, table: str, columns: Sequence[str], order: str, devices: Devices) -> Iterator[Row]:
        """Return columns of a table that many messages gave, in an order."""
        where, values = filter_devices(devices)
        stored = self._as_stored(columns)
        return self.stream(f"SELECT {stored} FROM {table} WHERE {where} ORDER BY {order}", values)

    def _as_stored(self, columns: Sequence[str]) -> str:
        return ", ".join(self._database.as_stored(f'"{column}"') for column in columns)

    def _stored_payloads(self, message: VerifiedMessage) -> list[Row]:
        body = message.body
        if not isinstance(body, LoggedPayload):
            return []
        sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
        return self.fetch_all(sql, body.device, body.log, body.seq)

    def fetch_all(self, sql: str, *values: Any) -> list[Any]:
        """Return the rows of a query with a small result."""
        return self._database.execute(sql, values).fetchall()

    def _fetch_dicts(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        return fetch_dicts(self._database, sql, *values)
