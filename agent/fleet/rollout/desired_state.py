"""What is desired of devices, as the one signed message of each topic; merged from all roll-outs that end there."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from agent.errors import MessageRefused, UsageError
from agent.wire import jws, topics
from agent.wire.desired_state import MAX_DESIRED_BYTES, DesiredBundle
from agent.wire.jws import Signer
from agent.wire.keys import SigningKey
from agent.wire.messages import DesiredPayload, encode, verify_message


class DesiredMessage(msgspec.Struct, frozen=True):
    """A row of table desired."""

    topic: str
    counter: int
    payload: bytes
    jws: str


def verify(row: DesiredMessage, find_signer: Callable[[str], Signer | None]) -> DesiredPayload:
    """What a row says, once it verified. Raises Refused."""
    body = verify_message(row.topic, row.payload, [row.jws], find_signer).body
    if not isinstance(body, DesiredPayload):
        raise MessageRefused("other kind", "this is no desired state")
    if body.counter != row.counter:
        raise MessageRefused("other counter", f"stored with {row.counter}, signed {body.counter}")
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
    """All that is desired on a topic, with `wanted` for `task`. Raises UsageError where it cannot be added to."""
    tasks: dict[str, DesiredBundle] = {}
    if current is not None:
        try:
            tasks = verify(current, {key.public.kid: Signer("operator", key.public)}.get).tasks
        except MessageRefused as refused:
            raise UsageError(
                f"table desired: what is desired on {topic} does not verify ({refused}), so nothing is added to it and "
                "signed again; `outstation fleet audit` says what was changed; restore the database from before that"
            ) from None
        if counter <= current.counter:
            raise UsageError(f"counter {counter} is not above {current.counter}, which {topic} has; set the clock")
    group = {"group": topic.task} if topic.device == topics.DEVICE_GROUP else {}
    head = {"v": 1, "kind": "desired", "device": topic.device, **group, "counter": counter, "issued": issued}
    payload = encode({**head, "tasks": msgspec.to_builtins({**tasks, task: desired})})
    if len(payload) > MAX_DESIRED_BYTES:
        raise UsageError(f"{topic}: too many tasks are desired there; a device reads {MAX_DESIRED_BYTES} bytes")
    return DesiredMessage(str(topic), counter, payload, jws.sign(key, str(topic), payload))
