"""Fleet in a rollout, from its operator's view: real store, real signed messages, no broker."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from outstation.fleet.collector.collector import Collector
from outstation.fleet.database import rollouts
from outstation.fleet.database.store import FleetStore
from outstation.fleet.rollout import actions, journal
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.plan import Promotion, RolloutPlan, RolloutStep
from outstation.fleet.rollout.publisher import RolloutPublisher
from outstation.fleet.rollout.rollout_status import RolloutSnapshot, load_snapshot
from outstation.foundation import clock
from outstation.foundation.errors import LinkDown, StorageError
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage, PublishReceipt
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import FLEET, MODEL, NEW_MODEL, MessageSender, SignedMessage, new_key

OPERATOR = new_key(77)
NOW_US = 1_795_000_000_000_000
NOW = clock.to_rfc3339(NOW_US)
HOUR_US = 3_600_000_000
NAME = "exercise-1-1"


def promotion(**changes: Any) -> Promotion:
    return Promotion(**{"min_devices": 3, "min_batches": 20, "min_hours": 1.0, "min_agreement": 0.9, **changes})


def plan(
    *steps: tuple[str, float], name: str = NAME, target: str = "all", rules: Promotion | None = None, **changes: Any
) -> RolloutPlan:
    """Return a plan with steps shadow, canary 50 % and all, or with other `steps`."""
    taken = steps or (("shadow", 100.0), ("canary", 50.0), ("all", 100.0))
    made = [RolloutStep(strategy, percent, rules or promotion()) for strategy, percent in taken]  # type: ignore[arg-type]
    bundle_fields = (NEW_MODEL["name"], NEW_MODEL["version"], changes.pop("digest", NEW_MODEL["digest"]))
    return RolloutPlan(
        name, changes.pop("task", "exercise"), *bundle_fields, target, None, made, CanaryRules(), **changes
    )


class Recorded:
    """Link whose broker records what it receives, or is down."""

    def __init__(self) -> None:
        self.retained: dict[str, OutgoingMessage] = {}
        self.sent: list[OutgoingMessage] = []
        self.down = False
        self.fails = False
        self._receipts: list[IncomingMessage | PublishReceipt] = []

    def connect(self) -> Recorded:
        if self.down:
            raise LinkDown("nobody listens")
        if self.fails:
            raise StorageError("the disk is gone")
        return self

    def send(self, message: OutgoingMessage) -> int:
        self.sent.append(message)
        if message.retain:
            self.retained[message.topic] = message
        self._receipts.append(PublishReceipt(len(self.sent), 0, "ok"))
        return len(self.sent)

    def receive(self, timeout_s: float) -> list[IncomingMessage | PublishReceipt]:
        receipts, self._receipts = self._receipts, []
        return receipts

    def acknowledge(self, delivery: IncomingMessage) -> None:
        pass

    def close(self) -> None:
        pass


class Fleet:
    """`devices` senders, the collector's code and an operator's desk over one store."""

    def __init__(self, folder: Path, devices: int = 6, where: str | None = None) -> None:
        self.folder = folder
        self.store = FleetStore(where or folder / "fleet.db")
        self.senders = [MessageSender(f"pi-{i:02}", new_key(100 + i)) for i in range(devices)]
        for sender in self.senders:
            self.store.enrol(sender.device, sender.key.public, replace=False, now=NOW)
        self.collector = Collector(FLEET, None, self.store, new_key(99), open_link=lambda: None)  # type: ignore[arg-type,return-value]
        self.broker = Recorded()
        self.desk = RolloutPublisher(self.store, FLEET, folder, OPERATOR, self.broker.connect)
        self._counter = 0

    def close(self) -> None:
        self.store.close()

    def collect(self, *sent: SignedMessage) -> None:
        """Process messages by the collector's own code: verify, store, unfold."""
        self.collector._store([message.to_incoming() for message in sent])

    def operator(self, later_h: float = 0.0, key: SigningKey = OPERATOR) -> RolloutOperator:
        return RolloutOperator(key, FLEET, NOW_US + round(later_h * HOUR_US))

    def counter(self) -> int:
        self._counter += 1
        return self._counter

    def start(self, rollout_plan: RolloutPlan, later_h: float = 0.0, forced: str | None = None) -> Rollout:
        with self.store.transaction() as db:
            return actions.start(db, self.operator(later_h), self.counter(), rollout_plan, forced)

    def look(self, later_h: float = 2.0, name: str = NAME) -> RolloutSnapshot:
        with self.store.snapshot() as db:
            return load_snapshot(db, journal.find(db, name), NOW_US + round(later_h * HOUR_US))

    def promote(self, later_h: float = 2.0, name: str = NAME, forced: str | None = None) -> Rollout:
        seen = self.look(later_h, name)
        with self.store.transaction() as db:
            operator = self.operator(later_h)
            return actions.promote(db, operator, self.counter(), seen.rollout, seen.verdict, forced)

    def abort(self, later_h: float = 2.0, name: str = NAME) -> Rollout:
        seen = self.look(later_h, name)
        with self.store.transaction() as db:
            return actions.abort(db, self.operator(later_h), self.counter(), seen.rollout, "the labels were wrong")

    def find(self, name: str = NAME) -> Rollout:
        with self.store.snapshot() as db:
            return journal.find(db, name)

    def decided(self, name: str = NAME) -> list[tuple[Any, ...]]:
        with self.store.snapshot() as db:
            return rollouts.load_decisions(db, name)

    def in_shadow(self, senders: Sequence[MessageSender] | None = None, blocks: int = 6, **changes: Any) -> None:
        """Let devices report that they are in shadow, with their counts."""
        for sender in self.senders if senders is None else senders:
            self.collect(sender.rollout("shadow"), *(sender.shadow(**changes) for _ in range(blocks)))

    def on_probation(
        self, senders: Sequence[MessageSender], blocks: int = 6, *, settles: bool = True, **changes: Any
    ) -> None:
        """Let devices report the new bundle on probation, then settled."""
        swapped = {"model": NEW_MODEL, "other": MODEL, **changes}
        for sender in senders:
            self.collect(sender.rollout("canary", strategy="canary"))
            self.collect(*(sender.shadow(**swapped) for _ in range(blocks)))
            if settles:
                self.collect(sender.rollout("active", strategy="canary"))

    def chosen(self, step: int, rollout_plan: RolloutPlan | None = None) -> list[MessageSender]:
        wanted = (rollout_plan or self.find().plan).desired_for_step(step)
        return [sender for sender in self.senders if wanted.includes_device(sender.device)]


@contextlib.contextmanager
def fleet(folder: Path, devices: int = 6, where: str | None = None) -> Iterator[Fleet]:
    with contextlib.closing(Fleet(folder, devices, where)) as made:
        yield made


def tamper(path: Path, sql: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute(sql, values).rowcount >= 1
