"""Log head: a device's signed statement of where its log ends, for an auditor who does not trust the operator.

The digest of the newest message commits to all messages before it. A holder of a head can tell later whether the
operator shows the same log. The device's key signs it with a domain that no message has.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from outstation.foundation.clock import ClockQuality
from outstation.foundation.errors import MessageRefused
from outstation.protocol.documents.signed_document import DocumentKind, SignedDocument
from outstation.protocol.wire.jws import Signer
from outstation.protocol.wire.keys import SigningKey, parse_public_key
from outstation.protocol.wire.messages import AcknowledgementRef, Natural, ShortText, Uuid
from outstation.protocol.wire.times import Rfc3339

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


_KIND = DocumentKind(LogHead, "log head", "head")


def sign(head: LogHead, key: SigningKey) -> SignedDocument:
    return _KIND.sign_body(key, head)


def verify(data: bytes) -> tuple[LogHead, Signer]:
    """Verify the content of a file against the key in it; the caller decides whose key it is. Raises MessageRefused."""
    if len(data) > MAX_BYTES:
        raise MessageRefused("too large", f"the limit is {MAX_BYTES} bytes")
    document = _KIND.read_json(data)
    return _KIND.verify_own(document, lambda head: Signer(head.device, parse_public_key(head.key)))
