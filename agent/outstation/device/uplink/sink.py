"""Sink: a way for signed messages to leave the device, and for receipts and messages to come in.

The shipped one is MQTT (`mqtt_sink`). `outstation.device.config.sinks` has all, by the scheme of `[broker] url`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from outstation.device.config import Config
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage

Outcome = Literal["accepted", "no subscribers", "too large", "refused"]


class Receipt(msgspec.Struct, frozen=True):
    """Outcome of one `send`. A message with "no subscribers" was accepted, and nobody was there to receive it."""

    token: int
    outcome: Outcome
    reason: str = ""


class Sink(Protocol):
    """An open sink, owned by one thread. Every method but `wake` raises LinkDown once the sink is lost."""

    @property
    def window(self) -> int:
        """Most messages without a receipt at a time."""
        ...

    @property
    def max_bytes(self) -> int:
        """Largest `measure` of a message that the sink takes."""
        ...

    @property
    def traffic_bytes(self) -> int:
        """Bytes that the sink has moved on the network, both ways, with headers; 0 where that is not known."""
        ...

    def measure(self, message: OutgoingMessage) -> int:
        """Return the bytes that a message takes in this sink, at most."""
        ...

    def send(self, message: OutgoingMessage) -> int:
        """Hand over one message; return the token of its receipt, which `receive` returns later, in order."""
        ...

    def receive(self, timeout_s: float) -> list[IncomingMessage | Receipt]:
        """Return what came in within `timeout_s`; early on the first event or a `wake`."""
        ...

    def acknowledge(self, delivery: IncomingMessage) -> None:
        """Confirm that a message from the sink has been received."""
        ...

    def wake(self) -> None:
        """End a waiting `receive`; safe from any thread."""
        ...

    def close(self) -> None:
        """Leave in order: the last will is not published."""
        ...

    def drop(self) -> None:
        """Cut the connection: the last will is published."""
        ...


# Opens a sink: subscribes to the topics, and leaves the last will, which is published if the device vanishes.
OpenSink = Callable[[Sequence[str], OutgoingMessage], Sink]


class SinkModule(Protocol):
    """Module of one scheme of `[broker] url`. That of another package also has `check_url` and `check`."""

    def open_sink(self, conf: Config, subscriptions: Sequence[str], will: OutgoingMessage) -> Sink:
        """Open the sink of the config. Raises LinkDown."""
        ...

    def check_url(self, url: str) -> None:
        """Check `[broker] url` when the config is loaded. Raises ValueError."""
        ...

    def check(self, conf: Config) -> str:
        """Return one line for `outstation check`. Raises UsageError, LinkDown."""
        ...
