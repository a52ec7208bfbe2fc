"""Putting desired state on the broker: retained, so that a device finds it whenever it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from agent import clock
from agent.errors import LinkDown
from agent.fleet.rollout.desired_state import DesiredMessage
from agent.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from agent.wire import topics
from agent.wire.messages import cloudevent_properties

PUBLISH_TIMEOUT_S = 10.0


class BrokerConnection(Protocol):
    """What this uses of a Link."""

    def send(self, message: OutgoingMessage) -> int: ...
    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]: ...


def publish(link: BrokerConnection, rows: Sequence[DesiredMessage], timeout_s: float = PUBLISH_TIMEOUT_S) -> None:
    """Until the broker has taken all of it. Raises LinkDown, also where it refuses."""
    now = clock.to_rfc3339(clock.read().wall_us)
    waiting = {link.send(_to_outgoing(row, now)): row.topic for row in rows}
    end = time.monotonic() + timeout_s
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            raise LinkDown(f"the broker did not take {', '.join(sorted(waiting.values()))} within {timeout_s:g} s")
        for event in link.receive(left):
            if not isinstance(event, PublishReceipt) or event.token not in waiting:
                continue
            topic = waiting.pop(event.token)
            if not event.is_accepted:
                raise LinkDown(
                    f"the broker refused {topic}: {event.reason}; its access list must let the operator write there "
                    "(`outstation fleet init` of this version writes one that does)"
                )


def _to_outgoing(row: DesiredMessage, now: str) -> OutgoingMessage:
    topic = topics.parse(row.topic)
    whom = f"{topic.device}/{topic.task}" if topic.task else topic.device
    event = cloudevent_properties(topic, f"{whom}/desired/{row.counter}", now)
    return OutgoingMessage(row.topic, row.payload, (("jws", row.jws), *event), retain=True)
