"""Alerts that the collector raises and clears itself: fleet-wide drift, and references unlike the fleet's.

They depend on stored data alone, so a restarted collector, or another one, comes to the same alerts.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import msgspec

from outstation.fleet.database.alerts import fleet_wide_alert_row, reference_alert_row
from outstation.fleet.database.drift_windows import load_observed_periods
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.projection import ACCEPTED_EVENT, LEARNED_EVENT, FieldMoments
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift import fleet_wide
from outstation.fleet.drift.fleet_wide import ObservationPeriod, Onset
from outstation.fleet.drift.reference_outliers import describe_device, find_reference_outliers
from outstation.foundation import clock, decoders
from outstation.foundation.clock import ClockReading
from outstation.protocol.wire.messages import AlertPayload, AuditPayload, Body

POLL_INTERVAL_S = 60.0
# An older alarm says little about the fleet as it is now. A clock more than a day ahead of ours is wrong.
LOOKBACK_US, MAX_AHEAD_US = 30 * 86_400_000_000, 86_400_000_000
MAX_NAMED_DEVICES = 8
MAX_NAMED_FIELDS = 5
_FIELDS = decoders.json_decoder(dict[str, FieldMoments])


class PolledAlerts(ABC):
    """Polls at most once a minute, and only after a message that may change an alert.

    With a shared database it polls each minute, because another collector may have stored that message.
    """

    def __init__(self, store: FleetStore) -> None:
        self._store = store
        self._due, self._next_s = True, 0.0

    def record_batch(self, arrivals: Iterable[Arrival]) -> None:
        self._due |= any(self.may_change(arrival.message.body) for arrival in arrivals)

    def poll(self, now: ClockReading) -> list[str]:
        """Raise and clear alerts, and return the summaries of raised ones. Raises StorageError: then poll again."""
        if not (self._due or self._store.shared) or now.boot_s < self._next_s:
            return []
        self._next_s = now.boot_s + POLL_INTERVAL_S
        raised = self.update(now, clock.to_rfc3339(now.wall_us), now.wall_us // 1_000_000)
        self._due = False
        return raised

    @abstractmethod
    def may_change(self, body: Body) -> bool:
        """Return True if a message with this body may change an alert."""

    @abstractmethod
    def update(self, now: ClockReading, time: str, second: int) -> list[str]:
        """Raise and clear alerts at `time`, which is in `second`; return the summaries of raised ones."""


class ReferenceAlerts(PolledAlerts):
    """Alerts of references unlike the fleet's; learning or accepting a reference may change them."""

    def may_change(self, body: Body) -> bool:
        return isinstance(body, AuditPayload) and body.event in (LEARNED_EVENT, ACCEPTED_EVENT)

    def update(self, now: ClockReading, time: str, second: int) -> list[str]:
        open_now = {(device, task): seq for device, task, seq in self._store.open_reference_alerts()}
        unlike = self._find_unlike()
        raised = []
        for (device, task), summary in unlike.items():
            if (device, task) not in open_now:
                self._store.raise_alert(reference_alert_row(device, task, second, summary, time))
                raised.append(f"{device}: {summary}")
        for (device, task), since in open_now.items():
            if (device, task) not in unlike:
                summary = f"{task}: its reference was accepted, or is like those of the other devices."
                cleared = max(second, since + 1)
                self._store.raise_alert(reference_alert_row(device, task, since, summary, time, cleared))
        return raised

    def _find_unlike(self) -> dict[tuple[str, str], str]:
        """Return the summary of each device and task whose reference is unlike the others and was not accepted."""
        unlike: dict[tuple[str, str], str] = {}
        for task, rows in groupby(self._store.learned_references(), key=itemgetter(1)):
            devices, accepted = dict[str, dict[str, FieldMoments]](), set[str]()
            for device, _, fields, is_accepted in rows:
                # The audit names a damaged cell.
                with contextlib.suppress(msgspec.MsgspecError, TypeError):
                    devices[device] = _FIELDS.decode(fields)
                if is_accepted:
                    accepted.add(device)
            outliers = find_reference_outliers(devices)
            for device, of_device in groupby(outliers, key=lambda outlier: outlier.device):
                if device not in accepted:
                    outlying = list(of_device)
                    others = max(outlier.others for outlier in outlying)
                    unlike[device, task] = (
                        f"{task}: the reference that it learned deviates from those of {others} other devices: "
                        f"{describe_device(outlying, MAX_NAMED_FIELDS)}. Drift is tested against it all the same."
                    )
        return unlike


class FleetWideAlerts(PolledAlerts):
    """Alerts of fleet-wide drift; drift alerts of devices may change them."""

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
