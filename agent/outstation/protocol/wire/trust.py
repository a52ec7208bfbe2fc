"""Trust document: the keys of operators and collectors with their roles, in the repository's root metadata.

It is the member `outstation` of a TUF root, so a threshold of the root keys signs it, its version is the root's, and a
root that follows replaces it. Devices get roots from the repository, and from the retained message of `topic_for`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire import topics
from outstation.protocol.wire.keys import EncryptionKey, PublicKey, parse_encryption_key, parse_public_key
from outstation.protocol.wire.root_metadata import MAX_ROOT_BYTES, RootMetadata

KIND = "trust"
# Devices reject a larger message unread.
MAX_TRUST_BYTES = 262_144
MAX_ROOTS = 64
MAX_KEYS = 64

OPERATOR, DEPLOYER, REPORTER, COLLECTOR = "operator", "deployer", "reporter", "collector"
COMMANDING_ROLES = (OPERATOR, DEPLOYER, REPORTER)
ROLES = (*COMMANDING_ROLES, COLLECTOR)
# The collector's X25519 key that messages are sealed to, see `outstation.protocol.transport.sealing`. The last one
# listed counts.
ENCRYPTION = "encryption"


class TrustedKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """A public key as base64url text and its role; an unknown role gives no rights.

    `counter` replaces this key's last counter on devices where that is too far in the future to be true.
    """

    key: Annotated[str, msgspec.Meta(max_length=64)]
    role: Annotated[str, msgspec.Meta(max_length=64)]
    counter: Annotated[int, msgspec.Meta(ge=0, le=2**53 - 1)] | None = None

    def parse(self) -> PublicKey:
        """Return the public key of any role but `ENCRYPTION`. Raises ValueError."""
        return parse_public_key(self.key)

    def parse_encryption(self) -> EncryptionKey:
        """Return the public key of role `ENCRYPTION`. Raises ValueError."""
        return parse_encryption_key(self.key)

    @property
    def kid(self) -> str:
        """Thumbprint of the key. Raises ValueError."""
        return self.parse_encryption().kid if self.role == ENCRYPTION else self.parse().kid


class Trust(msgspec.Struct, frozen=True):
    """All trusted keys. A document without an operator or without a collector would lock the fleet out."""

    keys: Annotated[list[TrustedKey], msgspec.Meta(max_length=MAX_KEYS)]

    def __post_init__(self) -> None:
        for role in (OPERATOR, COLLECTOR):
            if not any(key.role == role for key in self.keys):
                raise ValueError(f"no key has the role {role}")
        for key in self.keys:
            _ = key.kid


class TrustMessage(msgspec.Struct, frozen=True):
    """Payload of the retained message: texts of root files, oldest first. Only their own signatures count."""

    v: Literal[1]
    kind: Literal["trust"]
    roots: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=MAX_ROOT_BYTES)]], msgspec.Meta(min_length=1, max_length=MAX_ROOTS)
    ]


def topic_for(fleet: str) -> str:
    """Return the topic of the retained message, which all devices of a fleet read."""
    return str(topics.Topic(fleet, topics.ALL_DEVICES, KIND))


def read_trust(root: RootMetadata) -> Trust | None:
    """Return the trust document of a root, None if it has none. Raises MessageRefused."""
    try:
        return decoders.from_json(root.member, Trust | None)
    except (msgspec.MsgspecError, ValueError) as error:
        raise MessageRefused("malformed trust", f"root {root.version}: {str(error)[:200]}") from None


def encode_message(roots: Sequence[str]) -> bytes:
    """Return the payload with the newest of `roots` that devices accept in one message."""
    chosen: list[str] = []
    payload = b""
    for root in reversed(roots[-MAX_ROOTS:]):
        longer = msgspec.json.encode(TrustMessage(1, "trust", [root, *chosen]))
        if len(longer) > MAX_TRUST_BYTES:
            break
        chosen, payload = [root, *chosen], longer
    return payload


def decode_message(payload: bytes) -> TrustMessage:
    """Parse a payload. Raises MessageRefused."""
    if len(payload) > MAX_TRUST_BYTES:
        raise MessageRefused("too large", f"{len(payload)} bytes, the limit is {MAX_TRUST_BYTES}")
    try:
        message = decoders.from_json(payload, TrustMessage)
        check_strict_json(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MessageRefused("malformed payload", str(error)[:200]) from None
    return message
