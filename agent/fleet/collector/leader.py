"""What one collector does for all: alarms about what is refused, and the lookout for drift of the whole fleet.

Where collectors share a database, one of them has the duty as long as it is connected to it; then another takes over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from agent import clock
from agent.errors import StorageError
from agent.fleet.collector import refusal_alarm
from agent.fleet.database.alerts import refusals_alert_row
from agent.fleet.database.ingest import Arrival, Refusal
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.fleet_wide_alerts import FleetWideAlerts
from agent.fleet.keyring import Keyring

logger = logging.getLogger(__name__)

# How soon another collector takes over from one that died, and how often what all have refused is counted.
LEADER_CHECK_S = 10.0
LEADER_JOB = "lookout"


class LeaderTasks:
    """Of one collector; `turn` does what there is to do. Nothing is raised: a full disk delays it."""

    def __init__(self, store: FleetStore, keyring: Keyring) -> None:
        self._store, self._keyring = store, keyring
        self._refusal_alarm, self._refusal_tally = refusal_alarm.RefusalAlarm(), refusal_alarm.RefusalTally()
        self._fleet_wide_alerts = FleetWideAlerts(store)
        self.is_leader, self._next_check_s = not store.shared, 0.0

    def record_batch(self, arrivals: Sequence[Arrival], refusals: Sequence[Refusal]) -> None:
        """Take note of a batch that is in the database."""
        self._fleet_wide_alerts.record_batch(arrivals)
        if not self._store.shared:
            self._refusal_alarm.add_refusals(refusals, self._keyring.devices, clock.read().boot_s)
            self._raise_alarms()

    def tick(self) -> None:
        try:
            if self._store.shared and time.monotonic() >= self._next_check_s:
                self._next_check_s = time.monotonic() + LEADER_CHECK_S
                self._elect_leader()
            if self.is_leader:
                for summary in self._fleet_wide_alerts.poll(clock.read()):
                    logger.warning("drift: %s", summary)
        except StorageError as error:
            # With the connection, it may be another's by now.
            self.is_leader = not self._store.shared
            logger.error("%s; fleet-wide drift is looked for again later", error)

    def _elect_leader(self) -> None:
        has = self._store.acquire_leadership(LEADER_JOB)
        if has != self.is_leader:
            self._refusal_tally = refusal_alarm.RefusalTally()
            logger.info("this collector looks out for the fleet" if has else "another collector looks out now")
        self.is_leader = has
        if has:
            boot_s = clock.read().boot_s
            for name, reason, n in self._refusal_tally.new_refusals(self._store.refusals()):
                self._refusal_alarm.add_count(name, reason, n, boot_s)
            self._raise_alarms()

    def _raise_alarms(self) -> None:
        """What was refused is no message of its device: the alert is the collector's own. A full disk delays it."""
        now = clock.read()
        for name, count in self._refusal_alarm.due_alerts(now.boot_s):
            who = f"in the name of {name}" if name else "in names that are not enrolled"
            summary = (
                f"{count.n} messages {who} were refused within {now.boot_s - count.since_s:.0f} s, the last for "
                f"{count.last_reason!r}: somebody sends what does not verify, or a key was changed without enrolling it. "
                "Nothing of them was stored; samples are in table refused."
            )
            row = refusals_alert_row(name, summary, clock.to_rfc3339(now.wall_us), now.wall_us // 3_600_000_000)
            try:
                self._store.raise_alert(row)
            except StorageError as error:
                logger.error("%s; the alert about refused messages waits", error)
                return
            self._refusal_alarm.mark_raised(name, now.boot_s)
            logger.critical("security: %s", summary)
