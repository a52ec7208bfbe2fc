"""Detached JWS (RFC 7515 appendix F) over unencoded payload bytes (RFC 7797), Ed25519, bound to one topic.

Rules of `verify`, in order, all before the payload is parsed:
- exactly one token, three parts, the middle one empty
- the header is JSON with exactly `alg`, `b64`, `crit`, `kid`, `top`, each once
- `alg` is EdDSA, the only algorithm of our keys; `b64` is false; `crit` is exactly ["b64"]
- `kid` names a known key that is not revoked
- `top` is the topic the message came on
- the signature fits the exact bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature

from agent.errors import Refused
from agent.strict_json import check_keys
from agent.wire.keys import PublicKey, SigningKey, b64url, unb64url

MAX_TOKEN = 2048


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    alg: Literal["EdDSA"]
    b64: bool
    crit: list[str]
    kid: str
    top: str


class Signer(msgspec.Struct, frozen=True):
    """Who a key belongs to. `owner` is a device id, or a role such as `collector`."""

    owner: str
    key: PublicKey
    revoked: bool = False


S = TypeVar("S", bound=Signer)


def sign(key: SigningKey, topic: str, payload: bytes) -> str:
    """The token for user property `jws`."""
    head = _protected(key.public.kid, topic)
    return f"{head}..{b64url(key.sign(head.encode() + b'.' + payload))}"


def verify(tokens: Sequence[str], topic: str, payload: bytes, find: Callable[[str], S | None]) -> S:
    """The signer of `payload`; `find` maps a kid to a known signer. Raises Refused with the rule that failed."""
    header, protected, signature = _split(tokens)
    signer = find(header.kid)
    if signer is None:
        raise Refused("unknown key", f"kid {header.kid[:64]!r}")
    if signer.revoked:
        raise Refused("revoked key", f"kid {header.kid} of {signer.owner}")
    if header.top != topic:
        raise Refused("other topic", f"signed for {header.top[:120]!r}, came on {topic!r}")
    try:
        signer.key.verify(signature, protected.encode() + b"." + payload)
    except InvalidSignature:
        raise Refused("bad signature", f"kid {header.kid} of {signer.owner}") from None
    return signer


def claimed_kid(token: str) -> str:
    """The kid a token names, unverified: to tell a person whose key to ask for. Raises Refused."""
    return _split([token])[0].kid


def _split(tokens: Sequence[str]) -> tuple[Header, str, bytes]:
    if len(tokens) != 1:
        raise Refused("unsigned" if not tokens else "several signatures")
    parts = tokens[0].split(".") if len(tokens[0]) <= MAX_TOKEN else []
    if len(parts) != 3 or parts[1]:
        raise Refused("malformed signature", "not a detached compact JWS")
    try:
        header = _header(parts[0])
        signature = unb64url(parts[2])
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise Refused("malformed signature", str(error)[:120]) from None
    return header, parts[0], signature


@lru_cache(maxsize=1024)
def _header(text: str) -> Header:
    """A signer's header is the same for all messages of a topic."""
    data = unb64url(text)
    header = msgspec.json.decode(data, type=Header)
    check_keys(data)
    if header.b64 or header.crit != ["b64"]:
        raise ValueError('b64 must be false and crit ["b64"]')
    return header


@lru_cache(maxsize=256)
def _protected(kid: str, topic: str) -> str:
    return b64url(msgspec.json.encode(Header("EdDSA", False, ["b64"], kid, topic)))
