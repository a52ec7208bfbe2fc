"""Own messages: the source of the bridge on a device without a collector, which reads the device's store."""

from __future__ import annotations

import msgspec

from outstation.device.config import Config
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.integrations.homeassistant.device_state import DeviceReport, output_key
from outstation.protocol.alerts.incident import Incident

# Of what the device wrote since the last poll, most: older messages have newer ones of the same topic.
_MAX_MESSAGES = 300


class OwnMessages:
    """A `DeviceSource` of Home Assistant on the daemon's own store, which threads share."""

    def __init__(self, conf: Config, store: Store) -> None:
        self._conf, self._store = conf, store
        self._last_seq: int | None = None
        self._open: dict[str, Incident] = {}
        self.devices = frozenset({conf.device.id})

    def poll(self) -> list[DeviceReport]:
        head, _ = self._store.log_head()
        if head == self._last_seq:
            return []
        # A store that was set back has a new log, whose messages are all new.
        last = self._last_seq if self._last_seq is not None and self._last_seq < head else 0
        after = max(head - _MAX_MESSAGES, last)
        payloads = self._store.newest_by_topic(after)
        self._last_seq = head
        alerts = self._load_alerts()
        now = clock.now_rfc3339()
        ended = {key: alert for key, alert in self._open.items() if key not in alerts}
        cleared = {key: msgspec.structs.replace(alert, updated=now) for key, alert in ended.items()}
        self._open = alerts
        return [DeviceReport(self._conf.device.id, "online", payloads, alerts, cleared)]

    def close(self) -> None:
        """Do nothing: the store is the daemon's."""

    def _load_alerts(self) -> dict[str, Incident]:
        alerts: list[Incident] = []
        for name in self._conf.tasks:
            for body in self._store.open_alerts(name):
                # The owner of the stream keeps these on the device, which Home Assistant's broker may not be.
                if not body.get("kept"):
                    alerts.append(
                        Incident(
                            status="raised",
                            severity=body["severity"],
                            device=self._conf.device.id,
                            task=name,
                            alert=body["alert"],
                            subject=body["subject"],
                            summary=str(body["summary"]),
                            raised=body["time"],
                            updated=body["time"],
                            id=str(body["id"]),
                            seq=0,
                            raised_seq=0,
                            revision=body.get("revision", 1),
                        )
                    )
        ordered = sorted(alerts, key=lambda alert: alert.raised)
        return {f"{output_key(alert.id)}.{alert.revision}.{alert.raised}": alert for alert in ordered}
