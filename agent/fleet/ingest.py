"""One transaction's worth of messages on its way into the tables: the writing half of `store`."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Literal

from agent.fleet import keytable, schema
from agent.fleet.dating import Dating
from agent.fleet.ledger import Ledger, ended, evictions
from agent.fleet.unfold import Rows, collector_alert, unfold
from agent.wire import rotation
from agent.wire.messages import Audit, Logged, Message, State

OTHER_BYTES = "other bytes"
# How many refused messages of one device and reason are kept whole; all are counted.
MAX_EVIDENCE = {OTHER_BYTES: 1000}
DEFAULT_MAX_EVIDENCE = 20

Outcome = Literal["new", "duplicate", "conflict", "live"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A verified message; `fresh` unless the broker had it retained, which is no sign of life."""

    message: Message
    fresh: bool = True


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that did not verify, as it came; `device` is the topic's."""

    device: str
    reason: str
    detail: str
    topic: str
    payload: bytes
    jws: str


class Batch:
    """One transaction's worth of messages: rows are gathered and written together at its end."""

    def __init__(self, db: sqlite3.Connection, now: str) -> None:
        self._db, self._now = db, now
        self._rows: Rows = {}
        self._dating = Dating(db, now)
        self._ledgers: dict[tuple[str, str], Ledger] = {}
        self._logs: set[tuple[str, str]] = set()
        self._seen: set[str] = set()
        self._rotations: list[Message] = []
        self._signers: set[str] = set()

    def add(self, arrival: Arrival) -> Outcome:
        message, body = arrival.message, arrival.message.body
        if arrival.fresh:
            self._seen.add(body.device)
        if isinstance(body, State):
            # The broker keeps the order of one topic; a device's clock may not, so the last to come counts.
            self._db.execute("UPDATE devices SET state = ? WHERE device = ?", (body.state, body.device))
        outcome: Outcome = self._log(message, body) if isinstance(body, Logged) else "live"
        if outcome in ("new", "live"):
            self._signers.add(message.signer.key.kid)
        return outcome

    def _log(self, message: Message, body: Logged) -> Outcome:
        key = (body.device, body.log, body.seq)
        rest = (message.topic.kind, str(message.topic), message.payload, message.jws, self._now)
        if not self._db.execute(schema.ADD_MESSAGE, (*key, *rest)).rowcount:
            stored = self._db.execute("SELECT payload FROM messages WHERE device=? AND log=? AND seq=?", key).fetchone()
            return "duplicate" if stored[0] == message.payload else self._conflict(message, body)
        if key[:2] not in self._logs:
            self._logs.add(key[:2])
            self._db.execute("INSERT INTO logs VALUES (?, ?, 0, ?) ON CONFLICT DO NOTHING", (*key[:2], self._now))
        ledger = self._ledger(body.device, body.log)
        ledger.arrived(body.seq)
        ledger.evicted(evictions(body))
        if old := ended(body):
            self._ledger(body.device, old[0]).ended(old[1])
        unfold(message, self._rows)
        self._dating.add(body)
        if isinstance(body, Audit) and body.event == rotation.EVENT:
            self._rotations.append(message)
        return "new"

    def _conflict(self, message: Message, body: Logged) -> Outcome:
        summary = (
            f"{body.device} signed two different messages as seq {body.seq} of log {body.log}: its key or its store "
            "was copied. The first one is kept; see table refused for the other."
        )
        self._db.execute(schema.ADD_ALERT, collector_alert(body, summary, self._now))
        detail = f"log {body.log} seq {body.seq}"
        self.refuse(Refusal(body.device, OTHER_BYTES, detail, str(message.topic), message.payload, message.jws))
        return "conflict"

    def refuse(self, refusal: Refusal) -> None:
        """Count it, and keep the first few of its kind."""
        known = self._db.execute("SELECT 1 FROM devices WHERE device = ?", (refusal.device,)).fetchone()
        names = {"device": refusal.device if known else "", "reason": refusal.reason, "now": self._now}
        count = self._db.execute(schema.ADD_REFUSAL + " RETURNING count", names).fetchone()[0]
        if count <= MAX_EVIDENCE.get(refusal.reason, DEFAULT_MAX_EVIDENCE):
            evidence = (names["device"], refusal.reason, refusal.detail, refusal.topic, refusal.payload, refusal.jws)
            self._db.execute("INSERT INTO refused VALUES (?, ?, ?, ?, ?, ?, ?)", (*evidence, self._now))

    def finish(self) -> None:
        """Write what was gathered. Raises Refused where a key that signed something new does not count any more."""
        for table, rows in self._rows.items():
            # Empty where a run lists no result: its rows were lost, or `publish` keeps them at home.
            if rows:
                marks = ", ".join("?" * len(rows[0]))
                self._db.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)
        self._dating.finish()
        for message, problem in keytable.rotate(self._db, self._rotations, self._now):
            if isinstance(message.body, Logged):
                self._db.execute(schema.ADD_ALERT, collector_alert(message.body, problem, self._now))
        keytable.require_active(self._db, self._signers)
        for (device, log), ledger in self._ledgers.items():
            sql = "UPDATE logs SET through = ? WHERE device = ? AND log = ?"
            self._db.execute(sql, (ledger.through, device, log))
        for device in self._seen:
            self._db.execute("UPDATE devices SET last_seen = ? WHERE device = ?", (self._now, device))

    def _ledger(self, device: str, log: str) -> Ledger:
        """That of a log of which messages may have come."""
        if (device, log) not in self._ledgers:
            row = self._db.execute("SELECT through FROM logs WHERE device = ? AND log = ?", (device, log)).fetchone()
            self._ledgers[device, log] = Ledger(self._db, device, log, row[0] if row else 0)
        return self._ledgers[device, log]
