"""One transaction's worth of messages on its way into the tables: the writing half of `store`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from agent.alerts import ROTATION_REFUSED, SIGNED_TWICE
from agent.fleet.database import gap_ledger, key_table, schema
from agent.fleet.database.gap_ledger import LogChanges, parse_evictions, parse_log_end
from agent.fleet.database.interface import Connection, LogId
from agent.fleet.database.projection import TableRows, message_alert_row, project_message
from agent.fleet.database.timestamps import TimestampReconstruction
from agent.wire import key_rotation
from agent.wire.messages import AuditPayload, LoggedPayload, StatePayload, VerifiedMessage

OTHER_BYTES = "other bytes"
# How many refused messages of one device and reason are kept whole; all are counted.
MAX_EVIDENCE = {OTHER_BYTES: 1000}
DEFAULT_MAX_EVIDENCE = 20
_UPDATE_STATE = "UPDATE devices SET state = ? WHERE device = ?"

IngestOutcome = Literal["new", "duplicate", "conflict", "live"]


class Arrival(msgspec.Struct, frozen=True):
    """A verified message; `fresh` unless the broker had it retained, which is no sign of life."""

    message: VerifiedMessage
    fresh: bool = True


class Refusal(msgspec.Struct, frozen=True):
    """A message that did not verify, as it came; `device` is the topic's."""

    device: str
    reason: str
    detail: str
    topic: str
    payload: bytes
    jws: str


class IngestBatch:
    """One transaction's worth of messages: rows are gathered and written together at its end.

    The order of what is written keeps several collectors from waiting for each other in a ring: messages, then the
    devices' locks, then what belongs to these devices, then what is of no single one.
    """

    def __init__(self, db: Connection, now: str) -> None:
        self._db, self._now = db, now
        self._rows: TableRows = {}
        self._timestamps = TimestampReconstruction(db, now)
        self._log_changes: dict[LogId, LogChanges] = {}
        self._live_devices: set[str] = set()
        self._states: dict[str, str] = {}
        self._rotations: list[VerifiedMessage] = []
        self._signers: set[str] = set()
        self._refusals: list[Refusal] = []
        self._alerts: list[tuple[Any, ...]] = []

    def add(self, arrivals: Sequence[Arrival]) -> list[IngestOutcome]:
        """What becomes of each."""
        logged = [a.message for a in arrivals if isinstance(a.message.body, LoggedPayload)]
        outcomes = self._store_messages(logged)
        return [self._record_arrival(arrival, outcomes) for arrival in arrivals]

    def add_refusals(self, refusals: Sequence[Refusal]) -> None:
        """Count them, and keep the first few of each kind."""
        self._refusals += refusals

    def finish(self) -> None:
        """Write what was gathered. Raises Refused where a key that signed something new does not count any more."""
        for table, rows in self._rows.items():
            # Empty where a run lists no result: its rows were lost, or `publish` keeps them at home.
            if rows:
                self._db.bulk_insert(table, rows)
        self._db.lock_devices({*self._live_devices, *self._states, *(device for device, _ in self._log_changes)})
        self._timestamps.finish()
        for message, problem in key_table.rotate(self._db, self._rotations, self._now):
            if isinstance(message.body, LoggedPayload):
                self._alerts.append(message_alert_row(ROTATION_REFUSED, message.body, problem, self._now))
        key_table.require_active(self._db, self._signers)
        gap_ledger.apply(self._db, self._log_changes, self._now)
        # The broker keeps the order of one topic; a device's clock may not, so the last to come counts.
        self._db.executemany(_UPDATE_STATE, [(state, device) for device, state in sorted(self._states.items())])
        self._db.update_last_seen(sorted(self._live_devices), self._now)
        self._db.executemany(schema.ADD_ALERT, self._alerts)
        self._write_refusals()

    def _record_arrival(self, arrival: Arrival, outcomes: Iterator[IngestOutcome]) -> IngestOutcome:
        message, body = arrival.message, arrival.message.body
        if arrival.fresh:
            self._live_devices.add(body.device)
        if isinstance(body, StatePayload):
            self._states[body.device] = body.state
        outcome: IngestOutcome = next(outcomes) if isinstance(body, LoggedPayload) else "live"
        if outcome in ("new", "live"):
            self._signers.add(message.signer.key.kid)
        return outcome

    def _store_messages(self, messages: Sequence[VerifiedMessage]) -> Iterator[IngestOutcome]:
        rows = [_message_row(message, self._now) for message in messages]
        added = self._db.add_messages(rows)
        there = iter(self._db.payloads([row[:3] for row, new in zip(rows, added, strict=True) if not new]))
        for message, new in zip(messages, added, strict=True):
            if new:
                self._project_new(message, message.body)
                yield "new"
            elif next(there) == message.payload:
                yield "duplicate"
            else:
                yield self._record_conflict(message, message.body)

    def _project_new(self, message: VerifiedMessage, body: Any) -> None:
        news = self._changes_for((body.device, body.log))
        news.arrived.append(body.seq)
        news.evicted += parse_evictions(body)
        if old := parse_log_end(body):
            other = self._changes_for((body.device, old[0]))
            other.end_seq = max(other.end_seq, old[1])
        project_message(message, self._rows)
        self._timestamps.add(body)
        if isinstance(body, AuditPayload) and body.event == key_rotation.ROTATION_EVENT:
            self._rotations.append(message)

    def _changes_for(self, log: LogId) -> LogChanges:
        return self._log_changes.setdefault(log, LogChanges())

    def _record_conflict(self, message: VerifiedMessage, body: Any) -> IngestOutcome:
        summary = (
            f"{body.device} signed two different messages as seq {body.seq} of log {body.log}: its key or its store "
            "was copied. The first one is kept; see table refused for the other."
        )
        self._alerts.append(message_alert_row(SIGNED_TWICE, body, summary, self._now))
        detail = f"log {body.log} seq {body.seq}"
        self._refusals.append(
            Refusal(body.device, OTHER_BYTES, detail, str(message.topic), message.payload, message.jws)
        )
        return "conflict"

    def _write_refusals(self) -> None:
        named = sorted({_to_storable_text(one.device) for one in self._refusals})
        there = self._db.execute_each("SELECT device FROM devices WHERE device = ?", [(name,) for name in named])
        known = {row[0] for row in there if row is not None}
        listed = [(one.device if one.device in known else "", one) for one in self._refusals]
        # By the row that each of them counts in: it is everybody's.
        for device, one in sorted(listed, key=lambda entry: (entry[0], entry[1].reason)):
            names = {"device": device, "reason": one.reason, "now": self._now}
            count = self._db.execute(schema.ADD_REFUSAL + " RETURNING count", names).fetchone()[0]
            if count <= MAX_EVIDENCE.get(one.reason, DEFAULT_MAX_EVIDENCE):
                detail, topic, token = map(_to_storable_text, (one.detail, one.topic, one.jws))
                evidence = (device, one.reason, detail, topic, one.payload, token, self._now)
                self._db.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?, ?)", evidence)


def _message_row(message: VerifiedMessage, now: str) -> tuple[Any, ...]:
    """Of table messages."""
    body: Any = message.body
    return (
        *(body.device, body.log, body.seq, message.topic.kind, str(message.topic)),
        *(message.payload, message.jws, now),
    )


def _to_storable_text(text: str) -> str:
    """What nobody vouches for must not be what a database cannot hold."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
