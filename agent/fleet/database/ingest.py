"""One transaction's worth of messages on its way into the tables: the writing half of `store`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from agent.fleet.database import gap_ledger, key_table, schema
from agent.fleet.database.gap_ledger import News, ended, evictions
from agent.fleet.database.interface import Connection, Log
from agent.fleet.database.projection import Rows, collector_alert, unfold
from agent.fleet.database.timestamps import Dating
from agent.wire import key_rotation
from agent.wire.messages import Audit, Logged, Message, State

OTHER_BYTES = "other bytes"
# How many refused messages of one device and reason are kept whole; all are counted.
MAX_EVIDENCE = {OTHER_BYTES: 1000}
DEFAULT_MAX_EVIDENCE = 20
_STATE = "UPDATE devices SET state = ? WHERE device = ?"

Outcome = Literal["new", "duplicate", "conflict", "live"]


class Arrival(msgspec.Struct, frozen=True):
    """A verified message; `fresh` unless the broker had it retained, which is no sign of life."""

    message: Message
    fresh: bool = True


class Refusal(msgspec.Struct, frozen=True):
    """A message that did not verify, as it came; `device` is the topic's."""

    device: str
    reason: str
    detail: str
    topic: str
    payload: bytes
    jws: str


class Batch:
    """One transaction's worth of messages: rows are gathered and written together at its end.

    The order of what is written keeps several collectors from waiting for each other in a ring: messages, then the
    devices' locks, then what belongs to these devices, then what is of no single one.
    """

    def __init__(self, db: Connection, now: str) -> None:
        self._db, self._now = db, now
        self._rows: Rows = {}
        self._dating = Dating(db, now)
        self._news: dict[Log, News] = {}
        self._seen: set[str] = set()
        self._states: dict[str, str] = {}
        self._rotations: list[Message] = []
        self._signers: set[str] = set()
        self._refusals: list[Refusal] = []
        self._alerts: list[tuple[Any, ...]] = []

    def add(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """What becomes of each."""
        logged = [a.message for a in arrivals if isinstance(a.message.body, Logged)]
        outcomes = self._log(logged)
        return [self._arrived(arrival, outcomes) for arrival in arrivals]

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Count them, and keep the first few of each kind."""
        self._refusals += refusals

    def finish(self) -> None:
        """Write what was gathered. Raises Refused where a key that signed something new does not count any more."""
        for table, rows in self._rows.items():
            # Empty where a run lists no result: its rows were lost, or `publish` keeps them at home.
            if rows:
                self._db.load(table, rows)
        self._db.lock({*self._seen, *self._states, *(device for device, _ in self._news)})
        self._dating.finish()
        for message, problem in key_table.rotate(self._db, self._rotations, self._now):
            if isinstance(message.body, Logged):
                self._alerts.append(collector_alert(message.body, problem, self._now))
        key_table.require_active(self._db, self._signers)
        gap_ledger.note(self._db, self._news, self._now)
        # The broker keeps the order of one topic; a device's clock may not, so the last to come counts.
        self._db.executemany(_STATE, [(state, device) for device, state in sorted(self._states.items())])
        self._db.seen(sorted(self._seen), self._now)
        self._db.executemany(schema.ADD_ALERT, self._alerts)
        self._refuse()

    def _arrived(self, arrival: Arrival, outcomes: Iterator[Outcome]) -> Outcome:
        message, body = arrival.message, arrival.message.body
        if arrival.fresh:
            self._seen.add(body.device)
        if isinstance(body, State):
            self._states[body.device] = body.state
        outcome: Outcome = next(outcomes) if isinstance(body, Logged) else "live"
        if outcome in ("new", "live"):
            self._signers.add(message.signer.key.kid)
        return outcome

    def _log(self, messages: Sequence[Message]) -> Iterator[Outcome]:
        rows = [_row(message, self._now) for message in messages]
        added = self._db.add_messages(rows)
        there = iter(self._db.payloads([row[:3] for row, new in zip(rows, added, strict=True) if not new]))
        for message, new in zip(messages, added, strict=True):
            if new:
                self._new(message, message.body)
                yield "new"
            elif next(there) == message.payload:
                yield "duplicate"
            else:
                yield self._conflict(message, message.body)

    def _new(self, message: Message, body: Any) -> None:
        news = self._of((body.device, body.log))
        news.arrived.append(body.seq)
        news.evicted += evictions(body)
        if old := ended(body):
            other = self._of((body.device, old[0]))
            other.ended = max(other.ended, old[1])
        unfold(message, self._rows)
        self._dating.add(body)
        if isinstance(body, Audit) and body.event == key_rotation.EVENT:
            self._rotations.append(message)

    def _of(self, log: Log) -> News:
        return self._news.setdefault(log, News())

    def _conflict(self, message: Message, body: Any) -> Outcome:
        summary = (
            f"{body.device} signed two different messages as seq {body.seq} of log {body.log}: its key or its store "
            "was copied. The first one is kept; see table refused for the other."
        )
        self._alerts.append(collector_alert(body, summary, self._now))
        detail = f"log {body.log} seq {body.seq}"
        self._refusals.append(
            Refusal(body.device, OTHER_BYTES, detail, str(message.topic), message.payload, message.jws)
        )
        return "conflict"

    def _refuse(self) -> None:
        named = sorted({_storable(one.device) for one in self._refusals})
        there = self._db.each("SELECT device FROM devices WHERE device = ?", [(name,) for name in named])
        known = {row[0] for row in there if row is not None}
        listed = [(one.device if one.device in known else "", one) for one in self._refusals]
        # By the row that each of them counts in: it is everybody's.
        for device, one in sorted(listed, key=lambda entry: (entry[0], entry[1].reason)):
            names = {"device": device, "reason": one.reason, "now": self._now}
            count = self._db.execute(schema.ADD_REFUSAL + " RETURNING count", names).fetchone()[0]
            if count <= MAX_EVIDENCE.get(one.reason, DEFAULT_MAX_EVIDENCE):
                detail, topic, token = map(_storable, (one.detail, one.topic, one.jws))
                evidence = (device, one.reason, detail, topic, one.payload, token, self._now)
                self._db.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?, ?)", evidence)


def _row(message: Message, now: str) -> tuple[Any, ...]:
    """Of table messages."""
    body: Any = message.body
    return (
        *(body.device, body.log, body.seq, message.topic.kind, str(message.topic)),
        *(message.payload, message.jws, now),
    )


def _storable(text: str) -> str:
    """What nobody vouches for must not be what a database cannot hold."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
