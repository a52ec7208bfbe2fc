"""A broker in memory whose links lose, delay, repeat, reorder, split and break, all from one seed, in virtual time.

Its links have the methods of `agent.transport.mqtt.Link`. One thread runs it all: while a link waits, the clock goes on
and the others get their turn. The same seed gives the same run, message by message.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.clock import Now
from agent.errors import LinkDown
from agent.transport.compressed import plain
from agent.transport.packets import NO_SUBSCRIBERS, Delivery, Outgoing, Receipt

_STEP_S = 0.1
_FIRST_WALL_US = 1_795_000_000_000_000


class Weather(msgspec.Struct, frozen=True):
    """Chances of 0 to 1, of each message or call, and the longest time a message is under way."""

    lose: float = 0.0
    """The broker confirms a message and forgets it."""
    repeat: float = 0.0
    """It delivers a message twice."""
    delay_s: float = 0.0
    """Each delivery and receipt takes its own time up to this, so that they overtake each other."""
    split: float = 0.0
    """`receive` brings only some of what is there."""
    cut: float = 0.0
    """The connection breaks; what was being sent may or may not have arrived."""
    drop: float = 0.0
    """The broker neither takes a message nor says so, as one that throttles."""
    mute: bool = False
    """The broker confirms nothing."""


class _Mailbox(msgspec.Struct):
    """What the broker has for one client: `waiting` is (due, event); `taken` was delivered and not acknowledged."""

    filters: Sequence[str] = ()
    persistent: bool = False
    waiting: list[tuple[float, Delivery]] = msgspec.field(default_factory=list)
    taken: dict[int, Delivery] = msgspec.field(default_factory=dict)
    link: AirLink | None = None


class Air:
    """The broker and the clock. `judge` gives the reason code of a message; `others` get a turn while a link waits."""

    def __init__(self, seed: int, weather: Weather, *, window: int = 100, max_packet: int = 1 << 20) -> None:
        self.rng = random.Random(seed)
        self.weather, self.window, self.max_packet = weather, window, max_packet
        self.clock_s = 1000.0
        self.others: list[Callable[[], object]] = []
        self.judge: Callable[[Outgoing], int] = lambda _: 0
        self.published: list[Outgoing] = []
        self.connects: Counter[str] = Counter()
        self.most_under_way: dict[str, int] = {}
        self._boxes: dict[str, _Mailbox] = {}
        self._retained: dict[str, Outgoing] = {}
        self._mid = 0

    def now(self) -> Now:
        return Now(_FIRST_WALL_US + round(self.clock_s * 1e6), self.clock_s, "synced")

    def connect(
        self,
        _broker: object,
        client: str,
        *,
        subscribe: Sequence[str] = (),
        will: Outgoing | None = None,
        session_expiry_s: int = 0,
        **_: Any,
    ) -> AirLink:
        """As `Link(…)`. Raises LinkDown."""
        self.connects[client] += 1
        if self.chance(self.weather.cut):
            raise LinkDown("the air: no connection")
        box = self._boxes.get(client)
        if box is not None and box.link is not None:
            box.link.cut("taken over")
        if box is None or not session_expiry_s:
            box = self._boxes[client] = _Mailbox()
        box.filters, box.persistent = tuple(subscribe), session_expiry_s > 0
        # What was delivered and not acknowledged comes again.
        box.waiting = [*((self.clock_s, old) for old in box.taken.values()), *box.waiting]
        box.taken = {}
        box.link = AirLink(self, client, box, will)
        for message in self._retained.values():
            if any(matches(one, message.topic) for one in box.filters):
                box.waiting.append((self.clock_s, self._delivery(message, retained=True)))
        return box.link

    def publish(self, message: Outgoing) -> int:
        """Route a message as the broker does; its reason code."""
        code = self.judge(message)
        if code >= 0x80:
            return code
        self.published.append(message)
        if message.retain:
            self._retained[message.topic] = message
        boxes = [box for box in self._boxes.values() if any(matches(one, message.topic) for one in box.filters)]
        for box in boxes:
            if not self.chance(self.weather.lose):
                for _ in range(1 + self.chance(self.weather.repeat)):
                    box.waiting.append((self.due(), self._delivery(message, retained=False)))
        return code or (0 if boxes else NO_SUBSCRIBERS)

    def inject(self, client: str, delivery: Delivery) -> None:
        """Put something into a client's way that nobody published."""
        self._boxes[client].waiting.append((self.clock_s, delivery))

    def restart(self) -> None:
        """The broker dies and comes back, with nothing of what it had."""
        boxes, self._boxes, self._retained = self._boxes, {}, {}
        for box in boxes.values():
            if box.link is not None:
                box.link.cut("the broker died", will=False)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Time passes, and the others get their turns."""
        end = self.clock_s + seconds
        while not until() and self.clock_s < end:
            self.clock_s = min(end, self.clock_s + _STEP_S)
            for other in self.others:
                other()

    def forget(self, box: _Mailbox) -> None:
        """The connection of this mailbox is over."""
        box.link = None
        if not box.persistent:
            self._boxes = {name: one for name, one in self._boxes.items() if one is not box}

    def chance(self, of: float) -> bool:
        return of > 0 and self.rng.random() < of

    def due(self) -> float:
        return self.clock_s + (self.rng.uniform(0, self.weather.delay_s) if self.weather.delay_s else 0.0)

    def _delivery(self, message: Outgoing, *, retained: bool) -> Delivery:
        self._mid += 1
        tokens = tuple(value for name, value in message.properties if name == "jws")
        payload = plain(message.payload, message.content_type)
        head = (message.topic, payload, tokens, retained, self._mid, 1)
        return Delivery(*head, message.correlation, message.response_topic)


class AirLink:
    """One connection through the air."""

    def __init__(self, air: Air, client: str, box: _Mailbox, will: Outgoing | None) -> None:
        self.window, self.max_packet = air.window, air.max_packet
        self._air, self._client, self._box, self._will = air, client, box, will
        self._lost: str | None = None
        self._receipts: list[tuple[float, Receipt]] = []
        self._token = self._under_way = 0
        self._woken = False

    def send(self, message: Outgoing) -> int:
        self._check()
        if self._air.chance(self._air.weather.cut):
            if self._air.rng.random() < 0.5:
                self._air.publish(message)
            self.cut("connection lost")
            self._check()
        self._token += 1
        self._under_way += 1
        most = self._air.most_under_way
        most[self._client] = max(most.get(self._client, 0), self._under_way)
        if self._air.chance(self._air.weather.drop):
            return self._token
        code = self._air.publish(message)
        if not self._air.weather.mute:
            self._receipts.append((self._air.due(), Receipt(self._token, code, f"reason 0x{code:02x}")))
        return self._token

    def receive(self, timeout_s: float) -> list[Delivery | Receipt]:
        self._check()
        self._air.wait(timeout_s, lambda: self._woken or self._lost is not None or self._is_due())
        self._woken = False
        self._check()
        if self._air.chance(self._air.weather.cut):
            self.cut("connection lost")
            self._check()
        return [*self._take_receipts(), *self._take_deliveries()]

    def acknowledge(self, delivery: Delivery) -> None:
        self._box.taken.pop(delivery.mid, None)

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        self.cut("closed", will=False)

    def drop(self) -> None:
        self.cut("dropped")

    def cut(self, why: str, *, will: bool = True) -> None:
        """The connection is over; the broker publishes the Will unless this was a polite end."""
        if self._lost is not None:
            return
        self._lost = why
        self._air.forget(self._box)
        if will and self._will is not None:
            self._air.publish(self._will)

    def _check(self) -> None:
        if self._lost is not None:
            raise LinkDown(f"the air: {self._lost}")

    def _is_due(self) -> bool:
        now = self._air.clock_s
        return any(due <= now for due, _ in self._receipts) or any(due <= now for due, _ in self._box.waiting)

    def _take_receipts(self) -> list[Receipt]:
        ready = self._split([entry for entry in self._receipts if entry[0] <= self._air.clock_s])
        self._receipts = [entry for entry in self._receipts if entry not in ready]
        self._under_way -= len(ready)
        return [receipt for _, receipt in sorted(ready, key=lambda entry: entry[0])]

    def _take_deliveries(self) -> list[Delivery]:
        ready = self._split([entry for entry in self._box.waiting if entry[0] <= self._air.clock_s])
        chosen = {id(entry) for entry in ready}
        self._box.waiting = [entry for entry in self._box.waiting if id(entry) not in chosen]
        deliveries = [delivery for _, delivery in sorted(ready, key=lambda entry: entry[0])]
        self._box.taken |= {delivery.mid: delivery for delivery in deliveries}
        return deliveries

    def _split(self, ready: list[Any]) -> list[Any]:
        if len(ready) > 1 and self._air.chance(self._air.weather.split):
            return ready[: self._air.rng.randrange(1, len(ready))]
        return ready


def matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter takes a topic."""
    wanted, there = topic_filter.split("/"), topic.split("/")
    for i, part in enumerate(wanted):
        if part == "#":
            return True
        if i >= len(there) or part not in ("+", there[i]):
            return False
    return len(wanted) == len(there)
