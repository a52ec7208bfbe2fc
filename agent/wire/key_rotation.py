"""A device's change of its signing key: the `audit` message "key rotated", signed by the old key and proved by the new.

The old key says who the next one is, and the new key signs a statement that nothing else we sign can pass for, so
that no device can name a key as its own which it does not hold. The message's place in the log is in the statement:
above that seq the old key counts no more, up to it the old key counts for ever.
"""

from __future__ import annotations

from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature

from agent.errors import MessageRefused
from agent.wire.keys import PublicKey, SigningKey, b64url_decode, b64url_encode, parse_public_key
from agent.wire.messages import AuditPayload, VerifiedMessage

ROTATION_EVENT = "key rotated"
_DOMAIN = "outstation key rotation v1"


class KeyRotation(msgspec.Struct, frozen=True):
    """In `log` of `device`, `old` (a kid) signs up to `seq`, and `new` from there on."""

    device: str
    log: str
    seq: int
    old_kid: str
    new_key: PublicKey


def build_evidence(
    fleet: str, device: str, log: str, seq: int, old_key: PublicKey, new_key: SigningKey
) -> dict[str, Any]:
    """The `evidence` of the message that will be `seq` of `log`."""
    proof = new_key.sign(_statement(fleet, device, log, seq, old_key.kid, new_key.public))
    return {"old": old_key.kid, "key": new_key.public.text, "proof": b64url_encode(proof)}


def is_rotation_message(message: VerifiedMessage) -> bool:
    """Whether it means to be one; its proof may fail."""
    return isinstance(message.body, AuditPayload) and message.body.event == ROTATION_EVENT


def parse_rotation(message: VerifiedMessage) -> KeyRotation | None:
    """What a verified message says about keys; None for every other message. Raises Refused where its proof fails."""
    body = message.body
    if not isinstance(body, AuditPayload) or not is_rotation_message(message):
        return None
    old, text, proof = (body.evidence.get(name) for name in ("old", "key", "proof"))
    if old != message.signer.key.kid:
        raise MessageRefused("rotation", "it names another old key than the one that signed it")
    try:
        new = parse_public_key(str(text))
        new.verify(
            b64url_decode(str(proof)), _statement(message.topic.fleet, body.device, body.log, body.seq, old, new)
        )
    except (ValueError, InvalidSignature) as error:
        why = str(error) or "its signature does not fit"
        raise MessageRefused("rotation", f"the new key does not prove itself: {why}") from None
    if new.kid == old:
        raise MessageRefused("rotation", "the new key is the old one")
    return KeyRotation(body.device, body.log, body.seq, old, new)


def _statement(fleet: str, device: str, log: str, seq: int, old_kid: str, new: PublicKey) -> bytes:
    # None of these can hold a line break: names, a UUID, a number, a kid and a key that have canonical spellings.
    return "\n".join((_DOMAIN, fleet, device, log, str(seq), old_kid, new.text)).encode()
