"""Hash chain of a device's log: the digest of a message that the next one carries in `prev`.

A payload is split before its first `,"boot":`. The part before, its header, has kind, device, log, seq and `prev`; the
part behind, its body, has what was measured. The digest is over the hashes of both, so a reader who has the hash of a
body can follow the chain through a message without its content.
"""

from __future__ import annotations

import hashlib

import msgspec

from outstation.protocol.wire.keys import b64url_decode, b64url_encode

_BODY = b',"boot":'


def digest(payload: bytes) -> str:
    """Return SHA-256 over the SHA-256 of header and body, base64url."""
    header, body = split(payload)
    return _combine(header, hashlib.sha256(body).digest())


def split(payload: bytes) -> tuple[bytes, bytes]:
    """Return header and body; the body is empty without a member `boot`."""
    place = payload.find(_BODY)
    return (payload, b"") if place < 0 else (payload[:place], payload[place:])


def hash_body(payload: bytes) -> str:
    """Return the SHA-256 of the body, base64url."""
    return b64url_encode(hashlib.sha256(split(payload)[1]).digest())


def encode_header(kind: str, device: str, log: str, seq: int, prev: str) -> bytes:
    """Return the header as a device writes it."""
    members = {"v": 1, "kind": kind, "device": device, "log": log, "seq": seq, "prev": prev}
    return msgspec.json.encode(members)[:-1]


def digest_of_parts(header: bytes, body_hash: str) -> str:
    """Return the digest of a payload of which the body is not known. Raises ValueError."""
    return _combine(header, b64url_decode(body_hash))


def _combine(header: bytes, body_hash: bytes) -> str:
    return b64url_encode(hashlib.sha256(hashlib.sha256(header).digest() + body_hash).digest())
