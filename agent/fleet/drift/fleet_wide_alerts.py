"""Alerts of fleet-wide drift, see `polled_alerts`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from agent import clock
from agent.clock import ClockReading
from agent.fleet.database.alerts import fleet_wide_alert_row
from agent.fleet.database.drift_windows import load_observed_periods
from agent.fleet.drift import fleet_wide
from agent.fleet.drift.fleet_wide import ObservationPeriod, Onset
from agent.fleet.drift.polled_alerts import PolledAlerts
from agent.wire.messages import AlertPayload, Body

# An older alarm says little about the fleet as it is now. A clock more than a day ahead of ours is wrong.
LOOKBACK_US, MAX_AHEAD_US = 30 * 86_400_000_000, 86_400_000_000
MAX_NAMED_DEVICES = 8


class FleetWideAlerts(PolledAlerts):
    """Drift alerts of devices may change them."""

    def may_change(self, body: Body) -> bool:
        return isinstance(body, AlertPayload) and body.alert == "drift"

    def update(self, now: ClockReading, time: str, second: int) -> list[str]:
        observed, onsets = self._load_observations(now)
        open_now = {(task, subject): seq for task, subject, seq in self._store.open_fleet_wide_alerts()}
        raised = []
        for task, subject, since, summary in _describe_detections(observed, onsets):
            if (task, subject) not in open_now:
                self._store.raise_alert(fleet_wide_alert_row(task, subject, since, summary, time))
                raised.append(summary)
        for (task, subject), since in open_now.items():
            if not fleet_wide.is_still_drifting(subject, observed.get(task, {}), onsets.get(task, [])):
                summary = f"{task}: {subject} drifts on few devices only."
                cleared = max(second, since + 1)
                self._store.raise_alert(fleet_wide_alert_row(task, subject, since, summary, time, cleared))
        return raised

    def _load_observations(
        self, now: ClockReading
    ) -> tuple[dict[str, dict[str, ObservationPeriod]], dict[str, list[Onset]]]:
        """Return observation periods by task and device, and onsets by task."""
        span = (clock.to_rfc3339(now.wall_us - LOOKBACK_US), clock.to_rfc3339(now.wall_us + MAX_AHEAD_US))
        observed: dict[str, dict[str, ObservationPeriod]] = {}
        # A device may report a time that no calendar has.
        for task, device, first, last, windows in load_observed_periods(self._store, *span):
            with contextlib.suppress(ValueError):
                period = ObservationPeriod(clock.parse_rfc3339(first), clock.parse_rfc3339(last), windows)
                observed.setdefault(task, {})[device] = period
        onsets: dict[str, list[Onset]] = {}
        for task, device, subject, time, is_open, count in self._store.drift_alerts(*span):
            with contextlib.suppress(ValueError):
                onset = Onset(device, subject, clock.parse_rfc3339(time), bool(is_open), max(0, count - 1))
                onsets.setdefault(task, []).append(onset)
        return observed, onsets


def _describe_detections(
    observed: dict[str, dict[str, ObservationPeriod]], onsets: dict[str, list[Onset]]
) -> Iterator[tuple[str, str, int, str]]:
    """Yield (task, subject, second when it began, summary)."""
    for task, devices in observed.items():
        for drift in fleet_wide.detect(devices, onsets.get(task, [])):
            names = ", ".join(drift.devices[:MAX_NAMED_DEVICES])
            hidden = len(drift.devices) - MAX_NAMED_DEVICES
            more = f" and {hidden} more" if hidden > 0 else ""
            yield task, drift.subject, drift.since // 1_000_000, f"{task}: {drift.summary}. First on {names}{more}."
