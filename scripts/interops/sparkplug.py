"""A fleet as a Sparkplug edge node, read by npm's `sparkplug-payload` of the Eclipse Tahu project."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from outstation.foundation.errors import LinkDown
from outstation.integrations.sparkplug.sparkplug import Node
from outstation.integrations.sparkplug.sparkplug_payload import BOOLEAN, REBIRTH, Metric, encode
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.workbench.testing.fleet import FLEET, LocalFleet
from scripts.kit.npm import SPARKPLUG, decode_sparkplug, install
from scripts.kit.steps import Steps

DEVICE = "pi.01"
OUTAGE_S = 8.0


class Host:
    """A host that only collects: (kind, payload) in order of arrival."""

    def __init__(self, broker: BrokerConfig) -> None:
        self._broker = broker
        self._link: Link | None = None
        self.messages: list[tuple[str, bytes]] = []

    def receive(self, seconds: float) -> None:
        """Collect for a while, over lost connections."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self._link = self._link or Link(self._broker, "interop-host", subscribe=["spBv1.0/#"])
                for event in self._link.receive(0.2):
                    if isinstance(event, IncomingMessage):
                        self._link.acknowledge(event)
                        self.messages.append((event.topic.split("/")[2], event.payload))
            except LinkDown:
                self._link = None
                time.sleep(0.2)

    def command_rebirth(self) -> None:
        assert self._link is not None
        payload = encode([Metric(REBIRTH, BOOLEAN, True, 1)], 1, 0)
        self._link.send(OutgoingMessage(Node(FLEET, "outstation").topic("NCMD"), payload))

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    def has(self, kind: str, count: int = 1) -> bool:
        self.receive(0.2)
        return sum(each == kind for each, _ in self.messages) >= count


def run(folder: Path) -> None:
    """Run everything in `folder`. Raises AssertionError at the first check that fails."""
    steps = Steps()
    install(SPARKPLUG)
    with LocalFleet(folder) as fleet:
        fleet.broker.start()
        with (fleet.home / "fleet.toml").open("a", encoding="utf-8") as file:
            file.write('\n[sparkplug]\nmax_age = "3 s"\n')
        # A recording at its own speed, so that results are as old as their delivery is late.
        device = fleet.add_device(DEVICE).add_replay_stream(100_000, 1).add_task("exercise")
        host = Host(BrokerConfig(url=fleet.broker.url))
        host.receive(0.5)
        fleet.collector.start()
        device.start_and_wait()
        steps.wait("birth of the node", lambda: host.has("NBIRTH"))
        steps.wait("birth of the device", lambda: host.has("DBIRTH"))
        steps.wait("data", lambda: host.has("DDATA", 3))
        births = sum(kind == "NBIRTH" for kind, _ in host.messages)
        host.command_rebirth()
        steps.wait("births again, on command", lambda: host.has("NBIRTH", births + 1))
        fleet.broker.stop()
        host.receive(OUTAGE_S)
        fleet.broker.start()
        steps.report(f"the broker was gone for {OUTAGE_S:.0f} s")
        steps.wait("the backlog, marked as historical", lambda: count_historical(host) > 0, 120)
        device.stop()
        steps.wait("death of the device", lambda: host.has("DDEATH"))
        fleet.collector.stop()
        steps.wait("death of the node", lambda: host.has("NDEATH"))
        host.close()
        report(steps, host)


def count_historical(host: Host) -> int:
    host.receive(1.0)
    return sum(bool(metric.get("isHistorical")) for _, message in decode(host) for metric in message["metrics"])


def decode(host: Host) -> list[tuple[str, dict[str, Any]]]:
    decoded = decode_sparkplug([payload for _, payload in host.messages])
    return [(kind, message) for (kind, _), message in zip(host.messages, decoded, strict=True)]


def report(steps: Steps, host: Host) -> None:
    """Report what the library read, and check the order of sequence numbers. Raises AssertionError."""
    decoded = decode(host)
    counts = {kind: sum(kind == each for each, _ in decoded) for kind, _ in decoded}
    steps.report(f"messages decoded: {counts}")
    last = {
        metric["name"]: metric["type"] for kind, message in decoded if kind == "DBIRTH" for metric in message["metrics"]
    }
    steps.report(f"metrics of the device: {last}")
    assert {"exercise/Label", "exercise/Score", "Health/Backlog", "Alerts/Open"} <= last.keys(), last
    expected = None
    for kind, message in decoded:
        if kind in ("NCMD", "NDEATH"):
            continue
        number = message["seq"]
        assert (kind == "NBIRTH" and number == 0) or expected in (None, number), (kind, number, expected)
        expected = (number + 1) % 256
    steps.report("sequence numbers follow each other")
    historical = [m for _, message in decoded for m in message["metrics"] if m.get("isHistorical")]
    steps.report(f"historical metrics: {len(historical)}, first {historical[0]}")
