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
from agent.fleet.commands import alone, next_counter
from agent.fleet.database.interface import Connection
from agent.fleet.database.store import FleetStore
from agent.fleet.rollout import journal, publish
from agent.fleet.rollout.actions import Operator
from agent.fleet.rollout.journal import Rollout
from agent.wire.keys import SigningKey

Deed = Callable[[Connection, Operator, int], Rollout]


class Link(publish.Connection, Protocol):
    def close(self) -> None: ...


class Desk:
    """One fleet's. `connect` raises LinkDown. Every method raises StorageError and UsageError."""

    def __init__(
        self,
        store: FleetStore,
        fleet: str,
        folder: Path,
        key: SigningKey,
        connect: Callable[[], Link],
        *,
        by: str = "operator",
    ) -> None:
        self.store = store
        self._fleet, self._folder, self._key, self._connect, self._by = fleet, folder, key, connect, by

    def act(self, deed: Deed) -> tuple[Rollout, str]:
        """Decide, then publish; why that did not succeed, "" where it did."""
        with next_counter(self._folder, lambda: time.time_ns() // 1_000_000) as counter:
            try:
                with self.store.transaction() as db:
                    db.alone("rollouts")
                    operator = Operator(self._key, self._fleet, clock.read().wall_us, self._by)
                    done = deed(db, operator, counter)
            except UsageError:
                # What was decided before may not be published yet.
                self._publish()
                raise
            return done, self._publish()

    def publish(self) -> str:
        """What is desired, again; why that did not succeed, "" where it did."""
        with alone(self._folder):
            return self._publish()

    def _publish(self) -> str:
        with self.store.snapshot() as db:
            rows = journal.all_desired(db)
        if not rows:
            return ""
        try:
            with contextlib.closing(self._connect()) as link:
                publish.publish(link, rows)
        except LinkDown as down:
            return str(down)
        return ""
