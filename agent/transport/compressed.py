"""Payloads as gzip on the air: what is signed, stored and kept as evidence is the JSON in them.

Sources: RFC 1952, gzip; RFC 6713, its media type.
"""

from __future__ import annotations

import zlib

from msgspec.structs import replace

from agent.transport.packets import GZIP, OutgoingMessage
from agent.wire.messages import MAX_PAYLOAD

# Where a level more saves less than a percent.
_LEVEL = 6
_GZIP_WBITS = 16 + zlib.MAX_WBITS


def compress(message: OutgoingMessage) -> OutgoingMessage:
    """The message with its payload as gzip, where that is shorter; the same bytes each time."""
    packer = zlib.compressobj(_LEVEL, wbits=_GZIP_WBITS)
    packed = packer.compress(message.payload) + packer.flush()
    if len(packed) >= len(message.payload):
        return message
    return replace(message, payload=packed, content_type=GZIP)


def decompress(payload: bytes, content_type: str) -> bytes:
    """What a payload of this type holds.

    One that is not a whole gzip, or holds more than a message may, is left as it came: nobody has signed that.
    """
    if content_type != GZIP:
        return payload
    unpacker = zlib.decompressobj(_GZIP_WBITS)
    try:
        found = unpacker.decompress(payload, MAX_PAYLOAD + 1)
    except zlib.error:
        return payload
    return found if unpacker.eof and not unpacker.unused_data and len(found) <= MAX_PAYLOAD else payload
