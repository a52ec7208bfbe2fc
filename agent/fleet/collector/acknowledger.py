"""Acknowledger: signed acknowledgements on their way to devices, at the pace of the broker."""

from __future__ import annotations

import logging
import random
from typing import Protocol

from agent import clock
from agent.fleet.database.store import Acknowledgement
from agent.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from agent.wire import jws, topics
from agent.wire.keys import SigningKey
from agent.wire.messages import cloudevent_properties, encode

logger = logging.getLogger(__name__)

MIN_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0


class BrokerLink(Protocol):
    """The part of `transport.mqtt.Link` that the collector uses."""

    @property
    def window(self) -> int: ...

    def send(self, message: OutgoingMessage) -> int: ...
    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]: ...
    def acknowledge(self, delivery: IncomingMessage) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class Acknowledger:
    """Outgoing acknowledgements: the newest of each log, within the in-flight window of the broker."""

    def __init__(self, fleet: str, key: SigningKey) -> None:
        self._fleet, self._key = fleet, key
        self._pending: dict[tuple[str, str], Acknowledgement] = {}
        self._in_flight: dict[int, Acknowledgement] = {}

    @property
    def has_pending(self) -> bool:
        return bool(self._pending or self._in_flight)

    def add(self, acknowledgement: Acknowledgement) -> None:
        """Queue an acknowledgement; it replaces an older one of the same log."""
        self._pending[acknowledgement.device, acknowledgement.log] = acknowledgement

    def send(self, link: BrokerLink) -> None:
        while self._pending and len(self._in_flight) < link.window:
            key = next(iter(self._pending))
            acknowledgement = self._pending[key]
            token = link.send(self._sign(acknowledgement))
            del self._pending[key]
            self._in_flight[token] = acknowledgement

    def handle_receipt(self, receipt: PublishReceipt) -> None:
        acknowledgement = self._in_flight.pop(receipt.token, None)
        if acknowledgement is not None and not receipt.is_accepted:
            device = acknowledgement.device
            logger.error("the broker refused the acknowledgement for %s: %s; check its ACL", device, receipt.reason)

    def requeue_in_flight(self) -> None:
        """Queue unconfirmed acknowledgements again, unless a newer one of the log is pending."""
        for acknowledgement in self._in_flight.values():
            self._pending.setdefault((acknowledgement.device, acknowledgement.log), acknowledgement)
        self._in_flight.clear()

    def _sign(self, acknowledgement: Acknowledgement) -> OutgoingMessage:
        now = clock.to_rfc3339(clock.read().wall_us)
        topic = topics.Topic(self._fleet, acknowledgement.device, "ack")
        members = {
            "v": 1,
            "kind": "ack",
            "device": acknowledgement.device,
            "log": acknowledgement.log,
            "through": acknowledgement.through,
        }
        proof = {"digest": acknowledgement.digest} if acknowledgement.digest else {}
        payload = encode({**members, "missing": acknowledgement.missing, "time": now, **proof})
        token = jws.sign(self._key, str(topic), payload)
        event = cloudevent_properties(topic, f"{acknowledgement.device}/{acknowledgement.log}/ack/{now}", now)
        return OutgoingMessage(str(topic), payload, (("jws", token), *event), retain=True)


class Backoff:
    """Exponential backoff from 1 s to a minute, with jitter so that many clients do not return at once."""

    def __init__(self) -> None:
        self.failures = 0

    def next_delay(self) -> float:
        delay: float = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(self.failures, 10))
        self.failures += 1
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.failures = 0
