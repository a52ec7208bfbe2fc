"""Client of a broker in attacks: reason codes of what it publishes, refusals of what it subscribes to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from paho.mqtt.subscribeoptions import SubscribeOptions

from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.workbench.testing.patience import TIMEOUT_S, Patience

NOT_AUTHORIZED = 0x87


def subscribe_anyway(link: Link, filters: Sequence[str]) -> list[str]:
    """Subscribe whatever the broker answers, and keep the connection; return the refusals, "" where there is none."""
    link._handshake.subscribed.clear()
    link._client.subscribe([(topic, SubscribeOptions(qos=1)) for topic in filters])
    link._wait_until(lambda: bool(link._handshake.subscribed), TIMEOUT_S, "no SUBACK")
    return [reason if code >= 0x80 else "" for code, reason in link._handshake.subscribed]


def publish_one(link: Link, message: OutgoingMessage) -> int:
    """Publish a message and return the broker's reason code."""
    token, patience = link.send(message), Patience(TIMEOUT_S)
    while not patience.is_over():
        for event in link.receive(1.0):
            if isinstance(event, PublishReceipt) and event.token == token:
                return event.code
    raise AssertionError("no PUBACK")


def publish_all(link: Link, messages: Sequence[OutgoingMessage]) -> None:
    """Publish within the broker's window, and wait for each PUBACK."""
    waiting: set[int] = set()
    remaining = iter(messages)
    while True:
        for message in itertools.islice(remaining, link.window - len(waiting)):
            waiting.add(link.send(message))
        if not waiting:
            return
        waiting -= {event.token for event in link.receive(5.0) if isinstance(event, PublishReceipt)}


def receive_messages(link: Link, n: int, timeout_s: float = TIMEOUT_S) -> list[IncomingMessage]:
    """Return the next `n` messages, or those that came within `timeout_s`."""
    messages: list[IncomingMessage] = []
    patience = Patience(timeout_s)
    while len(messages) < n and not patience.is_over():
        for event in link.receive(0.2):
            if isinstance(event, IncomingMessage):
                link.acknowledge(event)
                messages.append(event)
    return messages


def receive_through(link: Link, last: bytes, timeout_s: float = TIMEOUT_S) -> list[bytes]:
    """Return the payloads up to `last`, or those that came within `timeout_s`."""
    payloads: list[bytes] = []
    patience = Patience(timeout_s)
    while last not in payloads and not patience.is_over():
        payloads += [event.payload for event in link.receive(0.2) if isinstance(event, IncomingMessage)]
    return payloads
