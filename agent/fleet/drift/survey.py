"""Drift of the whole fleet, from the drift windows that the collector has; memory grows with devices, not windows.

- A window counts once, however often a device reports it, in whatever log, against whatever reference of its site.
- Windows are merged per task, shipped reference and layout (fields, and bins of each), because only these add up. A
  device that has another reference or layout than most is shown apart.
- A window with a sensor fault is counted and kept out of what is merged, as devices keep it out of their own tests.
- What does not read as a drift window is counted and left out.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from agent import clock
from agent.drift.reporting import parsed_message
from agent.drift.reporting.parsed_message import Reported
from agent.drift.reporting.timeline import EARLIEST_US, Timeline
from agent.fleet.database.store import FleetStore
from agent.fleet.drift import fleet_wide as wide
from agent.fleet.drift.fleet_wide import Onset, Watched, Wide
from agent.fleet.drift.history import History
from agent.fleet.drift.merge import Merged
from agent.fleet.drift.onset import Episode, Episodes, in_order
from agent.fleet.drift.outliers import NOT_KNOWN, StandsOut, standing_out

# One device cannot make us hold a group for each of its windows: two bundles and a few mistakes are all there is.
MOST_GROUPS = 4
RECENT = 6  # windows of each device that say how it is now
# A clock that is a day ahead of ours is wrong.
_AHEAD_US = 86_400_000_000


class OfDevice(msgspec.Struct):
    """A device's windows under one reference. `accuracy`: the sum of so many `estimates`."""

    episodes: Episodes
    windows: int = 0
    faulty: int = 0
    fields: dict[str, Merged] = msgspec.field(default_factory=dict)
    accuracy: float = 0.0
    estimates: int = 0
    last: Reported | None = None
    watched: Watched | None = None
    recent: deque[dict[str, Merged]] = msgspec.field(default_factory=lambda: deque(maxlen=RECENT))

    def now(self) -> dict[str, Merged]:
        """Each field over the last few windows without a fault."""
        return _sum(self.recent)

    def onsets(self) -> list[Onset]:
        return [
            Onset(e.device, subject, e.alarmed, e.ended is None, self.episodes.alarms[subject] - 1)
            for subject, e in self.episodes.last.items()
        ]


Layout = frozenset[tuple[str, int]]  # fields and how many bins each has


class Group(msgspec.Struct):
    """All windows of a task under one shipped reference and layout.

    `apart`: in what most devices of the task have another one, "reference" or "layout".
    """

    task: str
    shipped: str
    layout: Layout
    apart: str | None = None
    devices: dict[str, OfDevice] = msgspec.field(default_factory=dict)
    history: History = msgspec.field(default_factory=History)
    undated: int = 0

    @property
    def windows(self) -> int:
        return sum(device.windows for device in self.devices.values())

    @property
    def faulty(self) -> int:
        return sum(device.faulty for device in self.devices.values())

    def merged(self) -> dict[str, Merged]:
        """Each field over all devices."""
        return _sum(device.fields for device in self.devices.values())

    def now(self) -> dict[str, Merged]:
        """Each field over the last few windows of all devices."""
        return _sum(device.now() for device in self.devices.values())

    def wide(self) -> list[Wide]:
        """Fields that moved on much of the fleet at once."""
        watched = {name: one.watched for name, one in self.devices.items() if one.watched is not None}
        return wide.find(watched, [onset for one in self.devices.values() for onset in one.onsets()])

    def standing_out(self, usual_sd: Mapping[str, float] = NOT_KNOWN) -> list[StandsOut]:
        """`usual_sd`: of the shipped reference's rows, by field, where it is known here."""
        return standing_out({name: device.fields for name, device in self.devices.items()}, usual_sd)

    def moved(self) -> list[Episode]:
        """The last drift of each field of each device: what goes on first, by when it began."""
        return in_order([e for device in self.devices.values() for e in device.episodes.last.values()])

    def estimate(self) -> float | None:
        """Mean expected accuracy of all windows that have one."""
        count = sum(device.estimates for device in self.devices.values())
        return sum(device.accuracy for device in self.devices.values()) / count if count else None


class Survey(msgspec.Struct):
    """`repeated`: windows that came again; `unreadable`: no drift windows, or of a device's fifth group and on."""

    groups: list[Group] = msgspec.field(default_factory=list)
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
    groups: dict[tuple[str, str, Layout], Group] = {}
    of_device: dict[tuple[str, str], set[tuple[str, str, Layout]]] = {}
    for row, shipped in _once(store.drift_windows(task=task, since=since), found, advance):
        window = _read(row)
        if window is None:
            found.unreadable += 1
            continue
        key = (row["task"], shipped, _layout(window))
        its = of_device.setdefault((row["task"], row["device"]), set())
        if key not in its and len(its) == MOST_GROUPS:
            found.unreadable += 1
            continue
        its.add(key)
        _add(groups.setdefault(key, Group(*key)), row["device"], window, now_us)
    found.groups = _sorted(list(groups.values()))
    return found


def course(store: FleetStore, group: Group, device: str, *, since: str | None = None, now_us: int) -> Timeline:
    """How it went at one device of the group; windows of a wrong clock are left out, unless there are no others."""
    dated, undated = Timeline(), Timeline()
    windows = store.drift_windows(task=group.task, device=device, since=since)
    for row, shipped in _once(windows, Survey(), lambda _: None):
        window = _read(row) if shipped == group.shipped else None
        if window is not None and _layout(window) == group.layout:
            (dated if _believable(window, now_us) else undated).add(window)
    return dated if dated.points else undated


def _believable(window: Reported, now_us: int) -> bool:
    return window.t[0] >= EARLIEST_US and window.t[1] <= now_us + _AHEAD_US


def _once(
    rows: Iterator[dict[str, Any]], found: Survey, advance: Callable[[int], None]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with the digest of their shipped reference, without those that say the same window again.

    These lie beside each other, with those under other references among them.
    """
    place: tuple[Any, ...] = ()
    seen: set[str] = set()
    for row in rows:
        advance(1)
        now_at = tuple(row[name] for name in ("task", "device", "from", "to", "first", "last"))
        if now_at != place:
            place, seen = now_at, set()
        shipped = _shipped(row["reference"])
        if shipped is None:
            found.unreadable += 1
        elif shipped in seen:
            found.repeated += 1
        else:
            seen.add(shipped)
            yield row, shipped


def _layout(window: Reported) -> Layout:
    return frozenset((name, len(told.counts)) for name, told in window.fields.items())


def _shipped(reference: str) -> str | None:
    try:
        shipped = json.loads(reference).get("shipped")
    except (ValueError, AttributeError):
        return None
    return shipped if isinstance(shipped, str) else None


def _read(row: dict[str, Any]) -> Reported | None:
    try:
        t = (clock.epoch_us(row["from"]), clock.epoch_us(row["to"]))
        members = (row[name] or "null" for name in ("features", "output", "joint", "estimate"))
        return parsed_message.read(t, row["state"], *members)
    except ValueError:
        return None


def _add(group: Group, name: str, window: Reported, now_us: int) -> None:
    device = group.devices.setdefault(name, OfDevice(Episodes(name)))
    device.windows += 1
    device.last = window
    device.episodes.add(window)
    if _believable(window, now_us):
        group.history.add(name, window)
        if window.state in ("ok", "drift"):
            device.watched = device.watched.with_window(window.t) if device.watched else Watched(*window.t)
    else:
        group.undated += 1
    if window.state == "fault":
        device.faulty += 1
        return
    parts = {subject: Merged.of(told) for subject, told in window.fields.items()}
    device.recent.append(parts)
    device.fields = _sum((device.fields, parts))
    if window.accuracy is not None:
        device.accuracy += window.accuracy[0]
        device.estimates += 1


def _sum(many: Iterable[Mapping[str, Merged]]) -> dict[str, Merged]:
    found: dict[str, Merged] = {}
    for parts in many:
        for name, part in parts.items():
            found[name] = found[name] + part if name in found else part
    return found


def _sorted(groups: list[Group]) -> list[Group]:
    """By task; first the reference and layout that most devices have, the others apart."""
    groups.sort(key=lambda g: (g.task, -len(g.devices), -g.windows, g.shipped, sorted(g.layout)))
    for _, of_task in itertools.groupby(groups, key=lambda g: g.task):
        common, *others = of_task
        for group in others:
            group.apart = "reference" if group.shipped != common.shipped else "layout"
    return groups
