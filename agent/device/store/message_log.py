"""Gives each outgoing message its place in the log: seq, prev and signature, inside the transaction that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from agent import clock
from agent.alerts import Alert
from agent.clock import ClockReading
from agent.device.store import cost
from agent.device.store.transaction import OutboxMessage, Transaction
from agent.transport.compressed import compress
from agent.transport.packets import OutgoingMessage
from agent.wire import jws, key_rotation, messages
from agent.wire.keys import SigningKey
from agent.wire.topics import DEVICE_ALERTS, PER_TASK, Topic


class PendingMessage(msgspec.Struct, frozen=True):
    """Logged message before it has a place in the log; `alerts` follow it and name its `seq` in their evidence."""

    kind: str
    task: str | None
    body: Mapping[str, Any]
    alerts: Sequence[Alert] = ()

    @classmethod
    def from_alert(cls, alert: Alert, task: str | None = None) -> PendingMessage:
        return cls("alerts", task, alert.to_body(task))

    @classmethod
    def audit(cls, event: str, summary: str, evidence: Mapping[str, Any]) -> PendingMessage:
        return cls("audit", None, {"event": event, "summary": summary, "evidence": evidence})


class MessageLog(msgspec.Struct):
    """Who writes: this device, in this log, during this boot.

    `key` signs the log; only `rotation` changes it. `live_key`, where there is one, signs what is not of the log: the
    key before, until the collector knows the new one. `compress`: what is of the log goes on the air as gzip.
    """

    fleet: str
    device: str
    key: SigningKey
    log_id: str
    boot: int
    max_bytes: int
    live_key: SigningKey | None = None
    compress: bool = False

    def append(
        self,
        tx: Transaction,
        kind: str,
        task: str | None,
        body: Mapping[str, Any],
        now: ClockReading,
        key: SigningKey | None = None,
    ) -> int:
        """Enqueue one logged message, signed by `key` where it is not the log's; its seq."""
        seq, prev = tx.log_head()
        topic = str(Topic(self.fleet, self.device, kind, (task or DEVICE_ALERTS) if kind in PER_TASK else None))
        time = clock.to_rfc3339(now.wall_us)
        head = {"v": 1, "kind": kind, "device": self.device, "log": self.log_id, "seq": seq + 1, "prev": prev}
        stamp = {"boot": self.boot, "time": time, "clock": now.quality}
        payload = messages.encode({**head, **stamp, **({"task": task} if task else {}), **body})
        token = jws.sign(key or self.key, topic, payload)
        tx.enqueue(OutboxMessage(seq + 1, topic, payload, token, time), messages.digest(payload))
        tx.increment_counter(f"messages.{kind}", 1)
        cost.count_message(tx, task, kind, len(payload) + len(token) + len(topic))
        if kind == "alerts":
            tx.record_alert({"task": task, "time": time, **body})
        return seq + 1

    def append_all(self, tx: Transaction, messages: Iterable[PendingMessage], now: ClockReading) -> None:
        """Enqueue messages in order, each with its alerts behind it."""
        for message in messages:
            seq = self.append(tx, message.kind, message.task, message.body, now)
            for alert in message.alerts:
                self.append(tx, "alerts", message.task, alert.to_body(message.task, seq=seq), now)

    def reissue(self, tx: Transaction, message: OutboxMessage, old_log: str) -> int:
        """Enqueue a message of another log in this one, as it was but for its place; its seq."""
        seq, prev = tx.log_head()
        body = json.loads(message.payload)
        evidence = body.get("evidence")
        if isinstance(evidence, dict) and "seq" in evidence:
            body["evidence"] = {**evidence, "log": old_log}
        key = self.key
        if self.live_key is not None and body.get("event") == key_rotation.ROTATION_EVENT:
            # The old key says it again: the new one's proof names its place in the log.
            place = (self.fleet, self.device, self.log_id, seq + 1)
            body["evidence"], key = key_rotation.build_evidence(*place, self.live_key.public, self.key), self.live_key
        body |= {"log": self.log_id, "seq": seq + 1, "prev": prev, "reissued": {"log": old_log, "seq": message.seq}}
        payload = messages.encode(body)
        token = jws.sign(key, message.topic, payload)
        tx.enqueue(OutboxMessage(seq + 1, message.topic, payload, token, message.time), messages.digest(payload))
        return seq + 1

    def build_live_message(
        self,
        kind: str,
        body: Mapping[str, Any],
        now: ClockReading,
        *,
        retain: bool = True,
        correlation: bytes | None = None,
    ) -> OutgoingMessage:
        """A message outside the log: state, keys, reply."""
        topic = Topic(self.fleet, self.device, kind)
        time = clock.to_rfc3339(now.wall_us)
        payload = messages.encode({"v": 1, "kind": kind, "device": self.device, **body, "time": time})
        token = jws.sign(self.live_key or self.key, str(topic), payload)
        made = self._build_outgoing(
            topic, payload, token, f"{kind}/{messages.digest(payload)[:16]}", time, retain=retain
        )
        return replace(made, correlation=correlation)

    def to_outgoing(self, message: OutboxMessage) -> OutgoingMessage:
        """A message of the outbox as it goes on the air."""
        parts = message.topic.split("/")
        topic = Topic(self.fleet, self.device, parts[3], parts[4] if len(parts) > 4 else None)
        made = self._build_outgoing(topic, message.payload, message.jws, str(message.seq), message.time, retain=False)
        return compress(made) if self.compress else made

    def _build_outgoing(
        self, topic: Topic, payload: bytes, token: str, message_id: str, time: str, *, retain: bool
    ) -> OutgoingMessage:
        event = messages.cloudevent_properties(topic, f"{self.device}/{self.log_id}/{message_id}", time)
        return OutgoingMessage(str(topic), payload, (("jws", token), *event), retain)
