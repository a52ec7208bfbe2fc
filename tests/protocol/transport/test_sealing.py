"""Sealed payloads: RFC 9180 by an implementation of its own, and hostile bytes."""

from __future__ import annotations

import hmac

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.errors import MessageRefused
from outstation.protocol.transport import sealing
from outstation.protocol.transport.sealing import Opener
from outstation.protocol.wire.keys import b64url_encode, encryption_key_of, parse_encryption_key

pytestmark = pytest.mark.attack("privacy")

TOPIC = "outstation/acme/pi-07/results/exercise"
KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
CONTENT = b'{"v":1,"value":21.375}'
SEALED = sealing.seal(encryption_key_of(KEY), TOPIC, "head..signature", CONTENT)


# RFC 9180, section 4 and 5: HKDF-SHA256 in KEM and key schedule, ChaCha20-Poly1305, base mode, first message.
def _extract(suite: bytes, salt: bytes, label: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + secret, "sha256")


def _expand(suite: bytes, key: bytes, label: bytes, info: bytes, length: int) -> bytes:
    labeled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(key, labeled + b"\x01", "sha256")[:length]


def open_by_rfc(private: X25519PrivateKey, sealed: bytes, info: bytes, aad: bytes = b"") -> bytes:
    encapsulated, ciphertext = sealed[:32], sealed[32:]
    kem = b"KEM" + (0x20).to_bytes(2, "big")
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x20, 1, 3))
    shared = private.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    context = encapsulated + private.public_key().public_bytes_raw()
    secret = _expand(kem, _extract(kem, b"", b"eae_prk", shared), b"shared_secret", context, 32)
    schedule = b"\x00" + _extract(suite, b"", b"psk_id_hash", b"") + _extract(suite, b"", b"info_hash", info)
    root = _extract(suite, secret, b"secret", b"")
    key, nonce = _expand(suite, root, b"key", schedule, 32), _expand(suite, root, b"base_nonce", schedule, 12)
    return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, aad)


def test_the_tests_own_hpke_opens_the_vector_of_rfc_9180() -> None:
    """Appendix A.2.1, sequence number 0."""
    private = bytes.fromhex("8057991eef8f1f1af18f4a9491d16a1ce333f695d4db8e38da75975c4478e0fb")
    sealed = bytes.fromhex(
        "1afa08d3dec047a643885163f1180476fa7ddb54c6a8029ea33f95796bf2ac4a"
        "1c5250d8034ec2b784ba2cfd69dbdb8af406cfe3ff938e131f0def8c8b60b4db21993c62ce81883d2dd1b51a28"
    )
    key = X25519PrivateKey.from_private_bytes(private)
    assert open_by_rfc(key, sealed, b"Ode on a Grecian Urn", b"Count-0") == b"Beauty is truth, truth beauty"


def test_a_sealed_payload_is_what_rfc_9180_says() -> None:
    info = b"outstation sealed v1\n" + TOPIC.encode()
    assert open_by_rfc(KEY, SEALED[9:], info) == b"head..signature\n" + CONTENT
    assert SEALED[:9] == b"\x01" + encryption_key_of(KEY).thumbprint[:8]
    assert len(SEALED) == len("head..signature") + len(CONTENT) + sealing.OVERHEAD_BYTES


def test_the_holder_of_the_key_reads_token_and_content() -> None:
    former = X25519PrivateKey.generate()
    assert Opener([former, KEY]).open(TOPIC, SEALED) == ("head..signature", CONTENT)
    assert sealing.seal(encryption_key_of(KEY), TOPIC, "head..signature", CONTENT) != SEALED


@pytest.mark.parametrize(
    ("topic", "sealed", "reason"),
    [
        (TOPIC, b"", "malformed seal"),
        (TOPIC, b"\x02" + SEALED[1:], "malformed seal"),
        (TOPIC, SEALED[: sealing.OVERHEAD_BYTES - 1], "malformed seal"),
        (TOPIC, SEALED[:-1], "broken seal"),
        (TOPIC, SEALED + b"x", "broken seal"),
        (TOPIC.replace("07", "08"), SEALED, "broken seal"),
        (TOPIC, SEALED[:1] + bytes(8) + SEALED[9:], "sealed to another key"),
        (TOPIC, SEALED[:9] + bytes(32) + SEALED[41:], "broken seal"),
        (TOPIC, sealing.seal(encryption_key_of(KEY), TOPIC, "x" * 3000, CONTENT), "malformed seal"),
        (TOPIC, sealing.seal(encryption_key_of(KEY), TOPIC, "\u00e9", CONTENT), "malformed seal"),
    ],
    # Sealed bytes differ in each process, but test processes must agree on names.
    ids=[
        *("empty", "version", "too short", "cut", "longer", "topic", "key id", "ephemeral key"),
        *("long signature", "non-ASCII signature"),
    ],
)
def test_what_was_not_sealed_for_here_is_refused(topic: str, sealed: bytes, reason: str) -> None:
    with pytest.raises(MessageRefused) as refused:
        Opener([KEY]).open(topic, sealed)
    assert refused.value.reason == reason


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_altered_byte_passes(place: int, flip: int) -> None:
    altered = bytearray(SEALED)
    altered[place] ^= flip
    with pytest.raises(MessageRefused):
        Opener([KEY]).open(TOPIC, bytes(altered))


@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_break_the_opener(junk: bytes, addressed: bool) -> None:
    with pytest.raises(MessageRefused):
        Opener([KEY]).open(TOPIC, SEALED[:9] + junk if addressed else junk)


@given(st.text("ab.-_", max_size=40), st.binary(max_size=2000))
def test_what_is_sealed_comes_back(token: str, content: bytes) -> None:
    sealed = sealing.seal(encryption_key_of(KEY), TOPIC, token, content)
    assert Opener([KEY]).open(TOPIC, sealed) == (token, content)
    assert len(content) < 8 or content not in sealed


@pytest.mark.parametrize("raw", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_a_key_that_anybody_can_open_for_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"small order|32 bytes"):
        parse_encryption_key(b64url_encode(raw))
