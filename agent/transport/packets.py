"""What a connection to the broker carries: messages to publish, those that came, and the broker's receipts."""

from __future__ import annotations

import msgspec

# Content types of a PUBLISH.
JSON, GZIP = "application/json", "application/gzip"
# MQTT 5 reason codes of a receipt.
NO_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95


class OutgoingMessage(msgspec.Struct, frozen=True):
    """A message to publish at QoS 1; `expiry_s` None keeps it until delivered."""

    topic: str
    payload: bytes
    properties: tuple[tuple[str, str], ...] = ()
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None
    response_topic: str | None = None
    content_type: str = JSON


class IncomingMessage(msgspec.Struct, frozen=True):
    """A message that came, its payload unpacked; `tokens` are its `jws` user properties.

    `again`: the broker sent it before, and was not told that it arrived.
    """

    topic: str
    payload: bytes
    tokens: tuple[str, ...]
    retained: bool
    mid: int
    qos: int
    correlation: bytes | None = None
    response_topic: str | None = None
    duplicate: bool = False


class PublishReceipt(msgspec.Struct, frozen=True):
    """The broker's answer to one `send`; `code` is the MQTT 5 reason code."""

    token: int
    code: int
    reason: str

    @property
    def is_accepted(self) -> bool:
        return self.code < 0x80
