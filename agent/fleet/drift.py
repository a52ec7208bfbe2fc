"""Drift of the whole fleet, from the drift windows that the collector has; memory grows with devices, not windows.

- A window counts once, however often a device reports it, in whatever log.
- Windows are merged per task and shipped reference, because only these have the same bins.
- A window with a sensor fault is counted and kept out of what is merged, as devices keep it out of their own tests.
- What does not read as a drift window is counted and left out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent import clock
from agent.drift import reported
from agent.drift.reported import Reported
from agent.drift.timeline import EARLIEST_US, Timeline
from agent.fleet.history import History
from agent.fleet.merge import Merged
from agent.fleet.moved import Episode, Episodes, in_order
from agent.fleet.standing import StandsOut, standing_out
from agent.fleet.store import FleetStore

# A clock that is a day ahead of ours is wrong.
_AHEAD_US = 86_400_000_000


@dataclass(slots=True)
class OfDevice:
    """A device's windows under one reference. `accuracy`: the sum of so many `estimates`."""

    episodes: Episodes
    windows: int = 0
    faulty: int = 0
    fields: dict[str, Merged] = field(default_factory=dict)
    accuracy: float = 0.0
    estimates: int = 0
    last: Reported | None = None


@dataclass(slots=True)
class Group:
    """All windows of a task under one shipped reference. `apart`: most devices of the task have another one."""

    task: str
    shipped: str
    apart: bool = False
    devices: dict[str, OfDevice] = field(default_factory=dict)
    history: History = field(default_factory=History)
    undated: int = 0

    @property
    def windows(self) -> int:
        return sum(device.windows for device in self.devices.values())

    @property
    def faulty(self) -> int:
        return sum(device.faulty for device in self.devices.values())

    def merged(self) -> dict[str, Merged]:
        """Each field over all devices."""
        found: dict[str, Merged] = {}
        for device in self.devices.values():
            for name, part in device.fields.items():
                found[name] = found[name] + part if name in found else part
        return found

    def standing_out(self) -> list[StandsOut]:
        return standing_out({name: device.fields for name, device in self.devices.items()})

    def moved(self) -> list[Episode]:
        """The last drift of each field of each device: what goes on first, by when it began."""
        return in_order([e for device in self.devices.values() for e in device.episodes.last.values()])

    def estimate(self) -> float | None:
        """Mean expected accuracy of all windows that have one."""
        count = sum(device.estimates for device in self.devices.values())
        return sum(device.accuracy for device in self.devices.values()) / count if count else None


@dataclass(slots=True)
class Survey:
    """`repeated`: windows that came again; `unreadable`: what is no drift window, or has other bins than its group."""

    groups: list[Group] = field(default_factory=list)
    repeated: int = 0
    unreadable: int = 0


def survey(
    store: FleetStore,
    *,
    task: str | None = None,
    since: str | None = None,
    now_us: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Of every window that ended at `since` (RFC 3339) or later."""
    found = Survey()
    groups: dict[tuple[str, str], Group] = {}
    for row in _once(store.drift_windows(task=task, since=since), found, advance):
        try:
            shipped, window = _read(row)
            group = groups.setdefault((row["task"], shipped), Group(row["task"], shipped))
            bins = _bins(group)
            if bins and {name: len(f.counts) for name, f in window.fields.items()} != bins:
                raise ValueError("other fields or bins under the same reference")
        except ValueError:
            found.unreadable += 1
            continue
        _add(group, row["device"], window, now_us)
    found.groups = _sorted([group for group in groups.values() if group.devices])
    return found


def course(store: FleetStore, group: Group, device: str, *, since: str | None = None, now_us: int) -> Timeline:
    """How it went at one device of the group; windows of a wrong clock are left out, unless there are no others."""
    dated, undated = Timeline(), Timeline()
    for row in _once(store.drift_windows(task=group.task, device=device, since=since), Survey(), lambda _: None):
        try:
            shipped, window = _read(row)
        except ValueError:
            continue
        if shipped == group.shipped:
            (dated if _believable(window, now_us) else undated).add(window)
    return dated if dated.points else undated


def _believable(window: Reported, now_us: int) -> bool:
    return window.t[0] >= EARLIEST_US and window.t[1] <= now_us + _AHEAD_US


def _once(rows: Iterator[dict[str, Any]], found: Survey, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Rows without those that say the same window again; these lie beside each other."""
    before = None
    for row in rows:
        advance(1)
        key = tuple(row[name] for name in ("task", "device", "from", "to", "first", "last", "reference"))
        if key == before:
            found.repeated += 1
            continue
        before = key
        yield row


def _read(row: dict[str, Any]) -> tuple[str, Reported]:
    """The digest of the shipped reference, and the window. Raises ValueError."""
    shipped = json.loads(row["reference"]).get("shipped")
    if not isinstance(shipped, str):
        raise ValueError("no shipped reference")
    t = (clock.epoch_us(row["from"]), clock.epoch_us(row["to"]))
    members = (row[name] or "null" for name in ("features", "output", "joint", "estimate"))
    return shipped, reported.read(t, row["state"], *members)


def _bins(group: Group) -> dict[str, int]:
    for device in group.devices.values():
        for_fields = device.last.fields if device.last else {}
        return {name: len(f.counts) for name, f in for_fields.items()}
    return {}


def _add(group: Group, name: str, window: Reported, now_us: int) -> None:
    device = group.devices.setdefault(name, OfDevice(Episodes(name)))
    device.windows += 1
    device.last = window
    device.episodes.add(window)
    if _believable(window, now_us):
        group.history.add(name, window)
    else:
        group.undated += 1
    if window.state == "fault":
        device.faulty += 1
        return
    for subject, told in window.fields.items():
        part = Merged.of(told)
        device.fields[subject] = device.fields[subject] + part if subject in device.fields else part
    if window.accuracy is not None:
        device.accuracy += window.accuracy[0]
        device.estimates += 1


def _sorted(groups: list[Group]) -> list[Group]:
    """By task; first the reference that most devices have, the others apart."""
    groups.sort(key=lambda g: (g.task, -len(g.devices), -g.windows, g.shipped))
    for before, group in itertools.pairwise(groups):
        group.apart = before.task == group.task
    return groups
