"""Leader election: one of the collectors of a database raises alerts that concern all of them.

The leader holds an advisory lock as long as it is connected to the database; then another collector takes over. It
watches for refused messages, for fleet-wide drift, and for incidents of single devices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from outstation.fleet.collector.refusal_alarm import RefusalAlarm, RefusalTally
from outstation.fleet.database.alerts import refusals_alert_row
from outstation.fleet.database.ingest import OVER_QUOTA, Arrival, Refusal
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.polled_alerts import FleetWideAlerts, ReferenceAlerts
from outstation.fleet.incidents.conditions import Certificate
from outstation.fleet.incidents.monitor import IncidentMonitor
from outstation.foundation import clock
from outstation.foundation.errors import StorageError
from outstation.foundation.text import printable
from outstation.protocol.alerts.alert import AlertKind
from outstation.protocol.alerts.kinds import OVER_QUOTA_AT_COLLECTOR, REFUSED_BY_COLLECTOR

logger = logging.getLogger(__name__)

# How soon another collector takes over from one that died, and how often refusals of all collectors are counted.
LEADER_CHECK_S = 10.0
LEADER_JOB = "leader"


class LeaderTasks:
    """Tasks of the leader, run by `tick`. It raises nothing: a full disk delays the alerts."""

    def __init__(
        self, store: FleetStore, keyring: Keyring, certificates: Callable[[], Iterable[Certificate]] = lambda: ()
    ) -> None:
        """`certificates`: those of the fleet, of which the leader says that they end soon."""
        self._store, self._keyring = store, keyring
        self._refusal_alarm, self._refusal_tally = RefusalAlarm(), RefusalTally()
        self._quota_alarm = RefusalAlarm()
        self._fleet_wide_alerts, self._reference_alerts = FleetWideAlerts(store), ReferenceAlerts(store)
        self._incidents = IncidentMonitor(store, certificates)
        self.is_leader, self._next_check_s = not store.shared, 0.0
        self.collector_count = 1

    def record_batch(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal]) -> None:
        self._fleet_wide_alerts.record_batch(arrivals)
        self._reference_alerts.record_batch(arrivals)
        if not self._store.shared:
            boot_s, devices = clock.read().boot_s, self._keyring.devices
            over_quota = [refusal for refusal in refusals if refusal.reason == OVER_QUOTA]
            self._quota_alarm.add_refusals(over_quota, devices, boot_s)
            others = (refusal for refusal in refusals if refusal.reason != OVER_QUOTA)
            self._refusal_alarm.add_refusals(others, devices, boot_s)
            self._raise_alarms(clock.read())

    def tick(self, *, is_caught_up: bool = True) -> None:
        """Do what is due; `is_caught_up` unless received messages wait for the database."""
        self._incidents.watch(clock.read())
        try:
            if self._store.shared and clock.boot_seconds() >= self._next_check_s:
                self._next_check_s = clock.boot_seconds() + LEADER_CHECK_S
                self.collector_count = self._store.join_collectors()
                was_leader, self.is_leader = self.is_leader, self._store.acquire_leadership(LEADER_JOB)
                if self.is_leader != was_leader:
                    self._refusal_tally = RefusalTally()
                    self._incidents.reset()
                    logger.info("this collector is the leader" if self.is_leader else "another collector is the leader")
                if self.is_leader:
                    for name, reason, n in self._refusal_tally.new_refusals(self._store.refusals()):
                        alarm = self._quota_alarm if reason == OVER_QUOTA else self._refusal_alarm
                        alarm.add_count(name, reason, n, clock.read().boot_s)
                    self._raise_alarms(clock.read())
            if self.is_leader:
                now = clock.read()
                for summary in [*self._fleet_wide_alerts.poll(now), *self._reference_alerts.poll(now)]:
                    logger.warning("drift: %s", summary)
                if is_caught_up:
                    for summary in self._incidents.poll(clock.read()):
                        logger.warning("incident: %s", printable(summary))
        except StorageError as error:
            # A lost connection releases the lock, which another collector may hold by now.
            self.is_leader = not self._store.shared
            logger.error("%s; the next check for alerts of the collector is later", error)

    def _raise_alarms(self, now: clock.ClockReading) -> None:
        """Raise alerts of the collector's own, as a refused message proves nothing about its device."""
        for name, count in self._refusal_alarm.due_alerts(now.boot_s):
            owner = f"in the name of {name}" if name else "in names that are not enrolled"
            summary = (
                f"{count.n} messages {owner} were refused within {now.boot_s - count.since_s:.0f} s, the last for "
                f"{count.last_reason!r}: somebody sends messages that do not verify, or a key was changed without "
                "enrolling it. None of them was stored; table refusal_samples has samples."
            )
            self._raise_alarm(REFUSED_BY_COLLECTOR, self._refusal_alarm, name, summary, now)
        for name, count in self._quota_alarm.due_alerts(now.boot_s):
            summary = (
                f"{name} sends more than its quota: {count.n} messages within {now.boot_s - count.since_s:.0f} s "
                "were neither stored nor acknowledged, and stay on the device. Raise [quota] in fleet.toml if they are "
                f"needed; otherwise revoke the device: outstation fleet devices revoke {name}."
            )
            self._raise_alarm(OVER_QUOTA_AT_COLLECTOR, self._quota_alarm, name, summary, now)

    def _raise_alarm(
        self, kind: AlertKind, alarm: RefusalAlarm, name: str, summary: str, now: clock.ClockReading
    ) -> None:
        time_text, hour = clock.to_rfc3339(now.wall_us), now.wall_us // 3_600_000_000
        try:
            # One alert says it, however long it lasts.
            if self._incidents.is_open(kind, name):
                alarm.mark_raised(name, now.boot_s)
                return
            self._store.raise_alert(refusals_alert_row(kind, name, summary, time_text, hour))
            self._incidents.reset()
        except StorageError as error:
            logger.error("%s; the alert about refused messages is delayed", error)
            return
        alarm.mark_raised(name, now.boot_s)
        logger.critical("security: %s", summary)
