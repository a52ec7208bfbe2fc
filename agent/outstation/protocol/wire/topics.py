"""Topic tree `outstation/<fleet>/<device>/<kind>[/<task>]` and the table of message kinds.

The table is the only declaration of a kind's direction and delivery. Its payload is the struct of `messages` with the
same tag; the broker's access list, the collector's subscriptions and the eviction order follow from the table.
"""

from __future__ import annotations

from functools import lru_cache

import msgspec

from outstation.foundation.errors import MessageRefused
from outstation.foundation.names import is_name

ROOT = "outstation"

# In place of a task: alerts that belong to no task. In place of a device: the whole fleet, or a group of it, whose name
# then stands in place of the task.
DEVICE_ALERTS = "_device"
ALL_DEVICES = "_all"
DEVICE_GROUP = "_group"


class MessageKind(msgspec.Struct, frozen=True):
    """A kind of message, named as in its topic and its payload.

    A logged kind is numbered and chained in the device's log; any other is live. `eviction_rank` orders the logged
    kinds by importance: a full device gives up the lowest first.
    """

    name: str
    to_device: bool = False
    per_task: bool = False
    retained: bool = False
    eviction_rank: int | None = None

    @property
    def logged(self) -> bool:
        return self.eviction_rank is not None


KINDS = {
    kind.name: kind
    for kind in (
        MessageKind("results", per_task=True, eviction_rank=1),
        MessageKind("drift", per_task=True, eviction_rank=2),
        MessageKind("quality", per_task=True, eviction_rank=2),
        MessageKind("shadow", per_task=True, eviction_rank=0),
        MessageKind("samples", per_task=True, eviction_rank=0),
        MessageKind("alerts", per_task=True, eviction_rank=3),
        MessageKind("health", eviction_rank=1),
        MessageKind("audit", eviction_rank=4),
        MessageKind("state", retained=True),
        MessageKind("keys", retained=True),
        MessageKind("reply"),
        MessageKind("ack", to_device=True, retained=True),
        MessageKind("cmd", to_device=True),
        MessageKind("desired", to_device=True, retained=True),
    )
}


class Topic(msgspec.Struct, frozen=True):
    """One topic; `task` is set for the kinds that belong to a task."""

    fleet: str
    device: str
    kind: str
    task: str | None = None

    def __str__(self) -> str:
        base = f"{ROOT}/{self.fleet}/{self.device}/{self.kind}"
        return f"{base}/{self.task}" if self.task else base


@lru_cache(maxsize=1024)
def parse(text: str) -> Topic:
    """Return the parts of a topic. Raises MessageRefused for one outside the tree."""
    parts = text.split("/")
    if len(parts) not in (4, 5) or parts[0] != ROOT or not is_name(parts[1]):
        raise MessageRefused("topic", f"{text[:120]!r} is not {ROOT}/<fleet>/<device>/<kind>[/<task>]")
    device, kind, task = parts[2], parts[3], parts[4] if len(parts) == 5 else None
    if kind not in KINDS:
        raise MessageRefused("topic", f"unknown kind {kind[:40]!r}")
    if not is_name(device) and (device not in (ALL_DEVICES, DEVICE_GROUP) or kind != "desired"):
        raise MessageRefused("topic", f"{device[:80]!r} cannot name a device")
    if (KINDS[kind].per_task or device == DEVICE_GROUP) != (task is not None):
        raise MessageRefused("topic", f"{text[:120]!r}: {kind} {'takes no' if task else 'needs a'} task")
    if task is not None and not is_name(task) and (kind, task) != ("alerts", DEVICE_ALERTS):
        raise MessageRefused("topic", f"{task[:80]!r} cannot name a task of {kind}")
    return Topic(parts[1], device, kind, task)


def topic_matches(topic_filter: str, topic: str) -> bool:
    """Return True if an MQTT topic filter matches a topic (MQTT 5, section 4.7)."""
    levels, topic_levels = topic_filter.split("/"), topic.split("/")
    for i, level in enumerate(levels):
        if level == "#":
            return True
        if i >= len(topic_levels) or level not in ("+", topic_levels[i]):
            return False
    return len(levels) == len(topic_levels)


def cloudevent_properties(topic: Topic, event_id: str, time: str) -> tuple[tuple[str, str], ...]:
    """Return the CloudEvents 1.0 attributes of binary mode, as MQTT user properties."""
    return (
        ("specversion", "1.0"),
        ("id", event_id),
        ("source", f"{ROOT}/{topic.fleet}/{topic.device}"),
        ("type", f"outstation.{topic.kind}.v1"),
        ("time", time),
    )
