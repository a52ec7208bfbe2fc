"""Alerts that the collector raises and clears itself: fleet-wide drift, and references unlike the fleet's.

They depend on stored data alone, so a restarted collector, or another one, comes to the same alerts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from agent import clock
from agent.clock import ClockReading
from agent.fleet.database.ingest import Arrival
from agent.fleet.database.store import FleetStore
from agent.wire.messages import Body

POLL_INTERVAL_S = 60.0


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
