"""Looking on: every message of the fleet with the verdict on it, as lines or as a live table. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec

from agent.config import BrokerConfig
from agent.errors import LinkDown, MessageRefused, StorageError, UsageError
from agent.fleet.collector.acknowledger import Backoff
from agent.fleet.collector.subscription import topic_filters
from agent.fleet.keyring import Keyring
from agent.text import printable
from agent.transport.mqtt import Link
from agent.transport.packets import IncomingMessage, PublishReceipt
from agent.wire import topics
from agent.wire.messages import (
    AlertPayload,
    DriftPayload,
    LoggedPayload,
    ResultsPayload,
    StatePayload,
    VerifiedMessage,
    verify_message,
)

TAKEN_OVER = "taken over"


class DeviceView(msgspec.Struct):
    """One device, from what came since the watch began."""

    state: str = "?"
    clock: str = ""
    rows: dict[str, int] = msgspec.field(default_factory=dict)
    windows: int = 0
    results: int = 0
    refused: int = 0
    last_time: str = ""
    drift: dict[str, str] = msgspec.field(default_factory=dict)
    alerts: dict[str, str] = msgspec.field(default_factory=dict)


class VerifiedDelivery(msgspec.Struct, frozen=True):
    """A delivery, and the message it is or why it is none."""

    delivery: IncomingMessage
    message: VerifiedMessage | None
    reason: str = ""

    def to_line(self) -> str:
        """`topic payload  [ok]`, safe to print: control characters of strangers are escaped."""
        mark = "[ok]" if self.message else f"[refused: {self.reason}]"
        return f"{printable(self.delivery.topic)} {printable(self.delivery.payload.decode(errors='replace'))}  {mark}"


class FleetWatcher:
    """What is known of the fleet so far, fed one delivery at a time."""

    def __init__(self, fleet: str, keyring: Keyring) -> None:
        self.fleet, self._keyring = fleet, keyring
        self.devices: dict[str, DeviceView] = {}
        self.refused = 0

    def verify(self, delivery: IncomingMessage) -> VerifiedDelivery:
        try:
            message = verify_message(delivery.topic, delivery.payload, delivery.tokens, self._keyring.find)
            self._keyring.require_in_bounds(message)
            # An acknowledgement is the collector's alone: another device's key must not pass for it.
            if topics.KINDS[message.topic.kind].to_device and message.signer.owner != "collector":
                raise MessageRefused("other signer", message.signer.owner)
        except MessageRefused as refused:
            self.refused += 1
            return VerifiedDelivery(delivery, None, str(refused))
        self._update_device(message)
        return VerifiedDelivery(delivery, message)

    def _update_device(self, message: VerifiedMessage) -> None:
        body = message.body
        seen = self.devices.setdefault(body.device, DeviceView())
        if isinstance(body, StatePayload):
            seen.state = body.state
        if isinstance(body, LoggedPayload):
            seen.last_time, seen.clock = body.time, body.clock
        if isinstance(body, ResultsPayload):
            seen.rows[body.stream] = max(seen.rows.get(body.stream, 0), body.rows[1])
            seen.windows += body.n
            seen.results += len(body.columns)
        elif isinstance(body, DriftPayload):
            seen.drift[body.task] = body.state
        elif isinstance(body, AlertPayload) and body.state == "raised":
            seen.alerts[body.id] = body.summary
        elif isinstance(body, AlertPayload):
            seen.alerts.pop(body.id, None)


def receive_deliveries(
    connect: Callable[[], Link],
    refresh: Callable[[], None],
    seconds: float | None,
    report: Callable[[str], None],
) -> Iterator[list[IncomingMessage]]:
    """What comes, in groups, an empty one at least each half second; reconnects. Ends after `seconds`, if given."""
    end = None if seconds is None else time.monotonic() + seconds
    retry = Backoff()
    while end is None or time.monotonic() < end:
        try:
            link = connect()
            try:
                report("")
                while end is None or time.monotonic() < end:
                    events = link.receive(0.5)
                    refresh()
                    yield [event for event in events if not isinstance(event, PublishReceipt)]
                    for event in events:
                        if isinstance(event, IncomingMessage):
                            link.acknowledge(event)
                    retry.reset()
            finally:
                link.close()
        except (LinkDown, StorageError) as down:
            if TAKEN_OVER in str(down).lower():
                raise UsageError(
                    "another `outstation fleet watch` connected with this certificate; one at a time"
                ) from None
            report(f"{down}; trying again")
            wake = time.monotonic() + retry.next_delay()
            while time.monotonic() < min(wake, end or wake):
                yield []
                time.sleep(0.1)


def connect(broker: BrokerConfig, fleet: str, name: str) -> Link:
    """A connection that sees what the collector sees, and what the collector answers."""
    return Link(broker, name, subscribe=[*topic_filters(fleet), f"{topics.ROOT}/{fleet}/+/ack"])
