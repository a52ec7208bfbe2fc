"""Outlier survey: which devices stand out from their fleet, found in small slices beside the collector's work."""

from __future__ import annotations

import time
from collections.abc import Iterator

from outstation.fleet.database.drift_windows import list_drift_tasks, load_recent_drift_windows
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.outliers import MIN_DEVICES, DeviceOutlier
from outstation.fleet.drift.survey import DriftGroup, summarize_recent
from outstation.fleet.incidents.conditions import Condition
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.text import format_value
from outstation.protocol.alerts.kinds import OUTLIER_DEVICE

SURVEY_INTERVAL_S = 1800.0
# After a failed read or write.
RETRY_S = 30.0
LOOKBACK_US = 6 * 3_600_000_000
# Processor time of one turn: the collector stores messages between two of them.
SLICE_S = 0.02
# Windows of one device and task that a survey reads: six hours of one each minute.
MAX_WINDOWS = 360
# A device that stands out once may do so by chance.
CONFIRMATIONS = 2

OutlierKey = tuple[str, str, str]  # (device, task, field)


class OutlierSurvey:
    """`step` often; each survey takes as many steps as the fleet is large."""

    kind = OUTLIER_DEVICE

    def __init__(self, store: FleetStore) -> None:
        self._store = store
        self._next_s = float("-inf")
        self._running: Iterator[None] | None = None
        self._groups: dict[tuple[str, str, object], DriftGroup] = {}
        # How often in a row a device stood out; negative: how often it did not, after it had.
        self._streaks: dict[OutlierKey, int] = {}
        self._conditions: dict[OutlierKey, Condition] = {}
        self._is_first = True
        # Result of the last survey until it is stored.
        self._unstored: list[Condition] | None = None
        self._next_offer_s = float("-inf")

    def step(self, now: ClockReading) -> list[Condition] | None:
        """Work for one slice; return all conditions at the end of a survey, None before. Raises StorageError.

        The conditions are returned again every `RETRY_S` until `mark_stored`.
        """
        if self._running is None:
            if now.boot_s < self._next_s:
                return self._offer(now)
            self._next_s = now.boot_s + SURVEY_INTERVAL_S
            self._groups, self._unstored = {}, None
            self._running = self._read_devices(now.wall_us)
        end = time.monotonic() + SLICE_S
        try:
            while time.monotonic() < end:
                next(self._running)
        except StopIteration:
            self._running = None
            self._unstored, self._next_offer_s = self._conclude(), now.boot_s
            return self._offer(now)
        except BaseException:
            self._running, self._next_s = None, now.boot_s + RETRY_S
            raise
        return None

    def mark_stored(self) -> None:
        """Note that the alerts of the conditions returned last are stored."""
        self._unstored = None

    def _offer(self, now: ClockReading) -> list[Condition] | None:
        if self._unstored is None or now.boot_s < self._next_offer_s:
            return None
        self._next_offer_s = now.boot_s + RETRY_S
        return self._unstored

    def _read_devices(self, now_us: int) -> Iterator[None]:
        since = clock.to_rfc3339(now_us - LOOKBACK_US)
        for task in list_drift_tasks(self._store):
            devices = self._store.active_devices()
            if len(devices) < MIN_DEVICES:
                return
            for device in devices:
                rows = load_recent_drift_windows(self._store, task, device, since, MAX_WINDOWS)
                for group in summarize_recent(rows, now_us):
                    key = (group.task, group.shipped_reference, group.layout)
                    self._groups.setdefault(key, DriftGroup(*key)).add_devices(group)
                yield

    def _conclude(self) -> list[Condition] | None:
        """Count confirmations; return what holds. The first survey after a start clears nothing."""
        standing: dict[OutlierKey, DeviceOutlier] = {}
        for group in self._groups.values():
            for outlier in group.find_outliers():
                standing.setdefault((outlier.device, group.task, outlier.field), outlier)
        self._groups = {}
        for key in {*standing, *self._streaks}:
            before = self._streaks.get(key, 0)
            self._streaks[key] = max(before, 0) + 1 if key in standing else min(before, 0) - 1
            if self._streaks[key] >= CONFIRMATIONS:
                self._conditions[key] = _describe(key, standing[key])
            elif self._streaks[key] <= -CONFIRMATIONS:
                self._conditions.pop(key, None)
                del self._streaks[key]
        was_first, self._is_first = self._is_first, False
        return None if was_first else [*self._conditions.values()]


def _describe(key: OutlierKey, outlier: DeviceOutlier) -> Condition:
    device, task, field = key
    value, usual = format_value(outlier.value), format_value(outlier.fleet_median)
    summary = (
        f"{device} stands out from its fleet: the {outlier.statistic} of {field} is {value}, {usual} on a usual device "
        f"({abs(outlier.z):.1f} robust standard deviations)."
    )
    return Condition(OUTLIER_DEVICE, device, summary, "warning", {"task": task, "field": field}, task)
