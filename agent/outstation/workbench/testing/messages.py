"""Simulated device: signs a chained log of messages without any code of the device."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from outstation.device.batch_parts.columns import encode_labels, encode_runs, encode_times
from outstation.foundation import clock
from outstation.ml.model.inference.scores import Labels
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.log_chain import digest
from outstation.protocol.wire.verification import VerifiedMessage, verify_message

FLEET = "acme"
TIME = "2026-11-24T22:18:01.000000Z"
MODEL = {"name": "exercise", "version": "1.0.0", "digest": "sha256:ab"}
NEW_MODEL = {"name": "exercise", "version": "1.1.0", "digest": "sha256:" + "cd" * 32}


def new_key(seed: int | None = None) -> SigningKey:
    """Generate a key; the same seed gives the same key."""
    raw = None if seed is None else seed.to_bytes(32, "big")
    return SigningKey(Ed25519PrivateKey.generate() if raw is None else Ed25519PrivateKey.from_private_bytes(raw))


class SignedMessage(msgspec.Struct):
    topic: str
    payload: bytes
    jws: str
    seq: int = 0

    def to_incoming(self, mid: int = 1, *, retained: bool = False) -> IncomingMessage:
        return IncomingMessage(self.topic, self.payload, (self.jws,), retained, mid, 1)

    def to_outgoing(self, *, retain: bool = False) -> OutgoingMessage:
        return OutgoingMessage(self.topic, self.payload, (("jws", self.jws),), retain)


# A field of `MessageSender.quiet_run`.
QUIET_FIELD = {"counts": [2000, 3000, 900], "below": 50, "above": 40, "missing": 10, "mean": 0.5, "m2": 7.0}


class MessageSender(msgspec.Struct):
    """A device with one log; each method returns the next message of that log."""

    device: str = "pi-07"
    key: SigningKey = msgspec.field(default_factory=new_key)
    log: str = msgspec.field(default_factory=lambda: str(uuid.uuid4()))
    task: str = "exercise"
    seq: int = 0
    prev: str = ""
    row: int = 0

    def append(self, kind: str, *, task: str | None = None, **members: Any) -> SignedMessage:
        self.seq += 1
        topic = f"outstation/{FLEET}/{self.device}/{kind}" + (f"/{task}" if task else "")
        head = {"v": 1, "kind": kind, "device": self.device, "log": self.log, "seq": self.seq, "prev": self.prev}
        times = {"boot": 1, "time": TIME, "clock": "synced"}
        payload = encode({**head, **times, **({"task": task} if task else {}), **members})
        self.prev = digest(payload)
        return SignedMessage(topic, payload, jws.sign(self.key, topic, payload), self.seq)

    def results(
        self,
        n: int = 3,
        *,
        rows: int | None = None,
        rows_at: tuple[int, int] | None = None,
        padding: int = 0,
        **changes: Any,
    ) -> SignedMessage:
        """Return `n` results over the next `rows` rows (100 for each result), or over exactly `rows_at`."""
        first, last = rows_at or (self.row + 1, self.row + (100 * n if rows is None else rows))
        self.row = last
        columns = {
            "row": encode_runs(np.array([first + i * (last - first + 1) // max(n, 1) for i in range(n)], np.int64)),
            "t": encode_times(1_764_022_680_000_000 + first + np.arange(n)),
            "label": encode_labels(Labels(("PEN", "ABD", "FEL"), (first + np.arange(n)) % 3)),
            "score": [round(0.5 + i / (2 * n), 3) for i in range(n)],
        }
        members = {"model": MODEL, "stream": "watch", "rows": [first, last], "n": n, "input": "x" * padding}
        return self.append("results", task=self.task, **{**members, "columns": columns, **changes})

    def drift(self, state: str = "ok", **changes: Any) -> SignedMessage:
        window = {"index": self.seq, "rows": [1, 2000], "from": TIME, "to": TIME, "n": 2000}
        reference = {"shipped": "sha256:01", "site": None}
        body = {"model": MODEL, "reference": reference, "window": window, "features": {"ax": {"state": state}}}
        return self.append("drift", task=self.task, **{**body, "output": {"state": state}, "state": state, **changes})

    def quiet_run(
        self, window: dict[str, Any] | None = None, field: dict[str, Any] = QUIET_FIELD, **columns: Any
    ) -> SignedMessage:
        """Return a run of three quiet drift windows of 2000 rows, with other members of `window` or other columns."""
        begin, step = 1_795_000_000_000_000, 40_000_000
        run = {
            "first": [[1, 2000, 3]],
            "last": [[2000, 2000, 3]],
            "from": [[begin, step, 3]],
            "to": {"first": begin + step - 1, "step": step, "offsets": [0, 0, 0]},
            "n": [[2000, 0, 3]],
            "nearest": [0.1, 0.25, 0],
        }
        times = {"from": clock.to_rfc3339(begin), "to": clock.to_rfc3339(begin + 3 * step - 1)}
        span = {"index": 41, "rows": [1, 6000], "n": 6000, **times, **(window or {})}
        return self.drift(window=span, windows=run | columns, features={"ax": field})

    def alert(
        self, identity: str = "exercise/ax/1", state: str = "raised", summary: str = "ax: gain loss.", **changes: Any
    ) -> SignedMessage:
        body = {"alert": "drift", "subject": "ax", "state": state, "severity": "warning", "id": identity}
        return self.append("alerts", task=self.task, **{**body, "summary": summary, "evidence": {"seq": 2}, **changes})

    def quality(self) -> SignedMessage:
        return self.append("quality", task=self.task, accuracy=0.9)

    def health(self, **tasks: dict[str, Any]) -> SignedMessage:
        return self.append("health", streams={"watch": {"rows": self.row, "rejected": 0}}, tasks=tasks, outbox=0)

    def health_with_cursor(self) -> SignedMessage:
        return self.health(**{self.task: {"stream": "watch", "row": self.row, "first": 1}})

    def evicted(self, *ranges: tuple[int, int]) -> SignedMessage:
        return self.append("audit", event="evicted", summary="no space", evidence={"seq": [list(r) for r in ranges]})

    def shadow(
        self, rollout: str = "exercise-1-1", *, n: int = 100, agreeing: int | None = 96, **changes: Any
    ) -> SignedMessage:
        """Return the comparison of two bundles on the next `n` rows, over 5 batches of a shadow evaluation."""
        first, self.row = self.row + 1, self.row + n
        answered = {"windows": n, "seconds": n / 1000, "scores": {"n": n, "mean": 0.9, "m2": n / 100}}
        estimate = {"expected_accuracy": {"n": n, "mean": 0.9, "m2": n / 100}}
        members = {
            "rollout": rollout, "model": MODEL, "other": NEW_MODEL, "rows": [first, self.row], "batches": 5, "n": n,
            "agreeing": agreeing, "stats": {**answered, **estimate}, "other_stats": {**answered, **estimate},
        }  # fmt: skip
        return self.append("shadow", task=self.task, **{**members, **changes})

    def samples(self, sealed: str = "AAAA", **changes: Any) -> SignedMessage:
        """Return a sample of five rows around row 3; `sealed` is base64url."""
        members = {
            "model": MODEL,
            "stream": "watch",
            "reason": "uncertain",
            "row": 3,
            "rows": [1, 5],
            "n": 5,
            "digits": 4,
        }
        return self.append("samples", task=self.task, **{**members, "sealed": sealed, **changes})

    def rollout(
        self, phase: str, rollout: str = "exercise-1-1", /, *, reason: str = "", **changes: Any
    ) -> SignedMessage:
        """Return the audit event of a phase that the device entered in a roll-out."""
        bundle = {"task": self.task, "rollout": rollout, "bundle": NEW_MODEL["name"], "version": NEW_MODEL["version"]}
        change = {"digest": NEW_MODEL["digest"], "strategy": "shadow", "phase": phase, "reason": reason, "numbers": {}}
        summary = f"{NEW_MODEL['name']} {NEW_MODEL['version']}: {phase}."
        return self.append("audit", event="rollout", summary=summary, evidence={**bundle, **change, **changes})

    def state(self, state: str = "online") -> SignedMessage:
        topic = f"outstation/{FLEET}/{self.device}/state"
        payload = encode({"v": 1, "kind": "state", "device": self.device, "state": state, "boot": 1, "time": TIME})
        return self.sign_payload(topic, payload)

    def sign_payload(self, topic: str, payload: bytes) -> SignedMessage:
        """Sign any bytes for any topic."""
        return SignedMessage(topic, payload, jws.sign(self.key, topic, payload))

    def verify(self, message: SignedMessage) -> VerifiedMessage:
        """Verify a message as the collector does."""
        signer = jws.Signer(self.device, self.key.public)
        return verify_message(message.topic, message.payload, (message.jws,), lambda kid: signer)
