"""Sealed payloads: HPKE (RFC 9180) in base mode, so that the broker carries what only the collector can read.

A sealed payload replaces payload and signature of a message on air; inside, both are as they were signed. Suite 1 is
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305, which needs no AES instructions.

    0x01 | first 8 bytes of the key's thumbprint | encapsulated key, 32 bytes | ciphertext and tag of: token LF content

HPKE's `info` binds the topic. Base mode proves no sender: the signature inside does, and it names the topic, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from agent.errors import MessageRefused
from agent.wire.jws import MAX_TOKEN
from agent.wire.keys import b64url_decode, b64url_encode

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_VERSION = b"\x01"
_HINT_BYTES, _KEY_BYTES, _TAG_BYTES = 8, 32, 16
_HEADER_BYTES = len(_VERSION) + _HINT_BYTES
# What sealing adds to token and content.
OVERHEAD_BYTES = _HEADER_BYTES + _KEY_BYTES + _TAG_BYTES + 1


@dataclass(frozen=True, eq=False)
class EncryptionKey:
    """A public X25519 key, to which payloads are sealed; `raw` is its 32 bytes."""

    raw: bytes
    public: X25519PublicKey = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "public", X25519PublicKey.from_public_bytes(self.raw))

    @cached_property
    def text(self) -> str:
        """Base64url of the raw key, as in config files."""
        return b64url_encode(self.raw)

    @cached_property
    def kid(self) -> str:
        """RFC 7638 thumbprint of the key's JWK (RFC 8037)."""
        return b64url_encode(self.thumbprint)

    @cached_property
    def thumbprint(self) -> bytes:
        return hashlib.sha256(f'{{"crv":"X25519","kty":"OKP","x":"{self.text}"}}'.encode()).digest()


def parse_encryption_key(text: str) -> EncryptionKey:
    """Parse a base64url public key. Raises ValueError, also for keys whose shared secret anybody knows."""
    raw = b64url_decode(text.strip())
    if len(raw) != _KEY_BYTES:
        raise ValueError(f"an X25519 public key has {_KEY_BYTES} bytes, this one {len(raw)}")
    key = EncryptionKey(raw)
    try:
        # A point of small order gives zero with every private key.
        X25519PrivateKey.generate().exchange(key.public)
    except ValueError:
        raise ValueError("an X25519 public key of small order: anybody can open what is sealed to it") from None
    return key


def public_of(key: X25519PrivateKey) -> EncryptionKey:
    return EncryptionKey(key.public_key().public_bytes_raw())


def seal(key: EncryptionKey, topic: str, token: str, content: bytes) -> bytes:
    """Return the sealed payload of a message on `topic`."""
    sealed = _SUITE.encrypt(token.encode() + b"\n" + content, key.public, _info(topic))
    return _VERSION + key.thumbprint[:_HINT_BYTES] + sealed


class Opener:
    """Private keys that open sealed payloads: the one in force, and former ones."""

    def __init__(self, keys: Iterable[X25519PrivateKey]) -> None:
        self._keys: dict[bytes, Sequence[X25519PrivateKey]] = {}
        for key in keys:
            hint = public_of(key).thumbprint[:_HINT_BYTES]
            self._keys[hint] = [*self._keys.get(hint, ()), key]

    def open(self, topic: str, sealed: bytes) -> tuple[str, bytes]:
        """Return token and content of a sealed payload. Raises MessageRefused and no other exception."""
        if sealed[: len(_VERSION)] != _VERSION or len(sealed) < OVERHEAD_BYTES:
            raise MessageRefused("malformed seal", f"{len(sealed)} bytes, not of version 1")
        hint = sealed[len(_VERSION) : _HEADER_BYTES]
        keys = self._keys.get(hint, ())
        if not keys:
            raise MessageRefused("sealed to another key", f"whose thumbprint begins with {b64url_encode(hint)}")
        for key in keys:
            try:
                plaintext = _SUITE.decrypt(sealed[_HEADER_BYTES:], key, _info(topic))
            except (InvalidTag, ValueError):
                continue
            token, newline, content = plaintext.partition(b"\n")
            if not newline or len(token) > MAX_TOKEN or not token.isascii():
                raise MessageRefused("malformed seal", "no signature inside")
            return token.decode(), content
        raise MessageRefused("broken seal", "altered, truncated, or sealed for another topic")


def _info(topic: str) -> bytes:
    return b"outstation sealed v1\n" + topic.encode()
