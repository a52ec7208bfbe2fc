"""Lossy broker in memory: links lose, delay, repeat, reorder, split and break, in virtual time, from one seed.

Links have the methods of `outstation.protocol.transport.mqtt.Link`. One thread runs everything: while a link waits, the
clock runs on, and so do the other participants. The same seed gives the same run, message by message.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.packets import (
    NO_SUBSCRIBERS,
    SEALED,
    IncomingMessage,
    OutgoingMessage,
    PublishReceipt,
    decompress,
)
from outstation.protocol.wire.topics import topic_matches

T = TypeVar("T")
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_STEP_S = 0.1
_WALL_CLOCK_START_US = 1_795_000_000_000_000


class LinkConditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Probabilities (0 to 1) for each message or call, and the longest delivery time."""

    loss: Share = 0.0
    """The broker confirms a message and forgets it."""
    duplication: Share = 0.0
    """The broker delivers a message twice."""
    delay_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Each delivery and each receipt takes a random time up to this; they can overtake each other."""
    partial_receive: Share = 0.0
    """`receive` returns only a part of what is due."""
    disconnect: Share = 0.0
    """The connection breaks; the message in flight may or may not have arrived."""
    silent_refusal: Share = 0.0
    """The broker drops a message and sends no receipt, as a throttling broker does."""
    no_receipts: bool = False
    """The broker confirms nothing."""


class _Mailbox(msgspec.Struct):
    """The session of one client: `pending` holds (due time, message); `unacknowledged` was delivered."""

    client: str
    filters: Sequence[str] = ()
    persistent: bool = False
    pending: list[tuple[float, IncomingMessage]] = msgspec.field(default_factory=list)
    unacknowledged: dict[int, IncomingMessage] = msgspec.field(default_factory=dict)
    link: LossyLink | None = None

    def matches(self, topic: str) -> bool:
        return any(topic_matches(pattern, topic) for pattern in self.filters)


class FaultyNetwork:
    """Conditions of all links to a broker, in simulated time `clock_s`.

    `client_conditions` are those of single clients, and `offline` the clients without a network. `on_due` is called
    with a client and the time at which its link has something to receive.
    """

    def __init__(self, seed: int, conditions: LinkConditions) -> None:
        self.rng, self.conditions, self.clock_s = random.Random(seed), conditions, 0.0
        self.client_conditions: dict[str, LinkConditions] = {}
        self.offline: set[str] = set()
        self.published: list[OutgoingMessage] = []
        self.on_due: Callable[[str, float], object] = lambda client, due_s: None

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def conditions_of(self, client: str) -> LinkConditions:
        """Return the conditions of a client's link."""
        return self.client_conditions.get(client, self.conditions)

    def delivery_time(self, client: str) -> float:
        delay_s = self.conditions_of(client).delay_s
        return self.clock_s + (self.rng.uniform(0, delay_s) if delay_s else 0.0)


class LossyBroker(FaultyNetwork):
    """The broker and the clock. `reason_code` decides about a message; `tick_callbacks` run while a link waits."""

    def __init__(self, seed: int, conditions: LinkConditions, *, window: int = 100, max_packet: int = 1 << 20) -> None:
        super().__init__(seed, conditions)
        self.window, self.max_packet, self.clock_s = window, max_packet, 1000.0
        self.tick_callbacks: list[Callable[[], object]] = []
        self.reason_code: Callable[[OutgoingMessage], int] = lambda _: 0
        self.connects: Counter[str] = Counter()
        self.max_in_flight: dict[str, int] = {}
        self._mailboxes: dict[str, _Mailbox] = {}
        # Matching all filters of a thousand clients with each message would take longer than everything else.
        self._receivers: dict[str, list[_Mailbox]] = {}
        self._retained: dict[str, OutgoingMessage] = {}
        self._message_id = 0

    def now(self) -> ClockReading:
        return ClockReading(_WALL_CLOCK_START_US + round(self.clock_s * 1e6), self.clock_s, "synced")

    def connect(
        self,
        _broker: object,
        client: str,
        *,
        subscribe: Sequence[str] = (),
        will: OutgoingMessage | None = None,
        session_expiry_s: int = 0,
        **_: Any,
    ) -> LossyLink:
        """Connect a client; the parameters are those of `outstation.protocol.transport.mqtt.Link`. Raises LinkDown."""
        self.connects[client] += 1
        if client in self.offline or self.happens(self.conditions_of(client).disconnect):
            raise LinkDown("lossy link: no connection")
        box = self._mailboxes.get(client)
        if box is not None and box.link is not None:
            box.link.disconnect("taken over")
        if box is None or not session_expiry_s:
            box = self._mailboxes[client] = _Mailbox(client)
        self._receivers.clear()
        box.filters, box.persistent = tuple(subscribe), session_expiry_s > 0
        # The broker delivers unacknowledged messages again (MQTT 5, section 4.4).
        box.pending = [*((self.clock_s, old) for old in box.unacknowledged.values()), *box.pending]
        box.unacknowledged = {}
        box.link = LossyLink(self, client, box, will)
        for message in self._retained.values():
            if box.matches(message.topic):
                box.pending.append((self.clock_s, self._delivery(message, retained=True)))
        if box.pending:
            self.on_due(client, self.clock_s)
        return box.link

    def publish(self, message: OutgoingMessage, loss: float = 0.0) -> int:
        """Route a message and return its reason code; `loss` is the probability on the sender's side."""
        code = self.reason_code(message)
        if code >= 0x80:
            return code
        self.published.append(message)
        if message.retain:
            self._retained[message.topic] = message
        boxes = self._receivers.get(message.topic)
        if boxes is None:
            boxes = [box for box in self._mailboxes.values() if box.matches(message.topic)]
            self._receivers[message.topic] = boxes
        for box in boxes:
            conditions = self.conditions_of(box.client)
            if not self.happens(max(conditions.loss, loss)):
                for _ in range(1 + self.happens(conditions.duplication)):
                    due_s = self.delivery_time(box.client)
                    box.pending.append((due_s, self._delivery(message, retained=False)))
                    self.on_due(box.client, due_s)
        return code or (0 if boxes else NO_SUBSCRIBERS)

    def inject(self, client: str, delivery: IncomingMessage) -> None:
        """Deliver a message that nobody published to one client."""
        self._mailboxes[client].pending.append((self.clock_s, delivery))

    def restart(self) -> None:
        """Restart the broker without its sessions and retained messages."""
        boxes, self._mailboxes, self._retained = self._mailboxes, {}, {}
        self._receivers.clear()
        for box in boxes.values():
            if box.link is not None:
                box.link.disconnect("the broker died", will=False)

    def advance(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> None:
        """Advance the clock and run the tick callbacks, at most until `condition` is true."""
        end = self.clock_s + seconds
        while not condition() and self.clock_s < end:
            self.clock_s = min(end, self.clock_s + _STEP_S)
            for other in self.tick_callbacks:
                other()

    def detach(self, mailbox: _Mailbox) -> None:
        """End the connection of a mailbox; a session without expiry ends with it."""
        mailbox.link = None
        if not mailbox.persistent:
            if self._mailboxes.get(mailbox.client) is mailbox:
                del self._mailboxes[mailbox.client]
            self._receivers.clear()

    def set_offline(self, client: str, *, is_offline: bool) -> None:
        """Cut a client's network, or restore it. The broker publishes its Will."""
        (self.offline.add if is_offline else self.offline.discard)(client)
        box = self._mailboxes.get(client)
        if is_offline and box is not None and box.link is not None:
            box.link.disconnect("no network")

    def _delivery(self, message: OutgoingMessage, *, retained: bool) -> IncomingMessage:
        self._message_id += 1
        tokens = tuple(value for name, value in message.properties if name == "jws")
        payload = decompress(message.payload, message.content_type)
        head = (message.topic, payload, tokens, retained, self._message_id, 1)
        is_sealed = message.content_type == SEALED
        return IncomingMessage(*head, message.correlation, message.response_topic, sealed=is_sealed)


class LossyLink:
    """One connection of a client to the lossy broker."""

    def __init__(self, broker: LossyBroker, client: str, mailbox: _Mailbox, will: OutgoingMessage | None) -> None:
        self.window, self.max_packet = broker.window, broker.max_packet
        self._broker, self._client, self._mailbox, self._will = broker, client, mailbox, will
        self._lost_reason: str | None = None
        self._receipts: list[tuple[float, PublishReceipt]] = []
        self._token = self._in_flight = 0
        self._is_woken = False
        self.traffic_bytes = 0

    def send(self, message: OutgoingMessage) -> int:
        self._require_connected()
        conditions = self._broker.conditions_of(self._client)
        if self._broker.happens(conditions.disconnect):
            if self._broker.rng.random() < 0.5:
                self._broker.publish(message)
            self.disconnect("connection lost")
            self._require_connected()
        self._token += 1
        self._in_flight += 1
        properties = [text for pair in message.properties for text in pair]
        self.traffic_bytes += _size(message.topic, message.payload, *properties)
        peaks = self._broker.max_in_flight
        peaks[self._client] = max(peaks.get(self._client, 0), self._in_flight)
        if self._broker.happens(conditions.silent_refusal):
            return self._token
        # Conditions of all links count once, on the side of the receiver.
        is_own = self._client in self._broker.client_conditions
        code = self._broker.publish(message, conditions.loss if is_own else 0.0)
        if not conditions.no_receipts:
            receipt, due_s = (
                PublishReceipt(self._token, code, f"reason 0x{code:02x}"),
                self._broker.delivery_time(self._client),
            )
            self._receipts.append((due_s, receipt))
            self._broker.on_due(self._client, due_s)
        return self._token

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        self._require_connected()

        def is_ready() -> bool:
            now = self._broker.clock_s
            has_due = any(due <= now for due, _ in [*self._receipts, *self._mailbox.pending])
            return self._is_woken or self._lost_reason is not None or has_due

        self._broker.advance(timeout_s, is_ready)
        self._is_woken = False
        self._require_connected()
        if self._broker.happens(self._broker.conditions_of(self._client).disconnect):
            self.disconnect("connection lost")
            self._require_connected()
        self._receipts, receipts = self._take_due(self._receipts)
        self._in_flight -= len(receipts)
        self._mailbox.pending, deliveries = self._take_due(self._mailbox.pending)
        self._mailbox.unacknowledged |= {delivery.mid: delivery for delivery in deliveries}
        self.traffic_bytes += sum(_size(each.topic, each.payload, *each.tokens) for each in deliveries)
        return [*receipts, *deliveries]

    def acknowledge(self, delivery: IncomingMessage) -> None:
        self._mailbox.unacknowledged.pop(delivery.mid, None)

    def wake(self) -> None:
        self._is_woken = True
        self._broker.on_due(self._client, self._broker.clock_s)

    def close(self) -> None:
        self.disconnect("closed", will=False)

    def drop(self) -> None:
        self.disconnect("dropped")

    def disconnect(self, reason: str, *, will: bool = True) -> None:
        """End the connection. The broker publishes the Will unless the client closed properly."""
        if self._lost_reason is not None:
            return
        self._lost_reason = reason
        self._broker.detach(self._mailbox)
        if will and self._will is not None:
            self._broker.publish(self._will)

    def _require_connected(self) -> None:
        if self._lost_reason is not None:
            raise LinkDown(f"lossy link: {self._lost_reason}")

    def _take_due(self, entries: list[tuple[float, T]]) -> tuple[list[tuple[float, T]], list[T]]:
        """Split (due time, event) entries into those that stay and the events to receive now, by time."""
        ready = [i for i, (due, _) in enumerate(entries) if due <= self._broker.clock_s]
        if len(ready) > 1 and self._broker.happens(self._broker.conditions_of(self._client).partial_receive):
            ready = ready[: self._broker.rng.randrange(1, len(ready))]
        chosen = {*ready}
        events = sorted((entries[i] for i in ready), key=lambda entry: entry[0])
        return [entry for i, entry in enumerate(entries) if i not in chosen], [event for _, event in events]


def _size(*parts: str | bytes) -> int:
    return sum(len(part) for part in parts)
