"""Key rotation: the `audit` message "key rotated", signed by the old key, with a proof of possession by the new key.

The new key signs a statement with a prefix that no other signature has. A device therefore cannot claim a key it does
not hold. The statement contains the message's place in the log: the old key stays valid up to that seq, and only the
new key above it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature

from outstation.foundation.errors import MessageRefused
from outstation.protocol.wire.keys import PublicKey, SigningKey, b64url_decode, b64url_encode, parse_public_key
from outstation.protocol.wire.messages import AuditPayload
from outstation.protocol.wire.verification import VerifiedMessage

ROTATION_EVENT = "key rotated"
_DOMAIN = "outstation key rotation v1"


class KeyRotation(msgspec.Struct, frozen=True):
    """A rotation in `log` of `device`: `old_kid` signs up to `seq`, and `new_key` above it."""

    device: str
    log: str
    seq: int
    old_kid: str
    new_key: PublicKey


def build_evidence(fleet: str, device: str, log: str, seq: int, old: PublicKey, new: SigningKey) -> dict[str, Any]:
    """Build the `evidence` of the rotation message that will be `seq` of `log`."""
    proof = new.sign(_statement(fleet, device, log, seq, old.kid, new.public))
    return {"old": old.kid, "key": new.public.text, "proof": b64url_encode(proof)}


def is_rotation_message(message: VerifiedMessage) -> bool:
    """Return True if the message claims to be a rotation; its proof is not checked."""
    return isinstance(message.body, AuditPayload) and message.body.event == ROTATION_EVENT


def parse_rotation(message: VerifiedMessage) -> KeyRotation | None:
    """Parse the rotation in a verified message; None for any other. Raises MessageRefused if its proof fails."""
    body = message.body
    if not isinstance(body, AuditPayload) or not is_rotation_message(message):
        return None
    old, text, proof = (body.evidence.get(name) for name in ("old", "key", "proof"))
    if old != message.signer.key.kid:
        raise MessageRefused("rotation", "its old key is not the key that signed it")
    try:
        new = parse_public_key(str(text))
        new.verify(
            b64url_decode(str(proof)), _statement(message.topic.fleet, body.device, body.log, body.seq, old, new)
        )
    except (ValueError, InvalidSignature) as error:
        reason = str(error) or "its signature does not fit"
        raise MessageRefused("rotation", f"the proof of the new key fails: {reason}") from None
    if new.kid == old:
        raise MessageRefused("rotation", "the new key is the old one")
    return KeyRotation(body.device, body.log, body.seq, old, new)


def _statement(fleet: str, device: str, log: str, seq: int, old_kid: str, new: PublicKey) -> bytes:
    # No part can contain a line break: names, a UUID, a number, and canonical base64url.
    return "\n".join((_DOMAIN, fleet, device, log, str(seq), old_kid, new.text)).encode()
