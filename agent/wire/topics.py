"""The topic tree: `outstation/<fleet>/<device>/<kind>[/<task>]`."""

from __future__ import annotations

import msgspec

from agent.errors import MessageRefused
from agent.names import is_name

ROOT = "outstation"

PER_TASK = frozenset({"results", "drift", "quality", "alerts", "shadow"})
LOGGED = PER_TASK | {"health", "audit"}
UNLOGGED = frozenset({"state", "keys", "reply"})
TO_DEVICE = frozenset({"ack", "cmd", "desired"})
# Stands where a task stands for alerts that belong to none; where a device stands for all of a fleet, or for a group of
# it, whose name then stands where a task does.
DEVICE_ALERTS = "_device"
ALL_DEVICES = "_all"
DEVICE_GROUP = "_group"


class Topic(msgspec.Struct, frozen=True):
    """One topic; `task` is set for the kinds that belong to a task."""

    fleet: str
    device: str
    kind: str
    task: str | None = None

    def __str__(self) -> str:
        base = f"{ROOT}/{self.fleet}/{self.device}/{self.kind}"
        return f"{base}/{self.task}" if self.task else base


def parse(text: str) -> Topic:
    """The parts of a topic. Raises Refused for one that is not in the tree."""
    parts = text.split("/")
    if len(parts) not in (4, 5) or parts[0] != ROOT or not is_name(parts[1]):
        raise MessageRefused("topic", f"{text[:120]!r} is not {ROOT}/<fleet>/<device>/<kind>[/<task>]")
    device, kind, task = parts[2], parts[3], parts[4] if len(parts) == 5 else None
    if kind not in LOGGED | UNLOGGED | TO_DEVICE:
        raise MessageRefused("topic", f"unknown kind {kind[:40]!r}")
    if not is_name(device) and (device not in (ALL_DEVICES, DEVICE_GROUP) or kind != "desired"):
        raise MessageRefused("topic", f"{device[:80]!r} cannot name a device")
    if (kind in PER_TASK or device == DEVICE_GROUP) != (task is not None):
        raise MessageRefused("topic", f"{text[:120]!r}: {kind} {'needs' if kind in PER_TASK else 'takes no'} task")
    if task is not None and not is_name(task) and (kind, task) != ("alerts", DEVICE_ALERTS):
        raise MessageRefused("topic", f"{task[:80]!r} cannot name a task of {kind}")
    return Topic(parts[1], device, kind, task)
