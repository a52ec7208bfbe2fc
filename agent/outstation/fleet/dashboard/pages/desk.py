"""Decisions of operators about roll-outs, signed with the operator's key that this process was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.interface import Connection
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import actions, journal
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.publisher import RolloutPublisher
from outstation.fleet.rollout.rollout_status import load_snapshot
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.protocol.transport.packets import BrokerLink
from outstation.protocol.wire.keys import SigningKey

RolloutAction = Literal["pause", "resume", "promote", "abort"]
ROLLOUT_ACTIONS: tuple[RolloutAction, ...] = ("pause", "resume", "promote", "abort")


class OperatorDesk:
    """The operator's key with what its decisions need: the fleet's folder and the way to the broker."""

    def __init__(self, config: FleetConfig, folder: Path, key: SigningKey) -> None:
        self._config, self._folder, self.key = config, folder, key

    def decide(self, store: FleetStore, name: str, action: str, reason: str, by: str) -> str:
        """Record and publish a decision about a roll-out; return a sentence. Raises UsageError and StorageError."""
        if action not in ROLLOUT_ACTIONS:
            raise UsageError(f"there is no action {action!r} for a roll-out")
        if action == "abort" and not reason:
            raise UsageError("say why the roll-out is aborted; the reason is part of the signed decision")
        with store.snapshot() as db:
            current = journal.find(db, name)
            verdict = load_snapshot(db, current, clock.read().wall_us).verdict if current.is_open else None
        signed_reason = f"{reason} ({by}, by the dashboard)" if reason else ""

        def run(db: Connection, operator: RolloutOperator, counter: int) -> Rollout:
            if action == "pause":
                return actions.pause(db, operator, current)
            if action == "resume":
                return actions.resume(db, operator, current)
            if action == "abort":
                return actions.abort(db, operator, counter, current, signed_reason, verdict)
            if verdict is None:
                raise UsageError(f"roll-out {name} is {current.state}; there is nothing to promote")
            return actions.promote(db, operator, counter, current, verdict, signed_reason or None)

        fleet = self._config.fleet.name
        publisher = RolloutPublisher(store, fleet, self._folder, self.key, self._connect)
        done, problem = publisher.execute(run)
        sentence = f"{name} is {done.state} at step {done.step}"
        return f"{sentence}; not published yet: {problem}" if problem else sentence

    def _connect(self) -> BrokerLink:
        # paho is needed for a decision only.
        from outstation.protocol.transport.mqtt import Link

        client = f"outstation-{self._config.fleet.name}-dashboard-{os.getpid()}"
        return Link(self._config.command_broker, client)
