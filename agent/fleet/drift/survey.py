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
from agent.drift.reporting.parsed_message import WindowReport
from agent.drift.reporting.timeline import EARLIEST_US, Timeline
from agent.fleet.database.store import FleetStore
from agent.fleet.drift import fleet_wide as wide
from agent.fleet.drift.fleet_wide import FleetWideDrift, ObservationPeriod, Onset
from agent.fleet.drift.history import DriftHistory
from agent.fleet.drift.merge import MergedField
from agent.fleet.drift.onset import DriftEpisode, EpisodeTracker, sort_by_onset
from agent.fleet.drift.outliers import NO_REFERENCE_SD, DeviceOutlier, find_outliers

# One device cannot make us hold a group for each of its windows: two bundles and a few mistakes are all there is.
MAX_DEVICE_GROUPS = 4
RECENT_WINDOWS = 6  # windows of each device that say how it is now
# A clock that is a day ahead of ours is wrong.
_MAX_AHEAD_US = 86_400_000_000


class DeviceDrift(msgspec.Struct):
    """A device's windows under one reference. `accuracy`: the sum of so many `estimates`."""

    episodes: EpisodeTracker
    windows: int = 0
    faulty: int = 0
    fields: dict[str, MergedField] = msgspec.field(default_factory=dict)
    accuracy_sum: float = 0.0
    estimate_count: int = 0
    last_window: WindowReport | None = None
    observed: ObservationPeriod | None = None
    recent: deque[dict[str, MergedField]] = msgspec.field(default_factory=lambda: deque(maxlen=RECENT_WINDOWS))

    def merge_recent(self) -> dict[str, MergedField]:
        """Each field over the last few windows without a fault."""
        return _merge_fields(self.recent)

    def list_onsets(self) -> list[Onset]:
        return [
            Onset(e.device, subject, e.alarmed, e.ended is None, self.episodes.alarm_counts[subject] - 1)
            for subject, e in self.episodes.last.items()
        ]


FieldLayout = frozenset[tuple[str, int]]  # fields and how many bins each has


class DriftGroup(msgspec.Struct):
    """All windows of a task under one shipped reference and layout.

    `apart`: in what most devices of the task have another one, "reference" or "layout".
    """

    task: str
    shipped_reference: str
    layout: FieldLayout
    differs_in: str | None = None
    devices: dict[str, DeviceDrift] = msgspec.field(default_factory=dict)
    history: DriftHistory = msgspec.field(default_factory=DriftHistory)
    undated: int = 0

    @property
    def windows(self) -> int:
        return sum(device.windows for device in self.devices.values())

    @property
    def faulty(self) -> int:
        return sum(device.faulty for device in self.devices.values())

    def merge_fields(self) -> dict[str, MergedField]:
        """Each field over all devices."""
        return _merge_fields(device.fields for device in self.devices.values())

    def merge_recent(self) -> dict[str, MergedField]:
        """Each field over the last few windows of all devices."""
        return _merge_fields(device.merge_recent() for device in self.devices.values())

    def detect_fleet_wide(self) -> list[FleetWideDrift]:
        """Fields that moved on much of the fleet at once."""
        watched = {name: one.observed for name, one in self.devices.items() if one.observed is not None}
        return wide.detect(watched, [onset for one in self.devices.values() for onset in one.list_onsets()])

    def find_outliers(self, reference_sd: Mapping[str, float] = NO_REFERENCE_SD) -> list[DeviceOutlier]:
        """`usual_sd`: of the shipped reference's rows, by field, where it is known here."""
        return find_outliers({name: device.fields for name, device in self.devices.items()}, reference_sd)

    def ordered_episodes(self) -> list[DriftEpisode]:
        """The last drift of each field of each device: what goes on first, by when it began."""
        return sort_by_onset([e for device in self.devices.values() for e in device.episodes.last.values()])

    def estimate_accuracy(self) -> float | None:
        """Mean expected accuracy of all windows that have one."""
        count = sum(device.estimate_count for device in self.devices.values())
        return sum(device.accuracy_sum for device in self.devices.values()) / count if count else None


class FleetDriftSummary(msgspec.Struct):
    """`repeated`: windows that came again; `unreadable`: no drift windows, or of a device's fifth group and on."""

    groups: list[DriftGroup] = msgspec.field(default_factory=list)
    duplicates: int = 0
    unreadable: int = 0


def summarize_drift(
    store: FleetStore,
    *,
    task: str | None = None,
    since: str | None = None,
    now_us: int,
    progress: Callable[[int], None] = lambda _: None,
) -> FleetDriftSummary:
    """Of every window that ended at `since` (RFC 3339) or later."""
    found = FleetDriftSummary()
    groups: dict[tuple[str, str, FieldLayout], DriftGroup] = {}
    of_device: dict[tuple[str, str], set[tuple[str, str, FieldLayout]]] = {}
    for row, shipped in _deduplicate(store.drift_windows(task=task, since=since), found, progress):
        window = _parse_window(row)
        if window is None:
            found.unreadable += 1
            continue
        key = (row["task"], shipped, _field_layout(window))
        its = of_device.setdefault((row["task"], row["device"]), set())
        if key not in its and len(its) == MAX_DEVICE_GROUPS:
            found.unreadable += 1
            continue
        its.add(key)
        _add_window(groups.setdefault(key, DriftGroup(*key)), row["device"], window, now_us)
    found.groups = _sort_groups(list(groups.values()))
    return found


def build_timeline(
    store: FleetStore, group: DriftGroup, device: str, *, since: str | None = None, now_us: int
) -> Timeline:
    """How it went at one device of the group; windows of a wrong clock are left out, unless there are no others."""
    dated, undated = Timeline(), Timeline()
    windows = store.drift_windows(task=group.task, device=device, since=since)
    for row, shipped in _deduplicate(windows, FleetDriftSummary(), lambda _: None):
        window = _parse_window(row) if shipped == group.shipped_reference else None
        if window is not None and _field_layout(window) == group.layout:
            (dated if _has_plausible_time(window, now_us) else undated).add(window)
    return dated if dated.points else undated


def _has_plausible_time(window: WindowReport, now_us: int) -> bool:
    return window.t[0] >= EARLIEST_US and window.t[1] <= now_us + _MAX_AHEAD_US


def _deduplicate(
    rows: Iterator[dict[str, Any]], summary: FleetDriftSummary, progress: Callable[[int], None]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows with the digest of their shipped reference, without those that say the same window again.

    These lie beside each other, with those under other references among them.
    """
    place: tuple[Any, ...] = ()
    seen: set[str] = set()
    for row in rows:
        progress(1)
        now_at = tuple(row[name] for name in ("task", "device", "from", "to", "first", "last"))
        if now_at != place:
            place, seen = now_at, set()
        shipped = _parse_shipped_reference(row["reference"])
        if shipped is None:
            summary.unreadable += 1
        elif shipped in seen:
            summary.duplicates += 1
        else:
            seen.add(shipped)
            yield row, shipped


def _field_layout(window: WindowReport) -> FieldLayout:
    return frozenset((name, len(told.counts)) for name, told in window.fields.items())


def _parse_shipped_reference(reference: str) -> str | None:
    try:
        shipped = json.loads(reference).get("shipped")
    except (ValueError, AttributeError):
        return None
    return shipped if isinstance(shipped, str) else None


def _parse_window(row: dict[str, Any]) -> WindowReport | None:
    try:
        t = (clock.parse_rfc3339(row["from"]), clock.parse_rfc3339(row["to"]))
        members = (row[name] or "null" for name in ("features", "output", "joint", "estimate"))
        return parsed_message.parse_members(t, row["state"], *members)
    except ValueError:
        return None


def _add_window(group: DriftGroup, name: str, window: WindowReport, now_us: int) -> None:
    device = group.devices.setdefault(name, DeviceDrift(EpisodeTracker(name)))
    device.windows += 1
    device.last_window = window
    device.episodes.add(window)
    if _has_plausible_time(window, now_us):
        group.history.add(name, window)
        if window.state in ("ok", "drift"):
            device.observed = device.observed.with_window(window.t) if device.observed else ObservationPeriod(*window.t)
    else:
        group.undated += 1
    if window.state == "fault":
        device.faulty += 1
        return
    parts = {subject: MergedField.from_field(told) for subject, told in window.fields.items()}
    device.recent.append(parts)
    device.fields = _merge_fields((device.fields, parts))
    if window.accuracy is not None:
        device.accuracy_sum += window.accuracy[0]
        device.estimate_count += 1


def _merge_fields(summaries: Iterable[Mapping[str, MergedField]]) -> dict[str, MergedField]:
    found: dict[str, MergedField] = {}
    for parts in summaries:
        for name, part in parts.items():
            found[name] = found[name] + part if name in found else part
    return found


def _sort_groups(groups: list[DriftGroup]) -> list[DriftGroup]:
    """By task; first the reference and layout that most devices have, the others apart."""
    groups.sort(key=lambda g: (g.task, -len(g.devices), -g.windows, g.shipped_reference, sorted(g.layout)))
    for _, of_task in itertools.groupby(groups, key=lambda g: g.task):
        common, *others = of_task
        for group in others:
            group.differs_in = "reference" if group.shipped_reference != common.shipped_reference else "layout"
    return groups
