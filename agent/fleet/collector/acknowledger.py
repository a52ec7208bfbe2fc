"""What the collector tells the devices: signed acknowledgements, at the pace the broker takes them."""

from __future__ import annotations

import logging
import random
from typing import Protocol

from agent import clock
from agent.fleet.database.store import Acknowledgement
from agent.transport.packets import Delivery, Outgoing, Receipt
from agent.wire import jws, topics
from agent.wire.keys import SigningKey
from agent.wire.messages import cloud_event, encode

logger = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0


class Connection(Protocol):
    """What the collector uses of a Link."""

    @property
    def window(self) -> int: ...

    def send(self, message: Outgoing) -> int: ...
    def receive(self, timeout_s: float) -> list[Delivery | Receipt]: ...
    def acknowledge(self, delivery: Delivery) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


class Acknowledger:
    """Signed acknowledgements on their way out: the newest of each log, never more under way than the broker takes."""

    def __init__(self, fleet: str, key: SigningKey) -> None:
        self._fleet, self._key = fleet, key
        self._waiting: dict[tuple[str, str], Acknowledgement] = {}
        self._under_way: dict[int, Acknowledgement] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._under_way)

    def add(self, acknowledgement: Acknowledgement) -> None:
        """Send it when there is room, instead of an older one for the same log."""
        self._waiting[acknowledgement.device, acknowledgement.log] = acknowledgement

    def send(self, link: Connection) -> None:
        while self._waiting and len(self._under_way) < link.window:
            key = next(iter(self._waiting))
            acknowledgement = self._waiting[key]
            token = link.send(self._sign(acknowledgement))
            del self._waiting[key]
            self._under_way[token] = acknowledgement

    def receipt(self, receipt: Receipt) -> None:
        acknowledgement = self._under_way.pop(receipt.token, None)
        if acknowledgement is not None and not receipt.taken:
            device = acknowledgement.device
            logger.error("the broker refused the acknowledgement for %s: %s; check its ACL", device, receipt.reason)

    def link_lost(self) -> None:
        """Send again what the broker did not take, unless there is newer."""
        for acknowledgement in self._under_way.values():
            self._waiting.setdefault((acknowledgement.device, acknowledgement.log), acknowledgement)
        self._under_way.clear()

    def _sign(self, known: Acknowledgement) -> Outgoing:
        now = clock.rfc3339(clock.read().wall_us)
        topic = topics.Topic(self._fleet, known.device, "ack")
        members = {"v": 1, "kind": "ack", "device": known.device, "log": known.log, "through": known.through}
        proof = {"digest": known.digest} if known.digest else {}
        payload = encode({**members, "missing": known.missing, "time": now, **proof})
        token = jws.sign(self._key, str(topic), payload)
        event = cloud_event(topic, f"{known.device}/{known.log}/ack/{now}", now)
        return Outgoing(str(topic), payload, (("jws", token), *event), retain=True)


class Backoff:
    """Waits that double from 1 s to a minute, with jitter so that many clients do not come back at once."""

    def __init__(self) -> None:
        self.failures = 0

    def next(self) -> float:
        delay: float = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(self.failures, 10))
        self.failures += 1
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        self.failures = 0
