"""Putting desired state on the broker: retained, so that a device finds it whenever it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from agent import clock
from agent.errors import LinkDown
from agent.fleet.rollout.desired_state import Published
from agent.transport.packets import Delivery, Outgoing, Receipt
from agent.wire import topics
from agent.wire.messages import cloud_event

WAIT_S = 10.0


class Connection(Protocol):
    """What this uses of a Link."""

    def send(self, message: Outgoing) -> int: ...
    def receive(self, timeout_s: float) -> list[Delivery | Receipt]: ...


def publish(link: Connection, rows: Sequence[Published], wait_s: float = WAIT_S) -> None:
    """Until the broker has taken all of it. Raises LinkDown, also where it refuses."""
    now = clock.rfc3339(clock.read().wall_us)
    waiting = {link.send(_outgoing(row, now)): row.topic for row in rows}
    end = time.monotonic() + wait_s
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            raise LinkDown(f"the broker did not take {', '.join(sorted(waiting.values()))} within {wait_s:g} s")
        for event in link.receive(left):
            if not isinstance(event, Receipt) or event.token not in waiting:
                continue
            topic = waiting.pop(event.token)
            if not event.taken:
                raise LinkDown(
                    f"the broker refused {topic}: {event.reason}; its access list must let the operator write there "
                    "(`outstation fleet init` of this version writes one that does)"
                )


def _outgoing(row: Published, now: str) -> Outgoing:
    topic = topics.parse(row.topic)
    whom = f"{topic.device}/{topic.task}" if topic.task else topic.device
    event = cloud_event(topic, f"{whom}/desired/{row.counter}", now)
    return Outgoing(row.topic, row.payload, (("jws", row.jws), *event), retain=True)
