"""Sealed payloads: HPKE (RFC 9180) in base mode, so that the broker carries what only the collector can read.

A sealed payload replaces payload and signature of a message on air; inside, both are as they were signed. Suite 1 is
DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20-Poly1305, which needs no AES instructions.

    0x01 | first 8 bytes of the key's thumbprint | encapsulated key, 32 bytes | ciphertext and tag of: token LF content

HPKE's `info` binds the topic. Base mode proves no sender: the signature inside does, and it names the topic, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from msgspec.structs import replace

from outstation.foundation.errors import MessageRefused
from outstation.protocol.transport.packets import GZIP, JSON, SEALED, IncomingMessage, OutgoingMessage, decompress
from outstation.protocol.wire.jws import MAX_TOKEN
from outstation.protocol.wire.keys import EncryptionKey, b64url_encode, encryption_key_of

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_VERSION = b"\x01"
_HINT_BYTES, _KEY_BYTES, _TAG_BYTES = 8, 32, 16
_HEADER_BYTES = len(_VERSION) + _HINT_BYTES
# Bytes that sealing adds to token and content.
OVERHEAD_BYTES = _HEADER_BYTES + _KEY_BYTES + _TAG_BYTES + 1
# First byte of gzip (RFC 1952); a JSON object begins with a brace.
_GZIP_BEGIN = b"\x1f"


def seal(key: EncryptionKey, topic: str, token: str, content: bytes) -> bytes:
    """Return the sealed payload of a message on `topic`."""
    return _encrypt(key, _message_info(topic), token.encode() + b"\n" + content)


def seal_content(key: EncryptionKey, topic: str, content: bytes) -> bytes:
    """Return content of a message on `topic` that only the collectors can read."""
    return _encrypt(key, _content_info(topic), content)


class Opener:
    """Private keys that open sealed payloads: the one in force, and former ones."""

    def __init__(self, keys: Iterable[X25519PrivateKey]) -> None:
        self._keys: dict[bytes, Sequence[X25519PrivateKey]] = {}
        for key in keys:
            hint = encryption_key_of(key).thumbprint[:_HINT_BYTES]
            self._keys[hint] = [*self._keys.get(hint, ()), key]

    def can_open(self, head: bytes) -> bool:
        """Return True if the key is here for a sealed text that begins with these bytes."""
        return head.startswith(_VERSION) and head[len(_VERSION) : _HEADER_BYTES] in self._keys

    def open(self, topic: str, sealed: bytes) -> tuple[str, bytes]:
        """Return token and content of a sealed payload. Raises MessageRefused and no other exception."""
        token, newline, content = self._decrypt(_message_info(topic), sealed).partition(b"\n")
        if not newline or len(token) > MAX_TOKEN or not token.isascii():
            raise MessageRefused("malformed seal", "no signature inside")
        return token.decode(), content

    def open_content(self, topic: str, sealed: bytes) -> bytes:
        """Return what `seal_content` sealed. Raises MessageRefused and no other exception."""
        return self._decrypt(_content_info(topic), sealed)

    def _decrypt(self, info: bytes, sealed: bytes) -> bytes:
        if sealed[: len(_VERSION)] != _VERSION or len(sealed) < OVERHEAD_BYTES:
            raise MessageRefused("malformed seal", f"{len(sealed)} bytes, not of version 1")
        hint = sealed[len(_VERSION) : _HEADER_BYTES]
        keys = self._keys.get(hint, ())
        if not keys:
            raise MessageRefused("sealed to another key", f"whose thumbprint begins with {b64url_encode(hint)}")
        for key in keys:
            try:
                return _SUITE.decrypt(sealed[_HEADER_BYTES:], key, info)
            except (InvalidTag, ValueError):
                continue
        raise MessageRefused("broken seal", "altered, truncated, or sealed for another topic")


def seal_message(message: OutgoingMessage, key: EncryptionKey) -> OutgoingMessage:
    """Return the message with payload and signature sealed. Other properties, which repeat the payload, are dropped."""
    token = next(value for name, value in message.properties if name == "jws")
    payload = seal(key, message.topic, token, message.payload)
    return replace(message, payload=payload, properties=(), content_type=SEALED)


def open_message(message: IncomingMessage, opener: Opener) -> IncomingMessage:
    """Return a sealed message as its sender signed it. Raises MessageRefused."""
    token, content = opener.open(message.topic, message.payload)
    payload = decompress(content, GZIP if content.startswith(_GZIP_BEGIN) else JSON)
    return replace(message, payload=payload, tokens=(token,), sealed=False)


def _encrypt(key: EncryptionKey, info: bytes, plaintext: bytes) -> bytes:
    return _VERSION + key.thumbprint[:_HINT_BYTES] + _SUITE.encrypt(plaintext, key.public, info)


def _message_info(topic: str) -> bytes:
    return b"outstation sealed v1\n" + topic.encode()


def _content_info(topic: str) -> bytes:
    return b"outstation content v1\n" + topic.encode()
