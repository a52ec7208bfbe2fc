"""Log head: a device's signed statement of where its log ends, for an auditor who does not trust the operator.

The digest of the newest message commits to all messages before it. A holder of a head can tell later whether the
operator shows the same log. The device's key signs it with a domain that no message has.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from outstation.foundation import decoders
from outstation.foundation.clock import ClockQuality
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import check_strict_json
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import PublicKey, SigningKey, parse_public_key
from outstation.protocol.wire.messages import AcknowledgementRef, Natural, ShortText, Uuid
from outstation.protocol.wire.times import Rfc3339

_SIGNATURE_DOMAIN = "log head"
MAX_BYTES = 16 << 10


class LogHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`seq` and `digest` of the newest message, 0 and "" in a new log; `key`: the device's public key."""

    v: Literal[1] = 1
    kind: Literal["head"] = "head"
    fleet: ShortText
    device: ShortText
    log: Uuid
    seq: Natural
    digest: Annotated[str, msgspec.Meta(max_length=64)]
    time: Rfc3339
    clock: ClockQuality
    key: ShortText
    acknowledged: AcknowledgementRef | None = None


class SignedHead(msgspec.Struct, frozen=True):
    """File of a head. Members other than these are for readers and not verified."""

    payload: str
    jws: Annotated[str, msgspec.Meta(max_length=jws.MAX_TOKEN)]


class VerifiedHead(msgspec.Struct, frozen=True):
    head: LogHead
    key: PublicKey


def sign(head: LogHead, key: SigningKey) -> SignedHead:
    payload = msgspec.json.encode(head)
    return SignedHead(payload.decode(), jws.sign(key, _SIGNATURE_DOMAIN, payload))


def verify(data: bytes) -> VerifiedHead:
    """Verify the content of a file against the key in it; the caller decides whose key it is. Raises MessageRefused."""
    if len(data) > MAX_BYTES:
        raise MessageRefused("too large", f"the limit is {MAX_BYTES} bytes")
    try:
        signed = decoders.from_json(data, SignedHead)
        payload = signed.payload.encode()
        head = decoders.from_json(payload, LogHead)
        check_strict_json(payload)
        key = parse_public_key(head.key)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise MessageRefused("malformed head", str(error)[:200]) from None
    signer = Signer(head.device, key)
    jws.verify([signed.jws], _SIGNATURE_DOMAIN, payload, lambda kid: signer if kid == key.kid else None)
    return VerifiedHead(head, key)
