"""Replayed devices that send until the collectors have acknowledged everything, over one shared connection."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Sequence

from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage

# Messages of one device per turn.
_AT_ONCE = 10


class Players:
    """Context manager that plays the devices."""

    def __init__(self, url: str, senders: Sequence[MessageSender], messages: int, *, are_held: bool = False) -> None:
        """`are_held`: the last message of each device waits for `release`."""
        self._broker = BrokerConfig(url=url)
        self._logs = {sender.device: _log(sender, messages) for sender in senders}
        self._safe: dict[str, set[int]] = defaultdict(set)
        self._stop, self._released = threading.Event(), threading.Event()
        if not are_held:
            self.release()
        self._thread = threading.Thread(target=self._play)
        self.total = sum(map(len, self._logs.values()))

    def __enter__(self) -> Players:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def release(self) -> None:
        self._released.set()

    @property
    def acknowledged(self) -> int:
        return sum(map(len, [*self._safe.values()]))

    @property
    def done(self) -> bool:
        return self.acknowledged == self.total

    def _play(self) -> None:
        link = Link(self._broker, "players", subscribe=[f"outstation/{FLEET}/+/ack"])
        while not self._stop.is_set() and not self.done:
            for device, log in self._logs.items():
                safe = self._safe[device]
                allowed = log if self._released.is_set() else log[:-1]
                for message in [sent for sent in allowed if sent.seq not in safe][:_AT_ONCE]:
                    link.send(message.to_outgoing())
            self._receive(link)
        link.close()

    def _receive(self, link: Link) -> None:
        events = link.receive(0.3)
        while events:
            for event in events:
                if isinstance(event, IncomingMessage):
                    link.acknowledge(event)
                    self._obey(event.payload)
            events = link.receive(0.02)

    def _obey(self, payload: bytes) -> None:
        ack = json.loads(payload)
        holes = {seq for a, b in ack["missing"] for seq in range(a, b + 1)}
        # Never decreases: a lower acknowledgement does not revoke an earlier one.
        self._safe[ack["device"]] |= set(range(1, ack["through"] + 1)) - holes


def _log(sender: MessageSender, messages: int) -> list[SignedMessage]:
    """Return results, and finally the task's progress for the audit."""
    return [*(sender.results() if n % 3 else sender.health() for n in range(1, messages)), sender.health_with_cursor()]
