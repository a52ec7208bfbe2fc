"""Looking on: every message of the fleet with the verdict on it, as lines or as a live table. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from agent.config import Broker
from agent.errors import LinkDown, Refused, StorageError, UsageError
from agent.fleet.collector.acknowledger import Backoff
from agent.fleet.collector.subscription import filters
from agent.fleet.keyring import Keyring
from agent.text import printable
from agent.transport.mqtt import Link
from agent.transport.packets import Delivery, Receipt
from agent.wire import topics
from agent.wire.messages import Alerts, Drift, Logged, Message, Results, State, open_message

TAKEN_OVER = "taken over"


class Seen(msgspec.Struct):
    """One device, from what came since the watch began."""

    state: str = "?"
    clock: str = ""
    rows: dict[str, int] = msgspec.field(default_factory=dict)
    windows: int = 0
    results: int = 0
    refused: int = 0
    last: str = ""
    drift: dict[str, str] = msgspec.field(default_factory=dict)
    alerts: dict[str, str] = msgspec.field(default_factory=dict)


class Verdict(msgspec.Struct, frozen=True):
    """A delivery, and the message it is or why it is none."""

    delivery: Delivery
    message: Message | None
    reason: str = ""

    def line(self) -> str:
        """`topic payload  [ok]`, safe to print: control characters of strangers are escaped."""
        mark = "[ok]" if self.message else f"[refused: {self.reason}]"
        return f"{printable(self.delivery.topic)} {printable(self.delivery.payload.decode(errors='replace'))}  {mark}"


class Watcher:
    """What is known of the fleet so far, fed one delivery at a time."""

    def __init__(self, fleet: str, keyring: Keyring) -> None:
        self.fleet, self._keyring = fleet, keyring
        self.devices: dict[str, Seen] = {}
        self.refused = 0

    def judge(self, delivery: Delivery) -> Verdict:
        try:
            message = open_message(delivery.topic, delivery.payload, delivery.tokens, self._keyring.find)
            self._keyring.require_in_bounds(message)
            # An acknowledgement is the collector's alone: another device's key must not pass for it.
            if message.topic.kind in topics.DOWN and message.signer.owner != "collector":
                raise Refused("other signer", message.signer.owner)
        except Refused as refused:
            self.refused += 1
            return Verdict(delivery, None, str(refused))
        self._note(message)
        return Verdict(delivery, message)

    def _note(self, message: Message) -> None:
        body = message.body
        seen = self.devices.setdefault(body.device, Seen())
        if isinstance(body, State):
            seen.state = body.state
        if isinstance(body, Logged):
            seen.last, seen.clock = body.time, body.clock
        if isinstance(body, Results):
            seen.rows[body.stream] = max(seen.rows.get(body.stream, 0), body.rows[1])
            seen.windows += body.n
            seen.results += len(body.columns.row)
        elif isinstance(body, Drift):
            seen.drift[body.task] = body.state
        elif isinstance(body, Alerts) and body.state == "raised":
            seen.alerts[body.id] = body.summary
        elif isinstance(body, Alerts):
            seen.alerts.pop(body.id, None)


def deliveries(
    connect: Callable[[], Link],
    refresh: Callable[[], None],
    seconds: float | None,
    tell: Callable[[str], None],
) -> Iterator[list[Delivery]]:
    """What comes, in groups, an empty one at least each half second; reconnects. Ends after `seconds`, if given."""
    end = None if seconds is None else time.monotonic() + seconds
    retry = Backoff()
    while end is None or time.monotonic() < end:
        try:
            link = connect()
            try:
                tell("")
                while end is None or time.monotonic() < end:
                    events = link.receive(0.5)
                    refresh()
                    yield [event for event in events if not isinstance(event, Receipt)]
                    for event in events:
                        if isinstance(event, Delivery):
                            link.acknowledge(event)
                    retry.reset()
            finally:
                link.close()
        except (LinkDown, StorageError) as down:
            if TAKEN_OVER in str(down).lower():
                raise UsageError(
                    "another `outstation fleet watch` connected with this certificate; one at a time"
                ) from None
            tell(f"{down}; trying again")
            wake = time.monotonic() + retry.next()
            while time.monotonic() < min(wake, end or wake):
                yield []
                time.sleep(0.1)


def connect(broker: Broker, fleet: str, name: str) -> Link:
    """A connection that sees what the collector sees, and what the collector answers."""
    return Link(broker, name, subscribe=[*filters(fleet), f"{topics.ROOT}/{fleet}/+/ack"])
