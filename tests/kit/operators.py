"""Operator as a device sees it, and a device's command control that can crash and reopen, in this process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.commands.executor import Action, CommandExecutor, SignerAction
from outstation.device.commands.receiver import CommandReceiver
from outstation.device.machine.trusted_keys import TrustedKeys
from outstation.device.pipeline.tasks import Effect
from outstation.device.recovery.open import open_store
from outstation.device.store.command_log import CommandAnswer
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import MessageRefused
from outstation.protocol.transport.packets import IncomingMessage
from outstation.protocol.wire import jws
from outstation.protocol.wire.jws import Signer, encode
from outstation.protocol.wire.keys import SigningKey
from outstation.workbench.testing.messages import new_key

FLEET, DEVICE = "acme", "pi-07"
TOPIC = f"outstation/{FLEET}/{DEVICE}/cmd"
NOW = ClockReading(1_795_000_000_000_000, 1000.0, "synced")
MINUTE_US = 60_000_000


def trusted_keys(
    store: Store, author: MessageLog, *operators: SigningKey, now: Callable[[], ClockReading] = lambda: NOW
) -> TrustedKeys:
    """Return the keys of a device that has no repository, and these operators in its config."""
    return TrustedKeys(store, author, now, [Signer("operator", key.public) for key in operators])


@dataclass
class Operator:
    """Signer of commands; `now` is the operator's clock."""

    key: SigningKey = field(default_factory=lambda: new_key(77))
    now_us: int = NOW.wall_us
    counters: Any = field(default_factory=lambda: itertools.count(1))

    def command(
        self, name: str = "report", /, *, topic: str = TOPIC, retained: bool = False, **changes: Any
    ) -> IncomingMessage:
        """Return a delivery; `changes` replace members of the payload."""
        counter = next(self.counters)
        head = {"v": 1, "kind": "cmd", "device": topic.split("/")[2], "id": f"id-{counter}", "name": name, "args": {}}
        times = {
            "issued": clock.to_rfc3339(self.now_us),
            "expires": clock.to_rfc3339(self.now_us + 10 * MINUTE_US),
        }
        payload = encode({**head, "counter": counter, **times, **changes})
        token = jws.sign(self.key, topic, payload)
        return IncomingMessage(topic, payload, (token,), retained, 1, 1, b"corr")


class Desk:
    """Store, author, commands and control of one device; `done` lists the executed commands."""

    def __init__(self, folder: Path, *, operator: Operator | None = None, actions: Mapping[str, Action] = {}) -> None:
        self.folder, self.operator = folder, operator or Operator()
        self.done: list[tuple[str, dict[str, str]]] = []
        self._actions = actions
        self.signer_actions: dict[str, SignerAction] = {}
        self.open()

    def open(self) -> None:
        self.store = open_store(self.folder)
        self.author = MessageLog(FLEET, DEVICE, new_key(1), self.store.log_id, self.store.boot, 120_000)
        self.trusted = trusted_keys(self.store, self.author, self.operator.key)
        self.commands = CommandReceiver(self.store, self.author, self.trusted)
        plain = {name: self._plain(name) for name in ("run", "pause", "resume", "report", "set-schedule", "rollback")}
        actions = {**plain, "wipe": self._plain("wipe"), "rotate-key": self._plain("rotate-key"), **self._actions}
        self.control = CommandExecutor(self.store, self.author, self.commands, actions, self.signer_actions)

    def crash(self) -> None:
        """Close without a final message, and reopen."""
        self.store.close()
        self.open()

    def obey(self, *deliveries: IncomingMessage, now: ClockReading = NOW) -> list[CommandAnswer]:
        """Process deliveries as the uplink and the main loop do, and return all answers so far."""
        for delivery in deliveries:
            self.commands.accept(delivery)
        self.control.tick(now)
        return self.answers()

    def refused(self, delivery: IncomingMessage) -> str:
        """Return the reason why the uplink rejects this delivery, or ""."""
        try:
            self.commands.accept(delivery)
        except MessageRefused as refusal:
            return refusal.reason
        return ""

    def answers(self) -> list[CommandAnswer]:
        with self.store.transaction() as tx:
            return tx.commands.unsent(0)

    def audit(self, event: str = "command") -> list[dict[str, Any]]:
        """Return the evidence of the audit messages of this kind."""
        bodies = [msgspec.json.decode(message.payload) for message in self.store.unacknowledged_messages(0, 1000)]
        return [body["evidence"] for body in bodies if body.get("event") == event]

    def _plain(self, name: str) -> Callable[[Mapping[str, str], ClockReading], Effect]:
        def act(args: Mapping[str, str], now: ClockReading) -> Effect:
            self.done.append((name, dict(args)))
            return Effect(f"{name} done")

        return act
