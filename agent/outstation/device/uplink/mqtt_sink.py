"""MQTT sink: messages go to a broker at QoS 1, and its PUBACKs are the receipts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outstation.device.config import Config
from outstation.device.machine.certificate import choose_certificate
from outstation.device.uplink.sink import Outcome, Receipt
from outstation.protocol.transport.mqtt import KEEP_ALIVE_S, Link
from outstation.protocol.transport.packets import (
    NO_SUBSCRIBERS,
    PACKET_TOO_LARGE,
    IncomingMessage,
    OutgoingMessage,
    PublishReceipt,
)

# A PUBLISH beside topic, payload and user properties: fixed header, packet id, content type, lengths.
_PUBLISH_OVERHEAD_BYTES = 48
# A ping and its answer take about 200 bytes: a minute's would be 290 kB a day, these are 60 kB.
_METERED_KEEP_ALIVE_S = 300


class Connection(Protocol):
    """Methods of `outstation.protocol.transport.mqtt.Link` that the sink uses."""

    @property
    def window(self) -> int: ...
    @property
    def max_packet(self) -> int: ...
    @property
    def traffic_bytes(self) -> int: ...

    def send(self, message: OutgoingMessage) -> int: ...
    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]: ...
    def acknowledge(self, delivery: IncomingMessage) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
    def drop(self) -> None: ...


class MqttSink:
    def __init__(self, link: Connection) -> None:
        self._link = link
        self.send, self.acknowledge, self.wake = link.send, link.acknowledge, link.wake
        self.close, self.drop = link.close, link.drop

    @property
    def window(self) -> int:
        return self._link.window

    @property
    def max_bytes(self) -> int:
        return self._link.max_packet

    @property
    def traffic_bytes(self) -> int:
        return self._link.traffic_bytes

    def measure(self, message: OutgoingMessage) -> int:
        return packet_size(message)

    def receive(self, timeout_s: float) -> list[IncomingMessage | Receipt]:
        events = self._link.receive(timeout_s)
        return [_to_receipt(event) if isinstance(event, PublishReceipt) else event for event in events]


def open_sink(conf: Config, subscriptions: Sequence[str], will: OutgoingMessage) -> MqttSink:
    """Connect to the broker of the config. Raises LinkDown."""
    keep_alive_s = KEEP_ALIVE_S if conf.broker.metered is None else _METERED_KEEP_ALIVE_S
    broker = choose_certificate(conf)
    return MqttSink(Link(broker, conf.device.id, subscribe=subscriptions, will=will, keep_alive_s=keep_alive_s))


def packet_size(message: OutgoingMessage) -> int:
    """Return the bytes of the PUBLISH packet, at most."""
    properties = sum(len(name) + len(value) + 5 for name, value in message.properties)
    return len(message.payload) + len(message.topic) + properties + _PUBLISH_OVERHEAD_BYTES


def _to_receipt(receipt: PublishReceipt) -> Receipt:
    outcome: Outcome = "accepted" if receipt.is_accepted else "refused"
    if receipt.code == NO_SUBSCRIBERS:
        outcome = "no subscribers"
    elif receipt.code == PACKET_TOO_LARGE:
        outcome = "too large"
    return Receipt(receipt.token, outcome, receipt.reason)
