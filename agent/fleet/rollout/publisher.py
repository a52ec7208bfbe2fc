"""Where decisions are made and published: counter, transaction, broker, in this order.

Only one process of a fleet's folder does so at a time, so that counters and the operator's one connection are never
shared. What was decided stays decided where the broker cannot be reached: the next who publishes sends it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from agent import clock
from agent.errors import LinkDown, UsageError
from agent.fleet.commands import lock_operator, reserve_counter
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.rollout import journal, publish
from agent.fleet.rollout.actions import RolloutOperator
from agent.fleet.rollout.journal import Rollout
from agent.wire.keys import SigningKey

RolloutAction = Callable[[Connection, RolloutOperator, int], Rollout]


class ClosableBrokerConnection(publish.BrokerConnection, Protocol):
    def close(self) -> None: ...


class RolloutPublisher:
    """One fleet's. `connect` raises LinkDown. Every method raises StorageError and UsageError."""

    def __init__(
        self,
        store: FleetStore,
        fleet: str,
        folder: Path,
        key: SigningKey,
        connect: Callable[[], ClosableBrokerConnection],
        *,
        role: str = "operator",
    ) -> None:
        self.store = store
        self._fleet, self._folder, self._key, self._connect, self._role = fleet, folder, key, connect, role

    def execute(self, action: RolloutAction) -> tuple[Rollout, str]:
        """Decide, then publish; why that did not succeed, "" where it did."""
        with reserve_counter(self._folder, lambda: time.time_ns() // 1_000_000) as counter:
            try:
                with self.store.transaction() as db:
                    db.lock_table("rollouts")
                    operator = RolloutOperator(self._key, self._fleet, clock.read().wall_us, self._role)
                    done = action(db, operator, counter)
            except UsageError:
                # What was decided before may not be published yet.
                self._publish()
                raise
            return done, self._publish()

    def publish(self) -> str:
        """What is desired, again; why that did not succeed, "" where it did."""
        with lock_operator(self._folder):
            return self._publish()

    def _publish(self) -> str:
        with self.store.snapshot() as db:
            rows = journal.load_all_desired(db)
        if not rows:
            return ""
        try:
            with contextlib.closing(self._connect()) as link:
                publish.publish(link, rows)
        except LinkDown as down:
            return str(down)
        return ""
