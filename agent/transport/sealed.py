"""Sealing of messages at the edge of a connection: topic, retain flag and expiry stay, all else is in the payload."""

from __future__ import annotations

from msgspec.structs import replace

from agent.transport.packets import GZIP, JSON, SEALED, IncomingMessage, OutgoingMessage, decompress
from agent.wire import sealing
from agent.wire.sealing import EncryptionKey, Opener

# First byte of gzip (RFC 1952); a JSON object begins with a brace.
_GZIP_BEGIN = b"\x1f"


def seal(message: OutgoingMessage, key: EncryptionKey) -> OutgoingMessage:
    """Return the message with payload and signature sealed. Other properties, which repeat the payload, are dropped."""
    token = next(value for name, value in message.properties if name == "jws")
    payload = sealing.seal(key, message.topic, token, message.payload)
    return replace(message, payload=payload, properties=(), content_type=SEALED)


def unseal(message: IncomingMessage, opener: Opener | None) -> IncomingMessage:
    """Return the message as its sender signed it, or as it came if it is not sealed. Raises MessageRefused."""
    if not message.sealed:
        return message
    token, content = (opener or Opener([])).open(message.topic, message.payload)
    payload = decompress(content, GZIP if content.startswith(_GZIP_BEGIN) else JSON)
    return replace(message, payload=payload, tokens=(token,), sealed=False)
