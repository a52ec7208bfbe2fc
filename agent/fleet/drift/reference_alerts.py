"""Alerts of references unlike the fleet's, see `polled_alerts`."""

from __future__ import annotations

import contextlib
from itertools import groupby

import msgspec

from agent import decoders
from agent.clock import ClockReading
from agent.fleet.database.alerts import reference_alert_row
from agent.fleet.database.projection import ACCEPTED_EVENT, LEARNED_EVENT, FieldMoments
from agent.fleet.drift.polled_alerts import PolledAlerts
from agent.fleet.drift.reference_outliers import describe_device, find_reference_outliers
from agent.wire.messages import AuditPayload, Body

MAX_NAMED_FIELDS = 5
_FIELDS = decoders.json_decoder(dict[str, FieldMoments])


class ReferenceAlerts(PolledAlerts):
    """A reference that a device learned, or that an operator accepted, may change them."""

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
        for task, rows in groupby(self._store.learned_references(), key=lambda row: row[1]):
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
