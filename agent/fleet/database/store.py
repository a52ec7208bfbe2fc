"""All SQL of the fleet: what devices sent, as evidence and as rows, in SQLite or PostgreSQL.

A message is added once. Adding is idempotent and order-free: any order, any repeats of the same messages give the same
tables. When `ingest` returns, its messages are on the disk; when it raises, nothing of them is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from agent.errors import MessageRefused
from agent.fleet.database import key_table, schema
from agent.fleet.database.ingest import Arrival, IngestBatch, IngestOutcome, Refusal
from agent.fleet.database.interface import Connection, LogId, TransactionConflict, open_database
from agent.fleet.database.projection import revoked_alert_row
from agent.wire.keys import PublicKey, parse_public_key
from agent.wire.messages import LoggedPayload, VerifiedMessage, digest

MAX_MISSING_RANGES = 100
# Two that change the same rows at once are rare, and one of them always succeeds.
_MAX_ATTEMPTS = 5
# Of one device, or of all where it is None; given twice.
_DEVICE_FILTER = "(CAST(? AS TEXT) IS NULL OR device = ?)"

# Of a log, how far an acknowledgement goes and what it asks for: (log, through, missing) → (through, missing)
Trim = Callable[[LogId, int, list[tuple[int, int]]], tuple[int, list[tuple[int, int]]]]


class Acknowledgement(msgspec.Struct, frozen=True):
    """Everything of `log` up to `through` is on the collector's disk, except the ranges in `missing`.

    `digest`: of the payload of message `through`, so that a device knows its own; None where that is missing.
    """

    device: str
    log: str
    through: int
    missing: list[tuple[int, int]]
    digest: str | None = None


class FleetStore:
    """The open database; one thread. Raises StorageError (Full, Busy) wherever the disk or another process fails it."""

    def __init__(self, location: Path | str, *, read_only: bool = False, partitions: int = 1) -> None:
        """`where`: a file, or a `postgresql://` URL; `partitions`: see `agent.fleet.database.interface.opened`."""
        self._database = open_database(location, read_only=read_only, partitions=partitions)
        self.location, self.name, self.shared = location, self._database.name, self._database.shared
        # Transactions that were done again, as another collector changed the same rows.
        self.retry_count = 0

    @property
    def path(self) -> Path:
        """The file, of a SQLite database."""
        return Path(self.location)

    def close(self) -> None:
        self._database.close()

    def transaction(self) -> AbstractContextManager[Connection]:
        """One write transaction: committed when the block ends, rolled back when it raises."""
        return self._database.transaction()

    def snapshot(self) -> AbstractContextManager[Connection]:
        """Everything read inside is of one moment; of that of the outer one, where there is one."""
        return self._database.snapshot()

    def stream(self, sql: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows one by one, however many there are."""
        return self._database.stream(sql, values)

    def acquire_leadership(self, job: str) -> bool:
        """Whether this process does `job`, of all that collect here."""
        return self._database.acquire_leadership(job)

    # --- keys ---

    def keys_version(self) -> int:
        """Grows with every change of the keys."""
        return int(self._fetch_all("SELECT value FROM meta WHERE name = 'keys_version'")[0][0])

    def enrolled_keys(self) -> list[tuple[str, str, str, bool, str | None, int | None]]:
        """(kid, device, base64url key, revoked, log and seq up to which it counts) of every key ever enrolled."""
        found = self._fetch_all("SELECT kid, device, key, revoked, log, through FROM keys")
        return [(kid, device, text, revoked is not None, *bound) for kid, device, text, revoked, *bound in found]

    def active_key(self, device: str) -> PublicKey | None:
        """The key that may sign for `device`; None before it is enrolled."""
        found = self._fetch_all("SELECT key FROM keys WHERE device = ? AND revoked IS NULL AND through IS NULL", device)
        return parse_public_key(found[0][0]) if found else None

    def enrol(
        self,
        device: str,
        key: PublicKey,
        *,
        replace: bool,
        now: str,
        keep_through: int | None = None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> bool:
        """Let `key` sign for `device`, as `keytable.enrol` has it. Raises UsageError where another key does.

        `before_commit` is called once all that is sure; where it raises, nothing is changed.
        """
        with self.transaction() as db:
            new = key_table.enrol(db, device, key, replace=replace, keep_through=keep_through, now=now)
            before_commit()
        return new

    def revoke(
        self, device: str, kid: str | None, now: str, *, before_commit: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Refuse from now on what keys of `device` (the one `kid`, or all) sign, and raise an alert; their kids.

        `before_commit` as for `enrol`.
        """
        with self.transaction() as db:
            kids = key_table.revoke(db, device, kid, now)
            for one in kids:
                db.execute(schema.ADD_ALERT, revoked_alert_row(device, one, now))
            before_commit()
        return kids

    # --- messages in ---

    def ingest(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal], now: str) -> list[IngestOutcome]:
        """Add all of it in one transaction; the outcome of each arrival.

        Raises StorageError, and Refused where a value of some message cannot be stored: then add them one by one.
        """
        tries = 0
        while True:
            try:
                with self.transaction() as db:
                    batch = IngestBatch(db, now)
                    outcomes = batch.add(arrivals)
                    batch.add_refusals(refusals)
                    batch.finish()
                return outcomes
            except self._database.unstorable_errors as error:
                raise MessageRefused("not storable", str(error)) from error
            except TransactionConflict:
                self.retry_count += 1
                tries += 1
                if tries == _MAX_ATTEMPTS:
                    raise

    def raise_alert(self, row: tuple[Any, ...]) -> None:
        """Add an alert of the collector's own, unless it is there."""
        with self.transaction() as db:
            db.execute(schema.ADD_ALERT, row)

    def has_message(self, message: VerifiedMessage) -> bool:
        """Whether exactly this message is stored."""
        return self._stored_payloads(message) == [(message.payload,)]

    def has_conflicting_message(self, message: VerifiedMessage) -> bool:
        """Whether a message with other bytes is stored in its place."""
        return self._stored_payloads(message) not in ([], [(message.payload,)])

    def acknowledgement(self, device: str, log: str) -> Acknowledgement:
        """What to tell the device; with more than 100 ranges missing, only as far as the first 100 go."""
        return self.acknowledgements([(device, log)])[0]

    def acknowledgements(self, logs: Iterable[LogId], trim: Trim | None = None) -> list[Acknowledgement]:
        """The same of each, all of one moment, whoever stored what they are about."""
        which = [*logs]
        with self.snapshot() as db:
            told = {log: through or 0 for log, (through, _) in db.logs(which).items()}
            missing = db.undeclared_gaps(which, MAX_MISSING_RANGES + 1)
            for log, ranges in missing.items():
                if len(ranges) > MAX_MISSING_RANGES:
                    told[log] = ranges.pop()[0] - 1
                if trim is not None:
                    told[log], missing[log] = trim(log, told[log], ranges)
            newest = db.payloads([(*log, told[log]) for log in which])
        return [
            Acknowledgement(*log, told[log], missing[log], None if payload is None else digest(payload))
            for log, payload in zip(which, newest, strict=True)
        ]

    # --- reports ---

    def newest_logs(self) -> list[tuple[str, str]]:
        """(device, log) of the newest log of each device."""
        newest = "rowid = (SELECT max(rowid) FROM logs WHERE device = l.device)"
        return self._fetch_all(f"SELECT device, log FROM logs l WHERE {newest} ORDER BY device")

    def enrolled_devices(self) -> list[str]:
        """Every device that ever was, in order."""
        return [row[0] for row in self._fetch_all("SELECT device FROM devices ORDER BY device")]

    def devices(self) -> list[dict[str, Any]]:
        """device, key, state, last_seen, through (of its newest log), alerts (open ones), clock (its quality)."""
        return self._fetch_dicts(schema.DEVICES)

    def alerts(self, device: str | None = None, *, closed: bool = False) -> list[dict[str, Any]]:
        """Open alerts, or with `closed` everything that was ever raised or cleared; oldest first."""
        wanted = "(open OR ?) AND (CAST(? AS TEXT) IS NULL OR device = ?)"
        sql = f"SELECT * FROM ({schema.ALERTS}) said WHERE {wanted} ORDER BY time, device, seq"
        return [{**row, "open": bool(row["open"])} for row in self._fetch_dicts(sql, closed, device, device)]

    def progress(self) -> list[dict[str, Any]]:
        """Per device: rows judged, drift windows, results, messages, `drift` state of the last one, open summaries."""
        found = self._fetch_dicts(schema.PROGRESS)
        for row in found:
            row["open"] = [alert["summary"] for alert in self.alerts(row["device"]) if alert["state"] == "raised"]
        return found

    def labels(self, device: str) -> list[tuple[int, str]]:
        """(row, label) of every labelled result of `device`."""
        return self._fetch_all(
            "SELECT row, label FROM results WHERE device = ? AND label IS NOT NULL ORDER BY row", device
        )

    def values(self, device: str) -> list[tuple[int, float]]:
        """(row, value) of every result of `device` that is a number."""
        return self._fetch_all(
            "SELECT row, value FROM results WHERE device = ? AND value IS NOT NULL ORDER BY row", device
        )

    def newest_metric(self, device: str, metric: str) -> float | None:
        """Of all results that the device's newest `quality` message tells of; None where it tells none."""
        sql = """
            SELECT value FROM metrics WHERE device = ? AND metric = ? AND slice = '' AND source = 'device'
            ORDER BY log, seq DESC LIMIT 1"""
        found = self._fetch_all(sql, device, metric)
        return found[0][0] if found else None

    def drift_windows(
        self, *, task: str | None = None, device: str | None = None, since: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Each with its members as JSON text, by task, device and time; of those that ended at `since` or later."""
        rows = self._database.stream(schema.DRIFT_WINDOWS, {"task": task, "device": device, "since": since})
        return (dict(zip(schema.DRIFT_WINDOW_COLUMNS, row, strict=True)) for row in rows)

    def count_drift_windows(self) -> int:
        return int(self._fetch_all("SELECT count(*) FROM drift_windows")[0][0])

    def drift_tasks(self) -> list[str]:
        return [row[0] for row in self._fetch_all("SELECT DISTINCT task FROM drift_windows ORDER BY task")]

    def observed_periods(self, since: str, until: str) -> list[tuple[str, str, str, str, int]]:
        """(task, device, from, to, drift windows) of what was tested between two moments."""
        return self._fetch_all(schema.OBSERVED_PERIODS, since, until)

    def drift_alerts(self, since: str, until: str) -> list[tuple[str, str, str, str, int, int]]:
        """(task, device, subject, time, open, how many since) of the last drift alert of each before `until`."""
        return self._fetch_all(schema.DRIFT_ALERTS, since, until)

    def open_fleet_wide_alerts(self) -> list[tuple[str, str, int]]:
        """(task, subject, seq) of each open alert of fleet-wide drift."""
        return self._fetch_all(schema.OPEN_FLEET_WIDE_ALERTS)

    def gaps(self, device: str | None = None) -> list[dict[str, Any]]:
        """device, log, from, to, declared of each range of seqs that is not here."""
        sql = f'SELECT device, log, first AS "from", last AS "to", declared FROM gaps WHERE {_DEVICE_FILTER} ORDER BY 1, 2, 3'
        return [{**row, "declared": bool(row["declared"])} for row in self._fetch_dicts(sql, device, device)]

    def refusals(self) -> list[dict[str, Any]]:
        """device ('' for strangers), reason, count, first, last."""
        return self._fetch_dicts("SELECT * FROM refusals ORDER BY device, reason")

    # --- evidence out ---

    def logs(self, device: str | None = None) -> list[tuple[str, str, int]]:
        """(device, log, through) of every log, in order."""
        sql = f"SELECT device, log, through FROM logs WHERE {_DEVICE_FILTER} ORDER BY device, log"
        return self._fetch_all(sql, device, device)

    def count_messages(self, device: str | None = None) -> int:
        return int(self._fetch_all(f"SELECT count(*) FROM messages WHERE {_DEVICE_FILTER}", device, device)[0][0])

    def evidence(self, device: str | None = None) -> Iterator[tuple[Any, ...]]:
        """(device, log, seq, kind, topic, payload, jws) of every stored message, in order of the first three."""
        where, values = ("WHERE device = ?", (device,)) if device else ("", ())
        columns = "device, log, seq, kind, topic, payload, jws"
        return self.stream(f"SELECT {columns} FROM messages {where} ORDER BY device, log, seq", values)

    def audit_messages(self, device: str | None, substring: bytes) -> Iterator[tuple[Any, ...]]:
        """(device, topic, payload, jws) of stored `audit` messages whose payload has `holding` in it."""
        where = f"kind = 'audit' AND instr(payload, ?) > 0 AND {_DEVICE_FILTER}"
        sql = f"SELECT device, topic, payload, jws FROM messages WHERE {where}"
        return self.stream(sql, (substring, device, device))

    def result_rows(self, device: str | None = None) -> Iterator[tuple[Any, ...]]:
        """(device, task, row, t, label, score, value, log, seq) of every result, in the order of `evidence`."""
        where, values = ("WHERE device = ?", (device,)) if device else ("", ())
        columns = "device, task, row, t, label, score, value, log, seq"
        return self.stream(f"SELECT {columns} FROM results {where} ORDER BY device, log, seq, row, t", values)

    # --- private ---

    def _stored_payloads(self, message: VerifiedMessage) -> list[tuple[Any, ...]]:
        body = message.body
        if not isinstance(body, LoggedPayload):
            return []
        sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
        return self._fetch_all(sql, body.device, body.log, body.seq)

    def _fetch_all(self, sql: str, *values: Any) -> list[Any]:
        return self._database.execute(sql, values).fetchall()

    def _fetch_dicts(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        cursor = self._database.execute(sql, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]
