"""Message log: gives each outgoing message its seq, `prev` and signature, inside the transaction that writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from outstation.device.store import cost
from outstation.device.store.outbox import OutboxMessage
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.transport.packets import OutgoingMessage, compress
from outstation.protocol.wire import commitment, jws, log_chain, topics
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.privacy import field_privacy, least_count
from outstation.protocol.wire.privacy.field_privacy import FieldPrivacy
from outstation.protocol.wire.topics import DEVICE_ALERTS, KINDS, Topic

# Seqs of the newest urgent messages, which do not wait behind a backlog.
RECENT_URGENT = "recent urgent messages"


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
    """Message log of this device during this boot.

    - `key` signs the log and is changed only by a key rotation
    - `live_key`, if set, signs messages outside the log: it is the key before, until the collector knows the new one
    - `compress`: logged messages are sent as gzip
    - `secret`: keys of messages' commitments are derived from it
    - `min_count`: least readings behind a number; the running bundle and the stream of the task may demand more
    - `privacy`: what may leave of the fields of each task's stream
    - `urgent_kinds`: the newest `max_urgent` messages of these kinds do not wait behind a backlog
    """

    fleet: str
    device: str
    key: SigningKey
    log_id: str
    boot: int
    max_bytes: int
    live_key: SigningKey | None = None
    compress: bool = False
    secret: bytes = msgspec.field(default_factory=partial(os.urandom, commitment.SECRET_BYTES))
    min_count: int = 1
    bundle_min_counts: dict[str, int] = {}
    urgent_kinds: frozenset[str] = frozenset({"alerts"})
    max_urgent: int = 50
    privacy: Mapping[str, FieldPrivacy] = {}

    def least_count(self, task: str | None) -> int:
        """Return the least number of readings that a message about `task` may say anything of."""
        return max(self.min_count, self.bundle_min_counts.get(task or "", 1), self.field_privacy(task).min_count)

    def field_privacy(self, task: str | None) -> FieldPrivacy:
        """Return what may leave in messages about a task; without one about the device, which may concern any."""
        if task is not None:
            return self.privacy.get(task, field_privacy.OPEN)
        return field_privacy.combine(self.privacy.values()) if self.privacy else field_privacy.OPEN

    def append(
        self,
        tx: Transaction,
        kind: str,
        task: str | None,
        body: Mapping[str, Any],
        now: ClockReading,
        key: SigningKey | None = None,
        window: Mapping[str, Any] | None = None,
    ) -> int:
        """Append one message, signed by `key` or else by the log's key, and return its seq.

        `window`: the drift message that an alert follows; the alert tells no more than that.
        Return 0 for a message that the owner of the stream keeps on the device.
        """
        # An event about a task names its fields only, not those of other streams.
        about = body.get("evidence", {}).get("task") if kind == "audit" and task is None else task
        least, privacy = self.least_count(task), self.field_privacy(about if about in self.privacy else task)
        if window is not None:
            body = least_count.apply_to_alert(body, window, least)
        allowed = privacy.apply(kind, least_count.apply(kind, body, least), now.wall_us)
        if privacy.keeps(kind):
            if kind == "alerts":
                tx.record_alert({"task": task, "time": clock.to_rfc3339(now.wall_us), "kept": True, **allowed})
            return 0
        seq, prev = tx.log_head()
        topic = str(Topic(self.fleet, self.device, kind, (task or DEVICE_ALERTS) if KINDS[kind].per_task else None))
        time = clock.to_rfc3339(now.wall_us)
        head = {"v": 1, "kind": kind, "device": self.device, "log": self.log_id, "seq": seq + 1, "prev": prev}
        stamp = {"boot": self.boot, "time": time, "clock": now.quality}
        payload = jws.encode({**head, **stamp, **({"task": task} if task else {}), **allowed})
        message = OutboxMessage(seq + 1, topic, payload, jws.sign(key or self.key, topic, payload), time)
        digest = log_chain.digest(payload)
        cost.count_message(tx, task, kind, message.size)
        tx.enqueue(message, digest)
        tx.increment_counter(f"messages.{kind}", 1)
        if kind == "alerts":
            tx.record_alert({"task": task, "time": time, **allowed})
        if kind in self.urgent_kinds:
            recent = [*json.loads(tx.get_meta(RECENT_URGENT, "[]")), seq + 1]
            tx.set_meta(RECENT_URGENT, json.dumps(recent[-self.max_urgent :]))
        return seq + 1

    def append_all(self, tx: Transaction, messages: Iterable[PendingMessage], now: ClockReading) -> None:
        """Enqueue messages in order, each with its alerts behind it."""
        for message in messages:
            seq = self.append(tx, message.kind, message.task, message.body, now)
            window = message.body if message.kind == "drift" else None
            for alert in message.alerts:
                body = alert.to_body(message.task, **({"seq": seq} if seq else {}))
                self.append(tx, "alerts", message.task, body, now, window=window)

    def reissue(self, tx: Transaction, message: OutboxMessage, old_log: str) -> int:
        """Append a message of another log, unchanged but for its place in the log, and return its seq.

        After a device joined a fleet, the device's id and the topic are others, too.
        """
        seq, prev = tx.log_head()
        body, topic = json.loads(message.payload), str(self._parse_topic(message))
        evidence = body.get("evidence")
        if isinstance(evidence, dict) and "seq" in evidence:
            body["evidence"] = {**evidence, "log": old_log}
        key = self.key
        from outstation.protocol.wire import key_rotation

        if self.live_key is not None and body.get("event") == key_rotation.ROTATION_EVENT:
            # Signed by the old key again: the new key's proof names its place in the log.
            place = (self.fleet, self.device, self.log_id, seq + 1)
            body["evidence"], key = key_rotation.build_evidence(*place, self.live_key.public, self.key), self.live_key
        body |= {"device": self.device, "log": self.log_id, "seq": seq + 1, "prev": prev}
        earlier = body.get("reissued")
        origin = {"log": old_log, "seq": message.seq}
        body["reissued"] = {**origin, "first": earlier.get("first", earlier["log"])} if earlier else origin
        payload = jws.encode(body)
        token = jws.sign(key, topic, payload)
        tx.enqueue(OutboxMessage(seq + 1, topic, payload, token, message.time), log_chain.digest(payload))
        return seq + 1

    def build_live_message(self, kind: str, body: Mapping[str, Any], now: ClockReading) -> OutgoingMessage:
        """Build a message outside the log: state, keys or reply."""
        topic = Topic(self.fleet, self.device, kind)
        time = clock.to_rfc3339(now.wall_us)
        body = least_count.apply(kind, body, self.least_count(None))
        body = self.field_privacy(None).apply(kind, body, now.wall_us)
        payload = jws.encode({"v": 1, "kind": kind, "device": self.device, **body, "time": time})
        token = jws.sign(self.live_key or self.key, str(topic), payload)
        message_id = f"{kind}/{log_chain.digest(payload)[:16]}"
        return self._build_outgoing(topic, payload, token, message_id, time)

    def to_outgoing(self, message: OutboxMessage) -> OutgoingMessage:
        topic = self._parse_topic(message)
        outgoing = self._build_outgoing(topic, message.payload, message.jws, str(message.seq), message.time)
        return compress(outgoing) if self.compress else outgoing

    def _parse_topic(self, message: OutboxMessage) -> Topic:
        parts = message.topic.split("/")
        return Topic(self.fleet, self.device, parts[3], parts[4] if len(parts) > 4 else None)

    def _build_outgoing(self, topic: Topic, payload: bytes, token: str, message_id: str, time: str) -> OutgoingMessage:
        event = topics.cloudevent_properties(topic, f"{self.device}/{self.log_id}/{message_id}", time)
        return OutgoingMessage(str(topic), payload, (("jws", token), *event), KINDS[topic.kind].retained)
