"""All SQL of the fleet: what devices sent, as evidence and as rows, in one SQLite file.

A message is added once. Adding is idempotent and order-free: any order, any repeats of the same messages give the same
tables. When `ingest` returns, its messages are on the disk; when it raises, nothing of them is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlite_utils

from agent.errors import Refused, StorageBusy, StorageError, StorageFull, UsageError
from agent.fleet import keytable, schema
from agent.fleet.ingest import Arrival, Batch, Outcome, Refusal
from agent.fleet.unfold import revoked_alert
from agent.wire.keys import PublicKey, public_key
from agent.wire.messages import Logged, Message, digest

MAX_MISSING_RANGES = 100
LOCK_WAIT_S = 5.0
# Values that SQLite cannot hold: one such message must not hold up the others of its transaction.
_UNSTORABLE = (OverflowError, UnicodeEncodeError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError)


@dataclass(frozen=True, slots=True)
class Acknowledgement:
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

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self._lock: int | None = None
        if read_only and not path.exists():
            raise UsageError(f"{path}: no database here yet; `outstation fleet enrol DEVICE` makes it")
        with self._translated():
            if not read_only and path.parent.is_dir():
                # Only its owner reads what devices measured.
                path.touch(mode=0o600)
            mode = "ro" if read_only else "rwc"
            self._db = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None)
            # Damaged text must reach the audit, not stop it.
            self._db.text_factory = lambda data: data.decode(errors="surrogateescape")
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close; the last one to do so checkpoints, alone."""
        with contextlib.suppress(StorageError), self._alone():
            self._db.close()
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: committed when the block ends, rolled back when it raises."""
        with self._translated(), self._alone():
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Everything read inside is of one moment; of that of the outer one, where there is one."""
        if self._db.in_transaction:
            yield self._db
            return
        with self._translated():
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    # --- keys ---

    def keys_version(self) -> int:
        """Grows with every change of the keys."""
        return int(self._all("SELECT value FROM meta WHERE name = 'keys_version'")[0][0])

    def enrolled_keys(self) -> list[tuple[str, str, str, bool, str | None, int | None]]:
        """(kid, device, base64url key, revoked, log and seq up to which it counts) of every key ever enrolled."""
        found = self._all("SELECT kid, device, key, revoked, log, through FROM keys")
        return [(kid, device, text, revoked is not None, *bound) for kid, device, text, revoked, *bound in found]

    def active_key(self, device: str) -> PublicKey | None:
        """The key that may sign for `device`; None before it is enrolled."""
        found = self._all("SELECT key FROM keys WHERE device = ? AND revoked IS NULL AND through IS NULL", device)
        return public_key(found[0][0]) if found else None

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
            new = keytable.enrol(db, device, key, replace=replace, keep_through=keep_through, now=now)
            before_commit()
        return new

    def revoke(
        self, device: str, kid: str | None, now: str, *, before_commit: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Refuse from now on what keys of `device` (the one `kid`, or all) sign, and raise an alert; their kids.

        `before_commit` as for `enrol`.
        """
        with self.transaction() as db:
            kids = keytable.revoke(db, device, kid, now)
            for one in kids:
                db.execute(schema.ADD_ALERT, revoked_alert(device, one, now))
            before_commit()
        return kids

    # --- messages in ---

    def ingest(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal], now: str) -> list[Outcome]:
        """Add all of it in one transaction; the outcome of each arrival.

        Raises StorageError, and Refused where a value of some message cannot be stored: then add them one by one.
        """
        try:
            with self.transaction() as db:
                batch = Batch(db, now)
                outcomes = [batch.add(arrival) for arrival in arrivals]
                for refusal in refusals:
                    batch.refuse(refusal)
                batch.finish()
        except _UNSTORABLE as error:
            raise Refused("not storable", str(error)) from error
        return outcomes

    def raise_alert(self, row: tuple[Any, ...]) -> None:
        """Add an alert of the collector's own, unless it is there."""
        with self.transaction() as db:
            db.execute(schema.ADD_ALERT, row)

    def holds(self, message: Message) -> bool:
        """Whether exactly this message is stored."""
        return self._at_its_place(message) == [(message.payload,)]

    def holds_another(self, message: Message) -> bool:
        """Whether a message with other bytes is stored in its place."""
        return self._at_its_place(message) not in ([], [(message.payload,)])

    def acknowledgement(self, device: str, log: str) -> Acknowledgement:
        """What to tell the device; with more than 100 ranges missing, only as far as the first 100 go."""
        [(through,)] = self._all("SELECT through FROM logs WHERE device = ? AND log = ?", device, log)
        sql = "SELECT first, last FROM gaps WHERE device = ? AND log = ? AND NOT declared ORDER BY first LIMIT ?"
        missing = self._all(sql, device, log, MAX_MISSING_RANGES + 1)
        if len(missing) > MAX_MISSING_RANGES:
            through = missing.pop()[0] - 1
        sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
        newest = self._all(sql, device, log, through)
        return Acknowledgement(device, log, through, missing, digest(newest[0][0]) if newest else None)

    # --- reports ---

    def newest_logs(self) -> list[tuple[str, str]]:
        """(device, log) of the newest log of each device."""
        return [row[:2] for row in self._all("SELECT device, log, max(rowid) FROM logs GROUP BY device")]

    def enrolled(self) -> list[str]:
        """Every device that ever was, in order."""
        return [row[0] for row in self._all("SELECT device FROM devices ORDER BY device")]

    def devices(self) -> list[dict[str, Any]]:
        """device, key, state, last_seen, through (of its newest log), alerts (open ones), clock (its quality)."""
        return self._records(schema.DEVICES)

    def alerts(self, device: str | None = None, *, closed: bool = False) -> list[dict[str, Any]]:
        """Open alerts, or with `closed` everything that was ever raised or cleared; oldest first."""
        wanted = "(open OR ?) AND (? IS NULL OR device = ?)"
        sql = f"SELECT * FROM ({schema.ALERTS}) WHERE {wanted} ORDER BY time, device, seq"
        return [{**row, "open": bool(row["open"])} for row in self._records(sql, closed, device, device)]

    def progress(self) -> list[dict[str, Any]]:
        """Per device: rows judged, drift windows, results, messages, `drift` state of the last one, open summaries."""
        found = self._records(schema.PROGRESS)
        for row in found:
            row["open"] = [alert["summary"] for alert in self.alerts(row["device"]) if alert["state"] == "raised"]
        return found

    def labels(self, device: str) -> list[tuple[int, str]]:
        """(row, label) of every labelled result of `device`."""
        return self._all("SELECT row, label FROM results WHERE device = ? AND label IS NOT NULL ORDER BY row", device)

    def values(self, device: str) -> list[tuple[int, float]]:
        """(row, value) of every result of `device` that is a number."""
        return self._all("SELECT row, value FROM results WHERE device = ? AND value IS NOT NULL ORDER BY row", device)

    def newest_metric(self, device: str, metric: str) -> float | None:
        """Of all results that the device's newest `quality` message tells of; None where it tells none."""
        sql = """
            SELECT value FROM metrics WHERE device = ? AND metric = ? AND slice = '' AND source = 'device'
            ORDER BY log, seq DESC LIMIT 1"""
        found = self._all(sql, device, metric)
        return found[0][0] if found else None

    def drift_windows(
        self, *, task: str | None = None, device: str | None = None, since: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Each with its members as JSON text, by task, device and time; of those that ended at `since` or later."""
        cursor = self._db.execute(schema.DRIFT_WINDOWS, {"task": task, "device": device, "since": since})
        names = [column[0] for column in cursor.description]
        return (dict(zip(names, row, strict=True)) for row in cursor)

    def count_drift_windows(self) -> int:
        return int(self._all("SELECT count(*) FROM drift_windows")[0][0])

    def drift_tasks(self) -> list[str]:
        return [row[0] for row in self._all("SELECT DISTINCT task FROM drift_windows ORDER BY task")]

    def watched(self, since: str, until: str) -> list[tuple[str, str, str, str, int]]:
        """(task, device, from, to, drift windows) of what was tested between two moments."""
        return self._all(schema.WATCHED, since, until)

    def drift_alerts(self, since: str, until: str) -> list[tuple[str, str, str, str, int, int]]:
        """(task, device, subject, time, open, how many since) of the last drift alert of each before `until`."""
        return self._all(schema.DRIFT_ALERTS, since, until)

    def open_wide(self) -> list[tuple[str, str, int]]:
        """(task, subject, seq) of each open alert of fleet-wide drift."""
        return self._all(schema.OPEN_WIDE)

    def gaps(self, device: str | None = None) -> list[dict[str, Any]]:
        """device, log, from, to, declared of each range of seqs that is not here."""
        sql = 'SELECT device, log, first AS "from", last AS "to", declared FROM gaps WHERE ? IS NULL OR device = ?'
        return [{**row, "declared": bool(row["declared"])} for row in self._records(sql, device, device)]

    def refusals(self) -> list[dict[str, Any]]:
        """device ('' for strangers), reason, count, first, last."""
        return self._records("SELECT * FROM refusals ORDER BY device, reason")

    # --- evidence out ---

    def logs(self, device: str | None = None) -> list[tuple[str, str, int]]:
        """(device, log, through) of every log, in order."""
        sql = "SELECT device, log, through FROM logs WHERE ? IS NULL OR device = ? ORDER BY device, log"
        return self._all(sql, device, device)

    def count_messages(self, device: str | None = None) -> int:
        return int(self._all("SELECT count(*) FROM messages WHERE ? IS NULL OR device = ?", device, device)[0][0])

    def evidence(self, device: str | None = None) -> Iterator[tuple[Any, ...]]:
        """(device, log, seq, kind, topic, payload, jws) of every stored message, in order of the first three."""
        where, values = ("WHERE device = ?", (device,)) if device else ("", ())
        columns = "device, log, seq, kind, topic, payload, jws"
        return self._db.execute(f"SELECT {columns} FROM messages {where} ORDER BY device, log, seq", values)

    def audits(self, device: str | None, holding: bytes) -> Iterator[tuple[Any, ...]]:
        """(device, topic, payload, jws) of stored `audit` messages whose payload has `holding` in it."""
        where = "kind = 'audit' AND instr(payload, ?) AND (? IS NULL OR device = ?)"
        sql = f"SELECT device, topic, payload, jws FROM messages WHERE {where}"
        return self._db.execute(sql, (holding, device, device))

    def unfolded(self, device: str | None = None) -> Iterator[tuple[Any, ...]]:
        """(device, task, row, t, label, score, value, log, seq) of every result, in the order of `evidence`."""
        where, values = ("WHERE device = ?", (device,)) if device else ("", ())
        columns = "device, task, row, t, label, score, value, log, seq"
        return self._db.execute(f"SELECT {columns} FROM results {where} ORDER BY device, log, seq, rowid", values)

    # --- private ---

    def _at_its_place(self, message: Message) -> list[tuple[Any, ...]]:
        body = message.body
        if not isinstance(body, Logged):
            return []
        sql = "SELECT payload FROM messages WHERE device = ? AND log = ? AND seq = ?"
        return self._all(sql, body.device, body.log, body.seq)

    def _open(self) -> None:
        if not self.read_only:
            name = self.path.with_name(self.path.name + ".lock")
            try:
                self._lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise StorageError(f"{name}: cannot be opened: {error.strerror}") from error
        with self._translated(), self._alone():
            for pragma, wanted in schema.PRAGMAS if not self.read_only else ():
                self._db.execute(f"PRAGMA {pragma}")
                got = wanted and str(self._db.execute(f"PRAGMA {pragma.partition('=')[0]}").fetchone()[0])
                if got != wanted:
                    raise StorageError(f"{self.path}: PRAGMA {pragma} gave {got}; it must be on a local disk")
            database = sqlite_utils.Database(self._db, execute_plugins=False)
            if not self.read_only:
                schema.migrations.apply(database)
            elif schema.migrations.pending(database):
                raise UsageError(f"{self.path}: made by an older version; start `outstation fleet collect` once")

    def _all(self, sql: str, *values: Any) -> list[Any]:
        with self._translated():
            return self._db.execute(sql, values).fetchall()

    def _records(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        with self._translated():
            cursor = self._db.execute(sql, values)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes or checkpoints meanwhile: SQLite before 3.51.3 can lose commits when two do."""
        if self._lock is None:
            yield
            return
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageBusy(f"{self.path}: another process keeps it locked") from None
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _UNSTORABLE:
            raise
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            kind = StorageFull if name == "SQLITE_FULL" else StorageError
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                kind = StorageBusy
            raise kind(f"{self.path}: {error}") from error
