"""Drift survey of a fleet, from the stored drift windows; memory grows with devices, not with windows.

- A window counts once, however often a device reports it, in whatever log, against whatever reference of its site. A
  run of quiet windows that overlaps an earlier report is left out whole, as its sums cannot be taken apart.
- Only windows with the same task, shipped reference and layout (fields and their bins) can be merged. A device with
  another reference or layout than most forms a group of its own.
- A window with a sensor fault is counted but not merged, as devices exclude it from their own tests.
- A row that is not a valid drift window is counted as unreadable and left out.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Literal

import msgspec
from msgspec.structs import replace

from outstation.fleet.database.drift_windows import DriftRow, count_drift_messages, stream_drift_windows
from outstation.fleet.database.store import DeviceRange, FleetStore
from outstation.fleet.drift import fleet_wide
from outstation.fleet.drift.fleet_wide import FleetWideDrift, ObservationPeriod, Onset
from outstation.fleet.drift.merge import DriftHistory, FieldTotals, MergedField, PerformanceEstimates
from outstation.fleet.drift.onset import DriftEpisode, EpisodeTracker, sort_by_onset
from outstation.fleet.drift.outliers import NO_REFERENCE_SD, DeviceOutlier, find_outliers
from outstation.fleet.workers.device_ranges import run_over_devices, split_devices
from outstation.foundation import clock
from outstation.ml.drift.outputs.reference import MAX_OUTPUTS
from outstation.ml.drift.reporting import parsed_message
from outstation.ml.drift.reporting.parsed_message import FieldReport, WindowReport
from outstation.ml.drift.reporting.timeline import EARLIEST_US, Timeline
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

# A device may not fill the memory with a group for each of its windows: two bundles and a few mistakes suffice.
MAX_DEVICE_GROUPS = 4
RECENT_WINDOWS = 6  # Windows of each device that describe its current state; more if the last report is a longer run.
# A clock more than a day ahead of ours is wrong.
_MAX_AHEAD_US = 86_400_000_000
# With fewer, a process would cost more time than it saves.
_MIN_PARALLEL_MESSAGES = 40_000

FieldLayout = frozenset[tuple[str, int]]  # (field, number of bins)
GroupKey = tuple[str, str, FieldLayout]  # (task, shipped reference, layout)


class DeviceDrift(msgspec.Struct):
    """The windows of a device under one reference.

    `outputs`: reports of each further output, of the first MAX_OUTPUTS ones; `omitted_outputs`: reports of others.
    """

    episodes: EpisodeTracker
    windows: int = 0
    faulty: int = 0
    totals: FieldTotals = msgspec.field(default_factory=FieldTotals)
    expected: PerformanceEstimates = msgspec.field(default_factory=PerformanceEstimates)
    last_window: WindowReport | None = None
    observed: ObservationPeriod | None = None
    recent: deque[tuple[int, dict[str, FieldReport]]] = msgspec.field(default_factory=deque)
    outputs: Counter[str] = msgspec.field(default_factory=Counter)
    omitted_outputs: int = 0

    @property
    def fields(self) -> dict[str, MergedField]:
        """Each field over all windows without a fault."""
        return self.totals.merge()

    def select_outputs(self, window: WindowReport) -> WindowReport:
        """Count the further outputs of a window, and return it without those beyond the first MAX_OUTPUTS."""
        # Those of the fields come first.
        further = islice(window.subjects, len(window.fields), None)
        names = [name.removeprefix(OUTPUT_PREFIX) for name in further if name.startswith(OUTPUT_PREFIX)]
        omitted = set[str]()
        for name in names:
            if name in self.outputs or len(self.outputs) < MAX_OUTPUTS:
                self.outputs[name] += 1
            else:
                omitted.add(name)
        if not omitted:
            return window
        self.omitted_outputs += len(omitted)
        hidden = {OUTPUT_PREFIX + name for name in omitted}
        subjects = {name: each for name, each in window.subjects.items() if name not in hidden}
        expected = {name: each for name, each in window.further_expected.items() if name not in omitted}
        return replace(window, subjects=subjects, further_expected=expected)

    def add_recent(self, windows: int, fields: dict[str, FieldReport]) -> None:
        """Add a report; earlier ones stay while all together are no more than the recent windows."""
        self.recent.append((windows, fields))
        while len(self.recent) > 1 and sum(count for count, _ in self.recent) > RECENT_WINDOWS:
            self.recent.popleft()

    def merge_recent(self) -> dict[str, MergedField]:
        """Merge each field over the last few windows without a fault."""
        recent = FieldTotals()
        for _, fields in self.recent:
            recent.add(fields)
        return recent.merge()

    def list_onsets(self) -> list[Onset]:
        return [
            Onset(e.device, subject, e.alarmed, e.ended is None, self.episodes.alarm_counts[subject] - 1)
            for subject, e in self.episodes.last.items()
        ]


class DriftGroup(msgspec.Struct):
    """All windows of a task under one shipped reference and layout.

    `differs_in`: how the group differs from the largest one of the task; None for that one.
    """

    task: str
    shipped_reference: str
    layout: FieldLayout
    differs_in: Literal["reference", "layout"] | None = None
    devices: dict[str, DeviceDrift] = msgspec.field(default_factory=dict)
    history: DriftHistory = msgspec.field(default_factory=DriftHistory)
    undated: int = 0

    @property
    def key(self) -> GroupKey:
        return self.task, self.shipped_reference, self.layout

    @property
    def windows(self) -> int:
        return sum(device.windows for device in self.devices.values())

    @property
    def faulty(self) -> int:
        return sum(device.faulty for device in self.devices.values())

    def merge_fields(self) -> dict[str, MergedField]:
        """Merge each field over all devices."""
        return _merge_fields(device.fields for device in self.devices.values())

    def merge_recent(self) -> dict[str, MergedField]:
        """Merge each field over the last few windows of all devices."""
        return _merge_fields(device.merge_recent() for device in self.devices.values())

    def add_devices(self, other: DriftGroup) -> None:
        """Add the windows of other devices."""
        self.devices |= other.devices
        self.history.merge(other.history)
        self.undated += other.undated

    def detect_fleet_wide(self) -> list[FleetWideDrift]:
        """Detect fields that drift on much of the fleet at once."""
        observed = {name: device.observed for name, device in self.devices.items() if device.observed is not None}
        return fleet_wide.detect(observed, [onset for d in self.devices.values() for onset in d.list_onsets()])

    def find_outliers(self, reference_sd: Mapping[str, float] = NO_REFERENCE_SD) -> list[DeviceOutlier]:
        """Find outlier devices; `reference_sd`: sd of each field's rows in the shipped reference, if it is known."""
        return find_outliers({name: device.fields for name, device in self.devices.items()}, reference_sd)

    def ordered_episodes(self) -> list[DriftEpisode]:
        """Return the last episode of each field of each device, open ones first, in order of onset."""
        return sort_by_onset([e for device in self.devices.values() for e in device.episodes.last.values()])

    def estimate_performance(self) -> PerformanceEstimates:
        """Return what all windows with an estimate let expect."""
        total = PerformanceEstimates()
        for device in self.devices.values():
            total.merge(device.expected)
        names, _ = self.list_outputs()
        total.further = {name: total.further[name] for name in names if name in total.further}
        return total

    def list_outputs(self) -> tuple[list[str], int]:
        """Return the further outputs that most devices report, at most MAX_OUTPUTS, and how often others are."""
        devices, reports = Counter[str](), Counter[str]()
        for device in self.devices.values():
            devices.update(device.outputs.keys())
            reports.update(device.outputs)
        names = sorted(devices, key=lambda name: (-devices[name], name))[:MAX_OUTPUTS]
        omitted = reports.total() - sum(reports[name] for name in names)
        return sorted(names), omitted + sum(device.omitted_outputs for device in self.devices.values())


class FleetDriftSummary(msgspec.Struct):
    """Groups, and windows left out: `duplicates` reported again; `unreadable`, also beyond a device's groups."""

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
    processes: int = 1,
) -> FleetDriftSummary:
    """Summarise every window that ended at `since` (RFC 3339) or later."""
    if processes > 1 and count_drift_messages(store) < _MIN_PARALLEL_MESSAGES:
        processes = 1
    jobs = [(devices, (task, since, now_us)) for devices in split_devices(store, processes, processes)]
    first, *others = run_over_devices(store, _summarize_devices, jobs, processes, progress)
    groups = {group.key: group for group in first.groups}
    for other in others:
        first.duplicates += other.duplicates
        first.unreadable += other.unreadable
        for group in other.groups:
            groups.setdefault(group.key, DriftGroup(*group.key)).add_devices(group)
    first.groups = _sort_groups(list(groups.values()))
    return first


def summarize_device(
    store: FleetStore, device: str, *, task: str | None, since: str | None, now_us: int
) -> FleetDriftSummary:
    """Summarise the windows of one device, its largest group of a task first."""
    # A space sorts before every character of a name.
    alone = DeviceRange(device, device + " ")
    summary = _summarize_devices(store, alone, lambda _: None, task, since, now_us)
    summary.groups = _sort_groups(summary.groups)
    return summary


def _summarize_devices(
    store: FleetStore,
    devices: DeviceRange,
    progress: Callable[[int], None],
    task: str | None,
    since: str | None,
    now_us: int,
) -> FleetDriftSummary:
    return _summarize(stream_drift_windows(store, task=task, devices=devices, since=since), progress, now_us)


def summarize_recent(rows: Iterable[DriftRow], now_us: int) -> list[DriftGroup]:
    """Summarise windows of one task and device, in the order of the database."""
    return _summarize(iter(rows), lambda _: None, now_us).groups


def _summarize(windows: Iterator[DriftRow], progress: Callable[[int], None], now_us: int) -> FleetDriftSummary:
    summary = FleetDriftSummary()
    groups: dict[GroupKey, DriftGroup] = {}
    groups_of_device: dict[tuple[str, str], set[GroupKey]] = {}
    for row, shipped in _deduplicate(windows, summary, progress):
        window = _parse_window(row)
        if window is None:
            summary.unreadable += row.window_count
            continue
        key = (row.task, shipped, _field_layout(window))
        known = groups_of_device.setdefault((row.task, row.device), set())
        if key not in known and len(known) == MAX_DEVICE_GROUPS:
            summary.unreadable += row.window_count
            continue
        known.add(key)
        _add_window(groups.setdefault(key, DriftGroup(*key)), row.device, window, now_us)
    summary.groups = list(groups.values())
    return summary


def build_timeline(
    store: FleetStore, group: DriftGroup, device: str, *, since: str | None = None, now_us: int
) -> Timeline:
    """Build the timeline of one device; windows with a wrong clock are left out, unless there are no others."""
    dated, undated = Timeline(), Timeline()
    windows = stream_drift_windows(store, task=group.task, devices=device, since=since)
    for row, shipped in _deduplicate(windows, FleetDriftSummary(), lambda _: None):
        window = _parse_window(row) if shipped == group.shipped_reference else None
        if window is not None and _field_layout(window) == group.layout:
            (dated if _has_plausible_time(window, now_us) else undated).add(window)
    return dated if dated.points else undated


def _has_plausible_time(window: WindowReport, now_us: int) -> bool:
    return window.t[0] >= EARLIEST_US and window.t[1] <= now_us + _MAX_AHEAD_US


def _deduplicate(
    rows: Iterator[DriftRow], summary: FleetDriftSummary, progress: Callable[[int], None]
) -> Iterator[tuple[DriftRow, str]]:
    """Yield each window once, with the digest of its shipped reference.

    Reports of the same window are adjacent, with reports against other references among them.
    """
    counted: dict[str, _Place] = {}  # the last report against each reference
    device: tuple[str, str] = ("", "")
    for row in rows:
        progress(1)
        if (row.task, row.device) != device:
            device, counted = (row.task, row.device), {}
        if not (
            type(row.first) is type(row.last) is type(row.window_count) is int
            and type(row.begin) is type(row.end) is str
        ):
            # A damaged cell, which the audit names.
            summary.unreadable += 1
            continue
        shipped = _parse_shipped_reference(row.reference)
        if shipped is None:
            summary.unreadable += row.window_count
            continue
        place = _Place(row.begin, row.end, row.first, row.last, row.window_count > 1)
        if shipped in counted and place.repeats(counted[shipped]):
            summary.duplicates += row.window_count
            continue
        if len(counted) < MAX_DEVICE_GROUPS or shipped in counted:
            counted[shipped] = place
        yield row, shipped


class _Place(msgspec.Struct, frozen=True):
    """Place of a report: times as RFC 3339 and rows, and whether it covers a run of windows."""

    begin: str
    end: str
    first: int
    last: int
    is_run: bool

    def repeats(self, earlier: _Place) -> bool:
        """Return True if a window is in both. `earlier` began no later."""
        if not (self.is_run or earlier.is_run):
            return self == earlier
        return self.begin <= earlier.end and self.first <= earlier.last and earlier.first <= self.last


def _field_layout(window: WindowReport) -> FieldLayout:
    return frozenset([(name, len(field.counts)) for name, field in window.fields.items()])


@lru_cache(64)
def _parse_shipped_reference(reference: str) -> str | None:
    try:
        shipped = json.loads(reference).get("shipped")
    except (TypeError, ValueError, AttributeError):
        return None
    return shipped if isinstance(shipped, str) else None


def _parse_window(row: DriftRow) -> WindowReport | None:
    try:
        t = (clock.parse_rfc3339(row.begin), clock.parse_rfc3339(row.end))
        members = (getattr(row, name) or "null" for name in parsed_message.MEMBERS)
        return parsed_message.parse_members(t, row.state, *members)
    except ValueError:
        return None


def _add_window(group: DriftGroup, name: str, window: WindowReport, now_us: int) -> None:
    device = group.devices.setdefault(name, DeviceDrift(EpisodeTracker(name)))
    device.windows += window.windows
    window = device.select_outputs(window)
    device.last_window = window
    device.episodes.add(window)
    if _has_plausible_time(window, now_us):
        group.history.add(name, window)
        if window.state in ("ok", "drift"):
            period = ObservationPeriod(*window.t, window.windows)
            device.observed = device.observed.merge(period) if device.observed else period
    else:
        group.undated += window.windows
    if window.state == "fault":
        device.faulty += 1
        return
    device.add_recent(window.windows, window.fields)
    device.totals.add(window.fields)
    device.expected.add(window, window.windows)


def _merge_fields(summaries: Iterable[Mapping[str, MergedField]]) -> dict[str, MergedField]:
    merged: dict[str, MergedField] = {}
    for parts in summaries:
        for name, part in parts.items():
            merged[name] = merged[name] + part if name in merged else part
    return merged


def _sort_groups(groups: list[DriftGroup]) -> list[DriftGroup]:
    """Sort by task, the largest group of each first, and mark how the others differ from it."""
    groups.sort(key=lambda g: (g.task, -len(g.devices), -g.windows, g.shipped_reference, sorted(g.layout)))
    for _, of_task in itertools.groupby(groups, key=lambda g: g.task):
        common, *others = of_task
        for group in others:
            group.differs_in = "reference" if group.shipped_reference != common.shipped_reference else "layout"
    return groups
