"""Compression of payloads on the link."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.protocol.transport.packets import GZIP, JSON, OutgoingMessage, compress, decompress
from outstation.protocol.wire.jws import MAX_PAYLOAD


@given(st.binary(max_size=3000) | st.text(alphabet='{}[]",:0123456789', max_size=3000).map(str.encode))
def test_compression_round_trips_and_never_grows(payload: bytes) -> None:
    sent = compress(OutgoingMessage("a/b", payload, (("jws", "x..y"),)))
    assert decompress(sent.payload, sent.content_type) == payload
    assert len(sent.payload) <= len(payload)
    assert (sent.content_type == JSON) == (sent.payload == payload)
    assert (sent.topic, sent.properties) == ("a/b", (("jws", "x..y"),))


def test_compression_is_deterministic_gzip() -> None:
    message = OutgoingMessage("a/b", b'{"row":[1,2,3]}' * 20)
    first, again = compress(message), compress(message)
    assert first == again
    assert first.content_type == GZIP
    assert gzip.decompress(first.payload) == message.payload


WHOLE = gzip.compress(b'{"v":1}' * 50)
HOSTILE = {
    "no gzip at all": b'{"v":1}',
    "cut short": WHOLE[:-3],
    "another one behind it": WHOLE + WHOLE,
    "bytes behind it": WHOLE + b"\x00",
    "a wrong checksum": WHOLE[:-8] + bytes(4) + WHOLE[-4:],
    "zlib in place of gzip": zlib.compress(b"{}"),
    "more than a message may hold": gzip.compress(bytes(MAX_PAYLOAD + 1)),
    "64 MiB of zeros": gzip.compress(bytes(1 << 26)),
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_incomplete_gzip_is_left_unchanged(name: str) -> None:
    assert decompress(HOSTILE[name], GZIP) == HOSTILE[name]


@given(st.binary(max_size=300))
def test_noise_that_says_it_is_gzip_harms_nobody(payload: bytes) -> None:
    assert len(decompress(payload, GZIP)) <= MAX_PAYLOAD


def test_what_fills_a_message_to_the_last_byte_is_unpacked() -> None:
    assert decompress(gzip.compress(bytes(MAX_PAYLOAD)), GZIP) == bytes(MAX_PAYLOAD)
