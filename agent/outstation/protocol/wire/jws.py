"""Payloads and their signatures: detached JWS (RFC 7515 appendix F, RFC 7797) with Ed25519, bound to one topic.

Rules of `verify`, in order, all before the payload is parsed:
- exactly one token, three parts, the middle one empty
- the header is JSON with exactly `alg`, `b64`, `crit`, `kid`, `top`, each once
- `alg` is EdDSA, the only algorithm of our keys; `b64` is false; `crit` is exactly ["b64"]
- `kid` names a known key that is not revoked
- `top` is the topic the message came on
- the signature fits the exact bytes
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature

from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire.keys import PublicKey, SigningKey, b64url_decode, b64url_encode

MAX_TOKEN = 2048
MAX_PAYLOAD = 1 << 20


def encode(members: Mapping[str, Any]) -> bytes:
    """Return the payload bytes of `members`, in their order."""
    return msgspec.json.encode(members)


def digest(payload: bytes) -> str:
    """Return the SHA-256 of a payload, base64url; a log is chained by `log_chain.digest`."""
    return b64url_encode(hashlib.sha256(payload).digest())


class JwsHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alg: Literal["EdDSA"]
    b64: bool
    crit: list[str]
    kid: str
    top: str


class Signer(msgspec.Struct, frozen=True):
    """A known key and its owner: a device id, or a role such as `collector`."""

    owner: str
    key: PublicKey
    revoked: bool = False


S = TypeVar("S", bound=Signer)


def sign(key: SigningKey, topic: str, payload: bytes) -> str:
    """Return the token for user property `jws`."""
    head = _protected_header(key.public.kid, topic)
    return f"{head}..{b64url_encode(key.sign(head.encode() + b'.' + payload))}"


def verify(tokens: Sequence[str], topic: str, payload: bytes, find_signer: Callable[[str], S | None]) -> S:
    """Return the signer of `payload`. `find_signer` maps a kid to a known signer.

    Raises MessageRefused that names the failed rule.
    """
    header, protected, signature = _parse_token(tokens)
    signer = find_signer(header.kid)
    if signer is None:
        raise MessageRefused("unknown key", f"kid {header.kid[:64]!r}")
    if signer.revoked:
        raise MessageRefused("revoked key", f"kid {header.kid} of {signer.owner}")
    if header.top != topic:
        raise MessageRefused("other topic", f"signed for {header.top[:120]!r}, came on {topic!r}")
    try:
        signer.key.verify(signature, protected.encode() + b"." + payload)
    except InvalidSignature:
        raise MessageRefused("bad signature", f"kid {header.kid} of {signer.owner}") from None
    return signer


def claimed_kid(token: str) -> str:
    """Return the unverified kid of a token, for messages to people. Raises MessageRefused."""
    return _parse_token([token])[0].kid


def _parse_token(tokens: Sequence[str]) -> tuple[JwsHeader, str, bytes]:
    if len(tokens) != 1:
        raise MessageRefused("unsigned" if not tokens else "several signatures")
    parts = tokens[0].split(".") if len(tokens[0]) <= MAX_TOKEN else []
    if len(parts) != 3 or parts[1]:
        raise MessageRefused("malformed signature", "not a detached compact JWS")
    try:
        header = _parse_header(parts[0])
        signature = b64url_decode(parts[2])
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise MessageRefused("malformed signature", str(error)[:120]) from None
    return header, parts[0], signature


@lru_cache(maxsize=1024)
def _parse_header(text: str) -> JwsHeader:
    # A signer's header is the same for all messages of a topic.
    data = b64url_decode(text)
    header = decoders.from_json(data, JwsHeader)
    check_strict_json(data)
    if header.b64 or header.crit != ["b64"]:
        raise ValueError('b64 must be false and crit ["b64"]')
    return header


@lru_cache(maxsize=256)
def _protected_header(kid: str, topic: str) -> str:
    return b64url_encode(msgspec.json.encode(JwsHeader("EdDSA", False, ["b64"], kid, topic)))
