"""Leader election: one of the collectors of a database raises alerts that concern all of them.

The leader holds an advisory lock as long as it is connected to the database; then another collector takes over. It
watches for refused messages and for fleet-wide drift.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from agent import clock
from agent.errors import StorageError
from agent.fleet.collector.refusal_alarm import RefusalAlarm, RefusalTally
from agent.fleet.database.alerts import refusals_alert_row
from agent.fleet.database.ingest import Arrival, Refusal
from agent.fleet.database.keyring import Keyring
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.fleet_wide_alerts import FleetWideAlerts

logger = logging.getLogger(__name__)

# How soon another collector takes over from one that died, and how often refusals of all collectors are counted.
LEADER_CHECK_S = 10.0
LEADER_JOB = "leader"


class LeaderTasks:
    """Tasks of the leader, run by `tick`. It raises nothing: a full disk delays the alerts."""

    def __init__(self, store: FleetStore, keyring: Keyring) -> None:
        self._store, self._keyring = store, keyring
        self._refusal_alarm, self._refusal_tally = RefusalAlarm(), RefusalTally()
        self._fleet_wide_alerts = FleetWideAlerts(store)
        self.is_leader, self._next_check_s = not store.shared, 0.0

    def record_batch(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal]) -> None:
        self._fleet_wide_alerts.record_batch(arrivals)
        if not self._store.shared:
            self._refusal_alarm.add_refusals(refusals, self._keyring.devices, clock.read().boot_s)
            self._raise_alarms()

    def tick(self) -> None:
        try:
            if self._store.shared and time.monotonic() >= self._next_check_s:
                self._next_check_s = time.monotonic() + LEADER_CHECK_S
                was_leader, self.is_leader = self.is_leader, self._store.acquire_leadership(LEADER_JOB)
                if self.is_leader != was_leader:
                    self._refusal_tally = RefusalTally()
                    logger.info("this collector is the leader" if self.is_leader else "another collector is the leader")
                if self.is_leader:
                    for name, reason, n in self._refusal_tally.new_refusals(self._store.refusals()):
                        self._refusal_alarm.add_count(name, reason, n, clock.read().boot_s)
                    self._raise_alarms()
            if self.is_leader:
                for summary in self._fleet_wide_alerts.poll(clock.read()):
                    logger.warning("drift: %s", summary)
        except StorageError as error:
            # A lost connection releases the lock, which another collector may hold by now.
            self.is_leader = not self._store.shared
            logger.error("%s; the next check for fleet-wide drift is later", error)

    def _raise_alarms(self) -> None:
        """Raise alerts of the collector's own, as a refused message proves nothing about its device."""
        now = clock.read()
        for name, count in self._refusal_alarm.due_alerts(now.boot_s):
            owner = f"in the name of {name}" if name else "in names that are not enrolled"
            summary = (
                f"{count.n} messages {owner} were refused within {now.boot_s - count.since_s:.0f} s, the last for "
                f"{count.last_reason!r}: somebody sends messages that do not verify, or a key was changed without "
                "enrolling it. None of them was stored; table refusal_samples has samples."
            )
            row = refusals_alert_row(name, summary, clock.to_rfc3339(now.wall_us), now.wall_us // 3_600_000_000)
            try:
                self._store.raise_alert(row)
            except StorageError as error:
                logger.error("%s; the alert about refused messages is delayed", error)
                return
            self._refusal_alarm.mark_raised(name, now.boot_s)
            logger.critical("security: %s", summary)
