"""Packets of a broker connection: outgoing and incoming messages, receipts, and compression of payloads.

Signatures, digests and stored evidence cover the uncompressed JSON.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import msgspec
from msgspec.structs import replace

from outstation.protocol.wire.jws import MAX_PAYLOAD

# Content types of a PUBLISH (gzip: RFC 6713; sealed: see `outstation.protocol.transport.sealing`).
JSON, GZIP, SEALED = "application/json", "application/gzip", "application/vnd.outstation.sealed"
# MQTT 5 reason codes of a receipt.
NO_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95

# One level more saves less than a percent.
_LEVEL = 6
_GZIP_WBITS = 16 + zlib.MAX_WBITS


class OutgoingMessage(msgspec.Struct, frozen=True):
    """A message to publish, at QoS 1 unless others demand 0; `expiry_s` None keeps it until delivered.

    `reader`: encryption key of the only one who may read it, where messages are sealed; None for the collector.
    """

    topic: str
    payload: bytes
    properties: tuple[tuple[str, str], ...] = ()
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None
    response_topic: str | None = None
    content_type: str = JSON
    reader: str | None = None
    qos: int = 1


class IncomingMessage(msgspec.Struct, frozen=True):
    """A received message with its payload decompressed; `tokens` are its `jws` user properties.

    `duplicate`: the broker sent it before without a confirmation (MQTT DUP flag). `sealed`: payload and signature are
    as in `outstation.protocol.transport.sealing`.
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
    sealed: bool = False


class PublishReceipt(msgspec.Struct, frozen=True):
    """The broker's answer to one `send`; `code` is the MQTT 5 reason code."""

    token: int
    code: int
    reason: str

    @property
    def is_accepted(self) -> bool:
        return self.code < 0x80


class BrokerLink(Protocol):
    """The part of `outstation.protocol.transport.mqtt.Link` that the fleet uses."""

    def send(self, message: OutgoingMessage) -> int: ...
    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]: ...
    def acknowledge(self, delivery: IncomingMessage) -> None: ...
    def close(self) -> None: ...


def compress(message: OutgoingMessage) -> OutgoingMessage:
    """Return the message with its payload as gzip (RFC 1952), where that is shorter. Deterministic."""
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    packed = packer.compress(message.payload) + packer.flush()
    if len(packed) >= len(message.payload):
        return message
    return replace(message, payload=packed, content_type=GZIP)


def decompress(payload: bytes, content_type: str) -> bytes:
    """Return the JSON of a received payload.

    A payload that is not one complete gzip stream, or expands beyond `MAX_PAYLOAD`, is returned unchanged; its
    signature then fails.
    """
    if content_type != GZIP:
        return payload
    unpacker = zlib.decompressobj(_GZIP_WBITS)
    try:
        content = unpacker.decompress(payload, MAX_PAYLOAD + 1)
    except zlib.error:
        return payload
    return content if unpacker.eof and not unpacker.unused_data and len(content) <= MAX_PAYLOAD else payload
