"""Desired state messages: one signed message per topic, merged from all roll-outs that end there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from outstation.foundation.errors import MessageRefused, UsageError
from outstation.protocol.wire import jws, topics
from outstation.protocol.wire.desired_state import MAX_DESIRED_BYTES, DesiredBundle
from outstation.protocol.wire.jws import Signer, encode
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.messages import DesiredPayload
from outstation.protocol.wire.verification import verify_message


class DesiredMessage(msgspec.Struct, frozen=True):
    """A row of table desired."""

    topic: str
    counter: int
    payload: bytes
    jws: str


def verify(row: DesiredMessage, find_signer: Callable[[str], Signer | None]) -> DesiredPayload:
    """Return the verified payload of a row. Raises MessageRefused."""
    if not (isinstance(row.topic, str) and isinstance(row.payload, bytes) and isinstance(row.jws, str)):
        raise MessageRefused("damaged row", "topic, payload or jws is not stored as text and bytes")
    body = verify_message(row.topic, row.payload, [row.jws], find_signer).body
    if not isinstance(body, DesiredPayload):
        raise MessageRefused("other kind", "this is not a desired state message")
    if body.counter != row.counter:
        raise MessageRefused("other counter", f"stored with {row.counter}, signed with {body.counter}")
    return body


def merge(
    current: DesiredMessage | None,
    topic: topics.Topic,
    task: str,
    desired: DesiredBundle,
    counter: int,
    issued: str,
    key: SigningKey,
) -> DesiredMessage:
    """Return the message of `topic` with `desired` set for `task`. Raises UsageError if it cannot be extended."""
    tasks: dict[str, DesiredBundle] = {}
    if current is not None:
        try:
            tasks = verify(current, {key.public.kid: Signer("operator", key.public)}.get).tasks
        except MessageRefused as refused:
            raise UsageError(
                f"table desired: the message of {topic} does not verify ({refused}), so it is not extended and signed "
                "again; `outstation fleet audit` shows what was changed; restore an earlier backup of the database"
            ) from None
        if counter <= current.counter:
            raise UsageError(f"counter {counter} is not above {current.counter}, which {topic} has; set the clock")
    group = {"group": topic.task} if topic.device == topics.DEVICE_GROUP else {}
    head = {"v": 1, "kind": "desired", "device": topic.device, **group, "counter": counter, "issued": issued}
    payload = encode({**head, "tasks": msgspec.to_builtins({**tasks, task: desired})})
    if len(payload) > MAX_DESIRED_BYTES:
        raise UsageError(
            f"{topic}: the desired state of all tasks exceeds the {MAX_DESIRED_BYTES} bytes that devices read; "
            "use fewer tasks per device"
        )
    return DesiredMessage(str(topic), counter, payload, jws.sign(key, str(topic), payload))
