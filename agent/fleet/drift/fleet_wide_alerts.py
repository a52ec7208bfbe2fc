"""Fleet-wide drift as alerts of the collector's own.

Looked for in what is stored, so that restarted collectors and several beside each other come to the same alerts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from agent import clock
from agent.clock import ClockReading
from agent.fleet.database.alerts import fleet_wide_alert_row
from agent.fleet.database.ingest import Arrival
from agent.fleet.database.store import FleetStore
from agent.fleet.drift import fleet_wide
from agent.fleet.drift.fleet_wide import ObservationPeriod, Onset
from agent.wire.messages import AlertPayload

POLL_INTERVAL_S = 60.0
# What was usual longer ago says little of the fleet as it is now. A clock that is a day ahead of ours is wrong.
LOOKBACK_US, MAX_AHEAD_US = 30 * 86_400_000_000, 86_400_000_000
MAX_NAMED_DEVICES = 8


class FleetWideAlerts:
    """Looks at most once a minute, and only after a device raised or cleared a drift alert.

    Where another collector may have stored that alert, it looks each minute.
    """

    def __init__(self, store: FleetStore) -> None:
        self._store = store
        self._due, self._next_s = True, 0.0

    def record_batch(self, arrivals: Iterable[Arrival]) -> None:
        bodies = (arrival.message.body for arrival in arrivals)
        self._due |= any(isinstance(body, AlertPayload) and body.alert == "drift" for body in bodies)

    def poll(self, now: ClockReading) -> list[str]:
        """Raise and clear what there is to; what was raised, in words. Raises StorageError: then look again."""
        if not (self._due or self._store.shared) or now.boot_s < self._next_s:
            return []
        self._next_s = now.boot_s + POLL_INTERVAL_S
        watched, onsets = self._load_observations(now)
        at, second = clock.to_rfc3339(now.wall_us), now.wall_us // 1_000_000
        open_now = {(task, subject): seq for task, subject, seq in self._store.open_fleet_wide_alerts()}
        said = []
        for task, subject, since, summary in _describe_detections(watched, onsets):
            if (task, subject) not in open_now:
                self._store.raise_alert(fleet_wide_alert_row(task, subject, since, summary, at))
                said.append(summary)
        for (task, subject), since in open_now.items():
            if not fleet_wide.is_still_drifting(subject, watched.get(task, {}), onsets.get(task, [])):
                summary = f"{task}: {subject} drifts on few devices only."
                self._store.raise_alert(
                    fleet_wide_alert_row(task, subject, since, summary, at, cleared=max(second, since + 1))
                )
        self._due = False
        return said

    def _load_observations(
        self, now: ClockReading
    ) -> tuple[dict[str, dict[str, ObservationPeriod]], dict[str, list[Onset]]]:
        """By task."""
        span = (clock.to_rfc3339(now.wall_us - LOOKBACK_US), clock.to_rfc3339(now.wall_us + MAX_AHEAD_US))
        watched: dict[str, dict[str, ObservationPeriod]] = {}
        for task, device, first, last, windows in self._store.observed_periods(*span):
            with contextlib.suppress(ValueError):  # of a moment that no calendar has
                watched.setdefault(task, {})[device] = ObservationPeriod(
                    clock.parse_rfc3339(first), clock.parse_rfc3339(last), windows
                )
        onsets: dict[str, list[Onset]] = {}
        for task, device, subject, at, is_open, times in self._store.drift_alerts(*span):
            with contextlib.suppress(ValueError):
                onset = Onset(device, subject, clock.parse_rfc3339(at), bool(is_open), max(0, times - 1))
                onsets.setdefault(task, []).append(onset)
        return watched, onsets


def _describe_detections(
    observed: dict[str, dict[str, ObservationPeriod]], onsets: dict[str, list[Onset]]
) -> Iterator[tuple[str, str, int, str]]:
    """(task, subject, second it began, sentence)."""
    for task, devices in observed.items():
        for one in fleet_wide.detect(devices, onsets.get(task, [])):
            names = ", ".join(one.devices[:MAX_NAMED_DEVICES])
            more = f" and {len(one.devices) - MAX_NAMED_DEVICES} more" if len(one.devices) > MAX_NAMED_DEVICES else ""
            yield task, one.subject, one.since // 1_000_000, f"{task}: {one.summary}. First on {names}{more}."
