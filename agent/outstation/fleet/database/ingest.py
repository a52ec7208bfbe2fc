"""Ingest: one transaction of messages on its way into the tables.

Rows are gathered and written together at the end. The order of the writes prevents deadlocks between collectors:
messages and projections first, then the locks of the devices, then the rows of these devices, then shared rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from outstation.fleet.database import gap_ledger, key_table, log_succession
from outstation.fleet.database.alerts import add_alerts, merge_incidents, message_alert_row
from outstation.fleet.database.gap_ledger import LogChanges
from outstation.fleet.database.interface import Connection, LogId, Row
from outstation.fleet.database.projection import TableRows, project_message, provenance_row
from outstation.fleet.database.schema.message_tables import ALERTS, RESULT_MESSAGES, RESULT_PROVENANCE
from outstation.fleet.database.timestamps import TimestampReconstruction
from outstation.protocol.alerts.kinds import ROTATION_REFUSED, SIGNED_TWICE
from outstation.protocol.wire import key_rotation
from outstation.protocol.wire.messages import AuditPayload, LoggedPayload, ResultsPayload, StatePayload
from outstation.protocol.wire.verification import VerifiedMessage

CONFLICTING_PAYLOAD, OVER_QUOTA = "conflicting payload", "over quota"
# How many refused messages of one device and reason are stored as samples; all are counted.
MAX_SAMPLES = {CONFLICTING_PAYLOAD: 1000, OVER_QUOTA: 0}
DEFAULT_MAX_SAMPLES = 20
_UPDATE_STATE = "UPDATE devices SET state = ? WHERE device = ?"
_COUNT_REFUSAL = """
    INSERT INTO refusals VALUES (:device, :reason, 1, :now, :now)
    ON CONFLICT (device, reason) DO UPDATE SET count = refusals.count + 1, last = :now RETURNING count
"""
_INSERT_SAMPLE = "INSERT INTO refusal_samples VALUES (?, ?, ?, ?, ?, ?, ?)"

IngestOutcome = Literal["new", "duplicate", "conflict", "live"]


class Arrival(msgspec.Struct, frozen=True):
    """A verified message; `fresh` unless the broker had retained it, which does not show that the device is alive."""

    message: VerifiedMessage
    fresh: bool = True


class Refusal(msgspec.Struct, frozen=True):
    """A message that did not verify, as it arrived; `device` is the one in its topic."""

    device: str
    reason: str
    detail: str
    topic: str
    payload: bytes
    jws: str


class IngestBatch:
    """The messages of one transaction: `add`, then `finish`.

    All refusals are counted; the first few of each device and reason are stored as samples.
    """

    def __init__(self, db: Connection, refusals: Sequence[Refusal], now: str) -> None:
        self._db, self._refusals, self._now = db, [*refusals], now
        self._rows: TableRows = {}
        self._provenance: dict[Row, Row] = {}
        self._timestamps = TimestampReconstruction(db)
        self._log_changes: dict[LogId, LogChanges] = {}
        self._live_devices: set[str] = set()
        self._states: dict[str, str] = {}
        self._rotations: list[VerifiedMessage] = []
        self._signers: set[str] = set()
        self._alerts: list[Row] = []

    def add(self, arrivals: Sequence[Arrival]) -> list[IngestOutcome]:
        logged = [a.message for a in arrivals if isinstance(a.message.body, LoggedPayload)]
        stored = self._store_messages(logged)
        outcomes: list[IngestOutcome] = []
        for arrival in arrivals:
            body = arrival.message.body
            if arrival.fresh:
                self._live_devices.add(body.device)
            if isinstance(body, StatePayload):
                self._states[body.device] = body.state
            outcomes.append(next(stored) if isinstance(body, LoggedPayload) else "live")
            if outcomes[-1] in ("new", "live"):
                self._signers.add(arrival.message.signer.key.kid)
        return outcomes

    def finish(self) -> None:
        """Write all rows. Raises MessageRefused if the key of a new message was revoked in the meantime."""
        for table, rows in self._rows.items():
            # Empty where a run lists no result: its rows were lost, or `publish` keeps them on the device.
            if rows:
                self._db.bulk_insert(table, rows)
        self._db.lock_devices({*self._live_devices, *self._states, *(device for device, _ in self._log_changes)})
        self._db.insert_missing(RESULT_PROVENANCE.name, [*self._provenance.values()])
        self._timestamps.finish()
        for message, problem in key_table.rotate(self._db, self._rotations, self._now):
            if isinstance(message.body, LoggedPayload):
                self._alerts.append(message_alert_row(ROTATION_REFUSED, message.body, problem, self._now))
        key_table.require_active(self._db, self._signers)
        gap_ledger.apply(self._db, self._log_changes)
        log_succession.apply(self._db, self._log_changes, self._now)
        if alerts := self._rows.get(ALERTS.name):
            merge_incidents(self._db, alerts)
        # The last state to arrive counts: the broker keeps the order of one topic, a device's clock may not.
        self._db.executemany(_UPDATE_STATE, [(state, device) for device, state in sorted(self._states.items())])
        self._db.update_last_seen(sorted(self._live_devices), self._now)
        add_alerts(self._db, self._alerts)
        self._write_refusals()

    def _store_messages(self, messages: Sequence[VerifiedMessage]) -> Iterator[IngestOutcome]:
        rows: list[Row] = []
        for message in messages:
            body: Any = message.body
            key, topic = (body.device, body.log, body.seq), message.topic
            rows.append((*key, topic.kind, str(topic), message.payload, message.jws, self._now))
        added = self._remove_pruned(rows, self._db.add_messages(rows))
        stored = iter(self._db.payloads([row[:3] for row, new in zip(rows, added, strict=True) if not new]))
        for message, new in zip(messages, added, strict=True):
            if new:
                self._project_new(message, message.body)
                yield "new"
            elif (payload := next(stored)) == message.payload or payload is None:
                yield "duplicate"
            else:
                body = message.body
                summary = (
                    f"{body.device} signed two different messages as seq {body.seq} of log {body.log}: its key or its "
                    "store was copied. The first one is kept; table refusal_samples has the other."
                )
                self._alerts.append(message_alert_row(SIGNED_TWICE, body, summary, self._now))
                head = (body.device, CONFLICTING_PAYLOAD, f"log {body.log} seq {body.seq}", str(message.topic))
                self._refusals.append(Refusal(*head, message.payload, message.jws))
                yield "conflict"

    def _remove_pruned(self, rows: Sequence[Row], added: Sequence[bool]) -> list[bool]:
        """Take back messages that `fleet db prune` removed before; return which of the others are new.

        After the insert, because a pruning waits for transactions that wrote messages.
        """
        if self._db.execute("SELECT 1 FROM pruned_logs LIMIT 1").fetchone() is None:
            return [*added]
        logs = sorted({row[:2] for row, new in zip(rows, added, strict=True) if new})
        rows_of_logs = self._db.execute_each("SELECT through FROM pruned_logs WHERE device = ? AND log = ?", logs)
        through = {log: seq for log, row in zip(logs, rows_of_logs, strict=True) for seq in row or ()}
        places = zip(rows, added, strict=True)
        pruned = [new and seq <= through.get((device, log), 0) for (device, log, seq, *_), new in places]
        keys = [row[:3] for row, is_pruned in zip(rows, pruned, strict=True) if is_pruned]
        self._db.executemany("DELETE FROM messages WHERE device = ? AND log = ? AND seq = ?", keys)
        return [new and not is_pruned for new, is_pruned in zip(added, pruned, strict=True)]

    def _project_new(self, message: VerifiedMessage, body: Any) -> None:
        gap_ledger.add_changes(self._log_changes, body, self._now)
        project_message(message, self._rows)
        if isinstance(body, ResultsPayload):
            # The first message of those that share it is enough.
            device, *_, provenance = self._rows[RESULT_MESSAGES.name][-1]
            if (device, provenance) not in self._provenance:
                self._provenance[device, provenance] = provenance_row(body)
        self._timestamps.add(body, self._now)
        if isinstance(body, AuditPayload) and body.event == key_rotation.ROTATION_EVENT:
            self._rotations.append(message)

    def _write_refusals(self) -> None:
        names = sorted({_to_storable_text(refusal.device) for refusal in self._refusals})
        enrolled = self._db.execute_each("SELECT device FROM devices WHERE device = ?", [(name,) for name in names])
        known = {device for (device,) in filter(None, enrolled)}
        counted = [(refusal.device if refusal.device in known else "", refusal) for refusal in self._refusals]
        # In order of the counters that all collectors share, so that none waits for the other in turn.
        for device, refusal in sorted(counted, key=lambda entry: (entry[0], entry[1].reason)):
            values = {"device": device, "reason": refusal.reason, "now": self._now}
            count = self._db.execute(_COUNT_REFUSAL, values).fetchone()[0]
            if count <= MAX_SAMPLES.get(refusal.reason, DEFAULT_MAX_SAMPLES):
                detail, topic, token = map(_to_storable_text, (refusal.detail, refusal.topic, refusal.jws))
                sample = (device, refusal.reason, detail, topic, refusal.payload, token, self._now)
                self._db.execute(_INSERT_SAMPLE, sample)


def _to_storable_text(text: str) -> str:
    """Replace characters that a database cannot store; only for text that no key signed."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
