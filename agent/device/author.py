"""Gives each outgoing message its place in the log: seq, prev and signature, inside the transaction that makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent import clock
from agent.clock import Now
from agent.device.transaction import Pending, Transaction
from agent.link import Outgoing
from agent.wire import jws, messages
from agent.wire.keys import SigningKey
from agent.wire.topics import DEVICE_ALERTS, PER_TASK, Topic


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes: this device, in this log, during this boot."""

    fleet: str
    device: str
    key: SigningKey
    log_id: str
    boot: int
    max_bytes: int

    def write(self, tx: Transaction, kind: str, task: str | None, body: Mapping[str, Any], now: Now) -> int:
        """Enqueue one logged message; its seq."""
        seq, prev = tx.chain()
        topic = str(Topic(self.fleet, self.device, kind, (task or DEVICE_ALERTS) if kind in PER_TASK else None))
        time = clock.rfc3339(now.wall_us)
        head = {"v": 1, "kind": kind, "device": self.device, "log": self.log_id, "seq": seq + 1, "prev": prev}
        stamp = {"boot": self.boot, "time": time, "clock": now.quality}
        payload = messages.encode({**head, **stamp, **({"task": task} if task else {}), **body})
        token = jws.sign(self.key, topic, payload)
        tx.enqueue(Pending(seq + 1, topic, payload, token, time), messages.digest(payload))
        tx.count(f"messages.{kind}", 1)
        if kind == "alerts":
            tx.note_alert(json.dumps({"task": task, "time": time, **body}))
        return seq + 1

    def live(self, kind: str, body: Mapping[str, Any], now: Now) -> Outgoing:
        """A retained message outside the log: state and keys."""
        topic = Topic(self.fleet, self.device, kind)
        time = clock.rfc3339(now.wall_us)
        payload = messages.encode({"v": 1, "kind": kind, "device": self.device, **body, "time": time})
        token = jws.sign(self.key, str(topic), payload)
        return self._signed(topic, payload, token, f"{kind}/{messages.digest(payload)[:16]}", time, retain=True)

    def outgoing(self, message: Pending) -> Outgoing:
        """A message of the outbox as it goes on the air."""
        parts = message.topic.split("/")
        topic = Topic(self.fleet, self.device, parts[3], parts[4] if len(parts) > 4 else None)
        return self._signed(topic, message.payload, message.jws, str(message.seq), message.time, retain=False)

    def _signed(self, topic: Topic, payload: bytes, token: str, number: str, time: str, *, retain: bool) -> Outgoing:
        event = messages.cloud_event(topic, f"{self.device}/{self.log_id}/{number}", time)
        return Outgoing(str(topic), payload, (("jws", token), *event), retain)
