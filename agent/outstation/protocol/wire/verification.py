"""Verification of a received message.

Rules of `verify_message`, in this order:
- the topic is in the topic tree, and the payload is at most `MAX_PAYLOAD` bytes
- the signature verifies (see `jws`)
- the payload is a JSON object of version 1 in which no object has a key twice
- its `kind`, `device` and `task` are those of the topic, and the key belongs to that device
- every time is one of the calendar, and every number is finite and fits into 64 bits
- a logged kind carries `log`, `seq` ≥ 1 and `prev`; rows, counts and columns agree with each other
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import MessageRefused
from outstation.foundation.strict_json import DuplicateKey, check_strict_json
from outstation.protocol.wire import jws, topics
from outstation.protocol.wire.jws import MAX_PAYLOAD, Signer
from outstation.protocol.wire.messages import Body, DesiredPayload

# Fewer digits fit into 64 bits. Two passes in C cost less than a look at each number.
_LONG_NUMBER = b"0" * 19
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")


class VerifiedMessage(msgspec.Struct, frozen=True):
    """A message that passed verification: topic, exact payload bytes, signature, parsed payload and signer."""

    topic: topics.Topic
    payload: bytes
    jws: str
    body: Body
    signer: Signer


def verify_message(
    topic_text: str, payload: bytes, tokens: Sequence[str], find_signer: Callable[[str], Signer | None]
) -> VerifiedMessage:
    """Verify, then parse. Raises MessageRefused that names the failed rule, and no other exception."""
    topic = topics.parse(topic_text)
    if len(payload) > MAX_PAYLOAD:
        raise MessageRefused("too large", f"{len(payload)} bytes, the limit is {MAX_PAYLOAD}")
    signer = jws.verify(tokens, topic_text, payload, find_signer)
    body = decode(payload)
    if body.__struct_config__.tag != topic.kind:
        raise MessageRefused("other kind", f"payload is {body.__struct_config__.tag}, topic is {topic.kind}")
    if body.device != topic.device:
        raise MessageRefused("other device", f"payload names {body.device!r}, topic {topic.device!r}")
    owner = signer.owner if topics.KINDS[topic.kind].to_device else topic.device
    if signer.owner != owner:
        raise MessageRefused("other device", f"key of {signer.owner!r} on a topic of {topic.device!r}")
    task = body.group if isinstance(body, DesiredPayload) else getattr(body, "task", None)
    if task != (None if topic.task == topics.DEVICE_ALERTS else topic.task):
        raise MessageRefused("other task", f"payload names {task!r}, topic {topic.task!r}")
    return VerifiedMessage(topic, payload, tokens[0], body, signer)


def decode(payload: bytes) -> Body:
    """Parse a payload. Raises MessageRefused."""
    try:
        body: Body = decoders.from_json(payload, Body)
        check_strict_json(payload)
        if _LONG_NUMBER in payload.translate(_DIGITS_TO_ZERO):
            _require_64_bit_numbers(msgspec.json.decode(payload))
        return body
    except DuplicateKey as error:
        raise MessageRefused("duplicate key", str(error)) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        text = str(error)
        # The place is at the end, behind a pattern that may be long.
        raise MessageRefused(
            "malformed payload", text if len(text) <= 200 else f"{text[:100]} … {text[-97:]}"
        ) from None


def _require_64_bit_numbers(value: Any) -> None:
    """Check the numbers of members without a declared type. Raises ValueError."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a number does not fit into 64 bits")
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        for item in value:
            _require_64_bit_numbers(item)
