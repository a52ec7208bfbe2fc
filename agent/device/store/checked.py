"""Messages of the outbox carry a CRC: what the disk has changed must not be sent as if we had signed it."""

from __future__ import annotations

import zlib
from typing import Any

# CAST: one flipped bit on the disk makes a text that cannot be read as text.
MESSAGE_COLUMNS = "seq, CAST(topic AS BLOB), CAST(payload AS BLOB), CAST(jws AS BLOB), CAST(time AS BLOB), crc"


def message_crc(seq: int, topic: bytes, payload: bytes, jws: bytes, time: bytes) -> int:
    """CRC-32 over a message and its number, the parts kept apart by their lengths."""
    parts = (topic, payload, jws, time)
    crc = zlib.crc32(f"{seq} {' '.join(str(len(part)) for part in parts)}\n".encode())
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc


def decode_message_row(row: tuple[Any, ...]) -> tuple[int, str, bytes, str, str] | None:
    """A row of COLUMNS as (seq, topic, payload, jws, time); None where its CRC does not match."""
    seq, *parts, crc = row
    if not all(isinstance(part, bytes) for part in parts) or message_crc(seq, *parts) != crc:
        return None
    topic, payload, jws, time = parts
    return seq, topic.decode(), payload, jws.decode(), time.decode()
