"""Notifications of a device without a collector: its alerts, and the file with what the targets know."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageError
from outstation.integrations.notify import queue
from outstation.integrations.notify.config import DATABASE
from outstation.protocol.alerts.incident import Incident
from outstation.protocol.alerts.kinds import TARGET_FAILS_ON_DEVICE

logger = logging.getLogger("outstation.notify")

# A device that cannot send keeps at most this; see the limits of `outstation.integrations.notify.queue`.
MAX_BYTES = 16 << 20
_PAGE_SIZE = 4096
_CHUNK = 1000


class NotifyFile:
    """SQLite file beside the store. Its content can be notified again, so a damaged one is replaced."""

    def __init__(self, folder: Path) -> None:
        self._path, self._is_damaged = folder / DATABASE, False
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            failure = self._to_storage_error(error)
            if not self._is_damaged:
                raise failure from error
            _remove(folder)
            self._db, self._is_damaged = self._open(), False

    def close(self) -> None:
        """Close the file, and remove it if it is damaged: the next opening makes a new one."""
        self._db.close()
        if self._is_damaged:
            _remove(self._path.parent)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._to_storage_error(error) from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        try:
            yield self._db
        except sqlite3.Error as error:
            raise self._to_storage_error(error) from error

    def _to_storage_error(self, error: sqlite3.Error) -> StorageError:
        # A full disk or one that cannot be read damages nothing.
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            self._is_damaged = True
            logger.warning("%s: %s; the file is replaced, and open alerts are told again", self._path, error)
        return StorageError(f"{self._path}: {error}")

    def _open(self) -> sqlite3.Connection:
        if not self._path.exists():
            self._path.touch(mode=0o600)
        db = sqlite3.connect(self._path, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute(f"PRAGMA max_page_count={MAX_BYTES // _PAGE_SIZE}")
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'notify_cursor'").fetchone():
                db.execute("BEGIN IMMEDIATE")
                for statement in queue.TABLES:
                    db.execute(statement)
                db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db


class DeviceAlertSource:
    """The alerts that the store lists, the newest thousand: an `AlertSource` of `integrations.notify.alert_source`."""

    def __init__(
        self, store: Store, message_log: MessageLog, fleet: str, device: str, now: Callable[[], ClockReading]
    ) -> None:
        self._store, self._message_log, self._now = store, message_log, now
        self.fleet, self.sender = fleet, device
        self._last = 0
        self._incidents: dict[str, Incident] = {}

    def changed(self, cursor: int | None) -> tuple[int, list[Incident]]:
        self._read()
        if cursor is None or cursor > self._last:
            # The first start, or a store that was made anew.
            return self._last, self.open_alerts()
        return self._last, [incident for incident in self._incidents.values() if incident.seq > cursor]

    def load(self, keys: Iterable[str]) -> dict[str, Incident]:
        return {key: self._incidents[key] for key in keys if key in self._incidents}

    def open_alerts(self) -> list[Incident]:
        return [incident for incident in self._incidents.values() if incident.is_open]

    def report_target(self, target: str, problem: str | None) -> None:
        kind = TARGET_FAILS_ON_DEVICE
        build = kind.cleared if problem is None else kind.raised
        alert = build(problem or f"Notifications to {target} are accepted again.", None, target=target)
        with self._store.transaction() as tx:
            self._message_log.append(tx, "alerts", None, alert.to_body(), self._now())

    def clear_target_alerts(self) -> None:
        """Clear the alerts of failing targets that are not in the file; one that still fails is notified anew."""
        self._read()
        for incident in self.open_alerts():
            if incident.alert == TARGET_FAILS_ON_DEVICE.alert:
                self.report_target(incident.subject, None)

    def _read(self) -> None:
        """Read the alerts that are new."""
        while rows := self._store.alerts_after(self._last, _CHUNK):
            for number, body in rows:
                if body.get("kept"):
                    # The stream's owner lets no alert leave.
                    continue
                incident = self._to_incident(number, body)
                # At the end: the oldest are forgotten first.
                self._incidents.pop(incident.key_text, None)
                self._incidents[incident.key_text] = incident
            self._last = rows[-1][0]
        cleared = [key for key, incident in self._incidents.items() if not incident.is_open]
        for key in cleared[: max(0, len(self._incidents) - _CHUNK)]:
            del self._incidents[key]

    def _to_incident(self, number: int, body: dict[str, Any]) -> Incident:
        revision, time, summary = int(body.get("revision", 1)), body["time"], str(body["summary"])
        raised = Incident(
            status="raised",
            severity=body["severity"],
            device=self.sender,
            task=body.get("task"),
            alert=body["alert"],
            subject=body["subject"],
            summary=summary,
            raised=time,
            updated=time,
            id=str(body["id"]),
            seq=number,
            raised_seq=number,
            revision=revision,
        )
        before = self._incidents.get(raised.key_text)
        if body["state"] == "cleared":
            ended = {"status": "cleared", "seq": number, "updated": time, "cleared": time, "cleared_summary": summary}
            return msgspec.structs.replace(before or raised, **ended)
        is_again = before is not None and before.is_open and revision > 1
        return msgspec.structs.replace(raised, raised=before.raised) if is_again and before is not None else raised


@contextlib.contextmanager
def read_states(folder: Path) -> Iterator[sqlite3.Connection]:
    """Open the file for reading, or empty tables before the first start. Raises StorageError."""
    path = folder / DATABASE
    try:
        if path.exists():
            db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        else:
            db = sqlite3.connect(":memory:")
            for statement in queue.TABLES:
                db.execute(statement)
        with contextlib.closing(db):
            yield db
    except sqlite3.Error as error:
        raise StorageError(f"{path}: {error}") from error


@contextlib.contextmanager
def open_notifications(folder: Path, source: DeviceAlertSource) -> Iterator[tuple[NotifyFile, DeviceAlertSource]]:
    """Open the file for the notifier's own thread."""
    with contextlib.closing(NotifyFile(folder)) as file:
        with file.snapshot() as db:
            is_new = queue.load_cursor(db) is None
        if is_new:
            source.clear_target_alerts()
        yield file, source


def forget_notifications(folder: Path, source: DeviceAlertSource) -> None:
    """Clear the alerts of targets and remove the file, for a config without targets. Raises StorageError."""
    source.clear_target_alerts()
    _remove(folder)


def _remove(folder: Path) -> None:
    try:
        # The file last: without it, nothing tries again.
        for suffix in ("-wal", "-shm", ""):
            (folder / f"{DATABASE}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder / DATABASE}: cannot be removed: {error.strerror}") from error
