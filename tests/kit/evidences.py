"""Fleet with a history of signed messages: drift, incidents, labels, commands, a key change and two rollouts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outstation.evidence.make import EvidenceFolder, EvidenceSources, write_folder
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.repository import publish as publishing
from outstation.fleet.rollout import actions, journal
from outstation.fleet.rollout.actions import RolloutOperator
from outstation.fleet.rollout.plan import Promotion, RolloutPlan, RolloutStep
from outstation.fleet.rollout.promotion import StepVerdict
from outstation.foundation import clock
from outstation.ml.model.bundle import builtin
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.wire import key_rotation, keys
from outstation.protocol.wire.desired_state import CanaryRules
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import FLEET, NEW_MODEL, MessageSender, SignedMessage, new_key
from scripts.kit.bundles import KEY, change_manifest
from tests.kit.repositories import Depot

T0_US = clock.parse_rfc3339("2026-11-10T06:00:00Z")
HOUR_US = 3_600_000_000
EXERCISE = builtin.bundles_dir() / "exercise"
_BOUNDS = np.linspace(-4, 4, 17)


def at(hours: float) -> str:
    return clock.to_rfc3339(T0_US + round(hours * HOUR_US))


@dataclass
class Story:
    """Fleet folder with its database; times are hours since the start."""

    home: Path
    config: FleetConfig
    store: FleetStore
    operator: SigningKey
    digest: str
    newer: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begin(cls, home: Path) -> Story:
        config = init_fleet(home, FLEET, BrokerConfig(url="mqtt://127.0.0.1:1"))
        store = FleetStore(Path(config.fleet.db))
        operator = keys.load_private(Path(config.operator.key_file))
        digest = shipped_digest()
        return cls(home, config, store, operator, digest)

    def device(self, name: str, seed: int) -> MessageSender:
        sender = MessageSender(name, new_key(seed), f"5f0c2f6e-1a54-4d0b-9a53-{seed:012d}")
        self.store.enrol(name, sender.key.public, replace=False, now=at(-1))
        return sender

    def collect(self, sender: MessageSender, *sent: SignedMessage, hours: float) -> None:
        self.store.ingest([Arrival(sender.verify(message)) for message in sent], [], at(hours))

    @property
    def model(self) -> dict[str, str]:
        return {"name": "exercise", "version": "1.0.0", "digest": self.digest}

    def operated(self, hours: float) -> RolloutOperator:
        return RolloutOperator(self.operator, FLEET, T0_US + round(hours * HOUR_US))

    def sources(self, **changes: Any) -> EvidenceSources:
        defaults: dict[str, Any] = {
            "fleet": FLEET,
            "fleet_dir": self.home,
            "operator": self.operator,
            "operators": [self.operator.public],
            "collector": keys.load_private(Path(self.config.collector.key_file)).public,
            "publishers": [*builtin.publisher_keys(), KEY.public],
        }
        return EvidenceSources(**{**defaults, **changes})

    def make(self, out: Path, moment: str | None = None, **changes: Any) -> EvidenceFolder:
        return write_folder(self.store, self.sources(**changes), out, moment)


def shipped_digest() -> str:
    from outstation.ml.model.bundle import bundle

    return bundle.read(EXERCISE, None).digest


def activated(
    story: Story, sender: MessageSender, hours: float, why: str = "configured", model: dict[str, str] | None = None
) -> SignedMessage:
    model = model or story.model
    evidence = {"task": "exercise", "from": None, "to": model, "why": why, "kind": "classify"}
    summary = f"exercise: exercise {model['version']} was activated."
    return sender.append("audit", event="activated", summary=summary, evidence=evidence, time=at(hours))


def health(story: Story, sender: MessageSender, hours: float, **more: Any) -> SignedMessage:
    tasks = {"exercise": {"stream": "watch", "row": 0, "model": story.model, **more}}
    return sender.append("health", streams={}, tasks=tasks, agent="0.1.0", time=at(hours))


def quality(story: Story, sender: MessageSender, hours: float, accuracy: float = 0.9, n: int = 400) -> SignedMessage:
    half = 1.96 * (accuracy * (1 - accuracy) / n) ** 0.5
    whole = {"metric": "accuracy", "value": accuracy, "low": accuracy - half, "high": accuracy + half, "n": n}
    labels = {"n": n, "coverage": 0.2, "delay_s": {"median": 5400.0, "p90": 9000.0}, "sources": {"human": n}}
    members = {"model": story.model, "labels": labels, "metrics": [whole]}
    return sender.append("quality", task="exercise", **members, time=at(hours))


def window(story: Story, sender: MessageSender, number: int, hours: float, state: str = "ok") -> SignedMessage:
    """Return a drift window of one hour; `state` is that of its field ax."""
    rows = np.random.default_rng(number).normal(0.0 if state == "ok" else 0.8, 1.0, 200)
    feature = {
        "counts": np.histogram(rows, _BOUNDS)[0].tolist(), "missing": 0, "below": 0, "above": 0,
        "mean": float(rows.mean()), "m2": float(rows.var() * len(rows)), "state": state, "fault": None,
        "cusum": {"mean": [3.0, 0.0] if state == "drift" else [0.0, 0.0], "spread": [0.0, 0.0]},
    }  # fmt: skip
    span = {"index": number, "rows": [1, 2000], "n": 2000, "from": at(hours), "to": at(hours + 1)}
    members: dict[str, Any] = {
        "model": story.model,
        "reference": {"shipped": "sha256:01", "site": None},
        "window": span,
        "features": {"ax": feature},
        "output": {"counts": {"PEN": 20}, "psi": 0.1, "state": "ok"},
        "estimate": {"accuracy": 0.9, "low": 0.8, "high": 1.0},
        "state": state,
    }
    return sender.append("drift", task="exercise", **members, time=at(hours + 1))


def alert(sender: MessageSender, identity: str, state: str, hours: float, summary: str, **more: Any) -> SignedMessage:
    return sender.alert(identity, state, summary, time=at(hours), **more)


def command(sender: MessageSender, name: str, hours: float, kid: str, summary: str, **args: str) -> SignedMessage:
    evidence = {"id": "c1", "name": name, "args": args, "counter": 7, "kid": kid, "outcome": "done"}
    text = f"Command {name}: {summary}"
    return sender.append("audit", event="command", summary=text, evidence=evidence, time=at(hours))


def rotate(story: Story, sender: MessageSender, hours: float, new: SigningKey) -> None:
    """Rotate the device's key; the new key signs all later messages."""
    evidence = key_rotation.build_evidence(FLEET, sender.device, sender.log, sender.seq + 1, sender.key.public, new)
    sent = sender.append(
        "audit", event=key_rotation.ROTATION_EVENT, summary="A new key signs.", evidence=evidence, time=at(hours)
    )
    story.collect(sender, sent, hours=hours)
    sender.key = new


def plan(name: str, digest: str = NEW_MODEL["digest"], version: str = "1.1.0") -> RolloutPlan:
    rule = Promotion(min_devices=1, min_batches=20, min_hours=1.0, min_agreement=0.9)
    steps = [RolloutStep("shadow", 100.0, rule), RolloutStep("canary", 50.0, rule), RolloutStep("all", 100.0, rule)]
    return RolloutPlan(name, "exercise", "exercise", version, digest, "all", None, steps, CanaryRules())


def phase(
    sender: MessageSender, rollout: str, name: str, hours: float, reason: str = "", version: str = "1.1.0"
) -> SignedMessage:
    """Return an audit message about the phase of a device in a rollout."""
    where = {"task": "exercise", "rollout": rollout, "bundle": "exercise", "version": version}
    how = {"digest": NEW_MODEL["digest"], "strategy": "canary", "phase": name, "reason": reason, "numbers": {}}
    summary = f"exercise: exercise {version}: {name}{f': {reason}' if reason else ''}."
    return sender.append("audit", event="rollout", summary=summary, evidence={**where, **how}, time=at(hours))


def shadow(story: Story, sender: MessageSender, number: int, hours: float, agreeing: int = 96) -> SignedMessage:
    """Return a comparison of 100 shadow windows."""
    answered = {"windows": 100, "seconds": 0.05, "expected_accuracy": {"n": 100, "mean": 0.9, "m2": 1.0}}
    faster = {"windows": 100, "seconds": 0.04, "expected_accuracy": {"n": 100, "mean": 0.92, "m2": 1.0}}
    members = {"stats": answered, "other_stats": faster, "labelled": [8, 0, 1, 1]}
    rows = [1 + 100 * number, 100 + 100 * number]
    pair = {"rollout": "exercise-1-1", "model": story.model, "other": story.newer}
    counts = {"rows": rows, "batches": 1, "n": 100, "agreeing": agreeing}
    return sender.append("shadow", task="exercise", **pair, **members, **counts, time=at(hours))


def good(summary: str) -> StepVerdict:
    return StepVerdict("promote", summary, [], [], 4, 3, 0, 4, 26.0)


def roll_out(story: Story, senders: list[MessageSender]) -> None:
    """Run one complete rollout, and one that a device rolls back and the operator aborts."""
    with story.store.transaction() as db:
        actions.start(db, story.operated(30), 1, plan("exercise-1-1", story.newer["digest"]))
    for number, sender in enumerate(senders):
        hours = 31 + number / 10
        story.collect(sender, phase(sender, "exercise-1-1", "shadow", hours), hours=hours)
        messages = [shadow(story, sender, i, hours + i / 10, 96 - i % 3) for i in range(12 if number else 4)]
        story.collect(sender, *messages, hours=hours + 2)
    for number, hours in enumerate((56, 80), 2):
        reason = "4 devices agree in 97.2 % of 41,200 windows [96.4 %, 97.9 %], asked for 90 %"
        with story.store.transaction() as db:
            actions.promote(db, story.operated(hours), number, journal.find(db, "exercise-1-1"), good(reason))
    with story.store.transaction() as db:
        actions.promote(db, story.operated(110), 4, journal.find(db, "exercise-1-1"), good("all 4 devices run it"))
        actions.start(db, story.operated(120), 5, plan("exercise-1-2", "sha256:" + "ef" * 32, "1.2.0"))
    for number, sender in enumerate(senders):
        hours = 81 + number / 10
        now = activated(story, sender, hours, "roll-out", story.newer)
        story.collect(sender, now, phase(sender, "exercise-1-1", "active", hours), hours=hours)
    bad = phase(senders[0], "exercise-1-2", "rolled_back", 122, "batch_timeout", "1.2.0")
    story.collect(senders[0], bad, hours=122)
    with story.store.transaction() as db:
        seen = journal.find(db, "exercise-1-2")
        actions.abort(
            db, story.operated(123), 6, seen, "1 of 4 devices took it back: a batch took 31 s, 30 s are allowed"
        )


def publish(story: Story) -> None:
    """Publish the built-in bundle and a newer version by the tests' publisher, under two root keys."""
    depot = Depot(story.home).create(roots=2, threshold=2)
    publishing.publish(depot.folder, EXERCISE, builtin.publisher_keys(), run_probe=False)
    newer = Path(shutil.copytree(EXERCISE, story.home / "newer"))
    change_manifest(newer, lambda head: head.update(version="1.1.0"))
    story.newer = {"name": "exercise", "version": "1.1.0", "digest": depot.publish(newer).target_metadata.digest}
    shutil.rmtree(newer)


def build_story(home: Path) -> Story:
    """Return a fleet with every kind of event."""
    story = Story.begin(home)
    publish(story)
    senders = [story.device(f"pi-{i:02}", i) for i in range(1, 5)]
    for sender in senders:
        story.collect(sender, activated(story, sender, 0), health(story, sender, 0.1), hours=0.2)
        for hour in range(0, 100, 4):
            state = "drift" if sender is senders[0] and 48 <= hour < 72 else "ok"
            story.collect(sender, window(story, sender, hour, hour, state), hours=hour + 1.1)
    first, second, third, fourth = senders
    story.collect(first, alert(first, "exercise/ax/drift/1", "raised", 49, "ax: spread fell to 0.6."), hours=49)
    stuck = alert(
        second, "wy/fault/1", "raised", 60, "wy: repeats one value.", alert="fault", severity="critical", subject="wy"
    )
    story.collect(second, stuck, hours=60)
    roll_out(story, senders)
    story.collect(first, alert(first, "exercise/ax/drift/1", "cleared", 73.5, "ax: as usual again."), hours=74)
    disk = {"alert": "storage", "subject": "disk", "severity": "info", "clock": "unsynced"}
    story.collect(third, alert(third, "storage/1", "raised", 90, "90 % full.", **disk), hours=90)
    story.collect(third, alert(third, "storage/1", "cleared", 95, "Room again.", **disk), hours=95)
    kid = story.operator.public.kid
    back = command(third, "rollback", 96, kid, "exercise 1.0.0 runs again.", task="exercise")
    story.collect(third, activated(story, third, 96, "rollback"), back, hours=96)
    labels = '{"row":[17],"label":["lifted a box"]}'
    label_command = command(fourth, "label", 97, kid, "1 label was taken.", task="exercise", labels=labels)
    story.collect(fourth, label_command, hours=97)
    rotate(story, fourth, 98, new_key(44))
    for number, sender in enumerate(senders):
        runs = {} if sender is third else {"model": story.newer}
        last = [quality(story, sender, 125, 0.93 - 0.04 * number), health(story, sender, 126, **runs)]
        story.collect(sender, *last, hours=126)
    return story
