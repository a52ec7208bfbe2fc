"""Roll-out publisher: reserve a counter, commit a decision, publish the desired state, in this order.

One process per fleet folder does this at a time, so counters and the operator's single connection are never shared. A
committed decision stays valid if the broker is unreachable; the next program that publishes sends it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from outstation.fleet.commands import lock_operator, reserve_counter, send_retained
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import journal
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.fleet.rollout.desired_state import DesiredMessage
from outstation.fleet.rollout.journal import Rollout
from outstation.foundation import clock
from outstation.foundation.errors import LinkDown, UsageError
from outstation.protocol.transport.packets import BrokerLink, OutgoingMessage
from outstation.protocol.wire import topics
from outstation.protocol.wire.keys import SigningKey
from outstation.protocol.wire.topics import cloudevent_properties

RolloutAction = Callable[[Connection, RolloutOperator, int], Rollout]


class RolloutPublisher:
    """Publisher of one fleet. `connect` raises LinkDown. Every method raises StorageError and UsageError."""

    def __init__(
        self,
        store: FleetStore,
        fleet: str,
        folder: Path,
        key: SigningKey,
        connect: Callable[[], BrokerLink],
        *,
        role: str = "operator",
    ) -> None:
        self.store = store
        self._fleet, self._folder, self._key, self._connect, self._role = fleet, folder, key, connect, role

    def execute(self, action: RolloutAction) -> tuple[Rollout, str]:
        """Commit `action`, then publish. Return the roll-out and why publishing failed, "" if it succeeded."""
        with reserve_counter(self._folder, lambda: clock.read().wall_us // 1000) as counter:
            try:
                with self.store.transaction() as db:
                    db.lock_table("rollouts")
                    operator = RolloutOperator(self._key, self._fleet, clock.read().wall_us, self._role)
                    rollout = action(db, operator, counter)
            except UsageError:
                # An earlier decision may still be unpublished.
                self._publish()
                raise
            return rollout, self._publish()

    def publish(self) -> str:
        """Publish the desired state again. Return why it failed, "" if it succeeded."""
        with lock_operator(self._folder):
            return self._publish()

    def _publish(self) -> str:
        with self.store.snapshot() as db:
            rows = journal.load_all_desired(db)
        if not rows:
            return ""
        try:
            with contextlib.closing(self._connect()) as link:
                send_retained(link, [_build_message(row) for row in rows])
        except LinkDown as down:
            return str(down)
        return ""


def _build_message(row: DesiredMessage) -> OutgoingMessage:
    topic = topics.parse(row.topic)
    target = f"{topic.device}/{topic.task}" if topic.task else topic.device
    now = clock.now_rfc3339()
    event = cloudevent_properties(topic, f"{target}/desired/{row.counter}", now)
    return OutgoingMessage(row.topic, row.payload, (("jws", row.jws), *event), retain=True)
