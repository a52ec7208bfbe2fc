"""Acknowledger: signed acknowledgements on their way to devices, at the pace of the broker.

It also deletes retained messages where devices retain none: otherwise a device could fill the broker's memory.
"""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec

from outstation.fleet.database.interface import LogId
from outstation.fleet.database.store import Acknowledgement
from outstation.foundation import clock
from outstation.foundation.backoff import Backoff
from outstation.protocol.transport.packets import BrokerLink, OutgoingMessage, PublishReceipt
from outstation.protocol.wire import jws, topics
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.topics import cloudevent_properties

logger = logging.getLogger(__name__)

BACKOFF = Backoff(1.0, 60.0)
# A collector stores the messages that it holds within a second, unless its database is slow or it was killed.
WAIT_S = 2.0
_MAX_RETAINED = 10_000


class CollectorLink(BrokerLink, Protocol):
    """The part of `outstation.protocol.transport.mqtt.Link` that the collector uses."""

    @property
    def window(self) -> int: ...

    def wake(self) -> None: ...


class Acknowledger:
    """Outgoing acknowledgements: the newest of each log, within the in-flight window of the broker."""

    def __init__(self, fleet: str, key: SigningKey) -> None:
        self._fleet, self._key = fleet, key
        self._pending: dict[tuple[str, str], Acknowledgement] = {}
        # Retained messages that the broker is to delete, by topic, in the order in which they arrived.
        self._retained: dict[str, None] = {}
        # None: the deletion of a retained message, which is not repeated; the next connection shows what is left.
        self._in_flight: dict[int, Acknowledgement | None] = {}

    @property
    def has_pending(self) -> bool:
        return bool(self._pending or self._in_flight or self._retained)

    def add(self, acknowledgement: Acknowledgement) -> None:
        """Queue an acknowledgement; it replaces an older one of the same log."""
        self._pending[acknowledgement.device, acknowledgement.log] = acknowledgement

    def clear_retained(self, topic: str) -> None:
        """Queue the deletion of a retained message; beyond the limit the oldest waits for the next connection."""
        self._retained[topic] = None
        if len(self._retained) > _MAX_RETAINED:
            del self._retained[next(iter(self._retained))]

    def send(self, link: CollectorLink) -> None:
        while self._pending and len(self._in_flight) < link.window:
            key = next(iter(self._pending))
            acknowledgement = self._pending[key]
            token = link.send(self._sign(acknowledgement))
            del self._pending[key]
            self._in_flight[token] = acknowledgement
        while self._retained and len(self._in_flight) < link.window:
            topic = next(iter(self._retained))
            self._in_flight[link.send(OutgoingMessage(topic, b"", retain=True))] = None
            del self._retained[topic]

    def handle_receipt(self, receipt: PublishReceipt) -> None:
        acknowledgement = self._in_flight.pop(receipt.token, None)
        if acknowledgement is not None and not receipt.is_accepted:
            device = acknowledgement.device
            logger.error("the broker refused the acknowledgement for %s: %s; check its ACL", device, receipt.reason)

    def requeue_in_flight(self) -> None:
        """Queue unconfirmed acknowledgements again, unless a newer one of the log is pending."""
        for acknowledgement in filter(None, self._in_flight.values()):
            self._pending.setdefault((acknowledgement.device, acknowledgement.log), acknowledgement)
        self._in_flight.clear()

    def _sign(self, acknowledgement: Acknowledgement) -> OutgoingMessage:
        now = clock.now_rfc3339()
        topic = topics.Topic(self._fleet, acknowledgement.device, "ack")
        members = msgspec.structs.asdict(acknowledgement)
        proof = {"digest": digest} if (digest := members.pop("digest")) else {}
        payload = encode({"v": 1, "kind": "ack", **members, "time": now, **proof})
        token = jws.sign(self._key, str(topic), payload)
        event = cloudevent_properties(topic, f"{acknowledgement.device}/{acknowledgement.log}/ack/{now}", now)
        return OutgoingMessage(str(topic), payload, (("jws", token), *event), retain=True)


class _LogProgress(msgspec.Struct):
    """`last_seq` was reported at `since_s`; gaps up to `settled`, reported before that, may be requested."""

    settled: int
    last_seq: int
    since_s: float


class PendingGaps:
    """Missing messages that another collector may still hold: they are requested after WAIT_S."""

    def __init__(self) -> None:
        self._progress: dict[LogId, _LogProgress] = {}
        self._due_s: dict[LogId, float] = {}

    def trim(
        self, now_s: float, log: LogId, through: int, missing: list[tuple[int, int]]
    ) -> tuple[int, list[tuple[int, int]]]:
        """Return the acknowledgement as (through, missing) without recent gaps; `due_logs` lists the log later."""
        self._due_s.pop(log, None)
        if not missing:
            self._progress.pop(log, None)
            return through, missing
        known = self._progress.setdefault(log, _LogProgress(0, through, now_s))
        if now_s - known.since_s >= WAIT_S:
            known.settled, known.last_seq, known.since_s = known.last_seq, through, now_s
        recent = next((i for i, (first, _) in enumerate(missing) if first > known.settled), None)
        if recent is None:
            return through, missing
        self._due_s[log] = known.since_s + WAIT_S
        return missing[recent][0] - 1, missing[:recent]

    def due_logs(self, now_s: float) -> list[LogId]:
        return [log for log, due_s in self._due_s.items() if due_s <= now_s]
