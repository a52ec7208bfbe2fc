"""The Sparkplug edge node at the collector, with a real broker and a real database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.bridge.stored_devices import StoredDevices
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.foundation import clock
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.integrations.sparkplug import sparkplug
from outstation.integrations.sparkplug.sparkplug import Node
from outstation.integrations.sparkplug.sparkplug_payload import BOOLEAN, REBIRTH, Metric, _payload_type, encode
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker
from outstation.workbench.testing.messages import MessageSender, SignedMessage
from outstation.workbench.testing.patience import TIMEOUT_S

NOW = "2026-01-01T00:00:00Z"
NODE = Node("acme", "outstation")
MAX_AGE_S = 60.0


class Host:
    """A Sparkplug host: every message in order, as (kind, device, payload)."""

    def __init__(self, broker: BrokerConfig) -> None:
        self.link = Link(broker, "host", subscribe=["spBv1.0/#"])
        self.messages: list[tuple[str, str, Any]] = []

    def wait(self, event: str, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{event}; messages: {self.messages}"
            self.receive(0.1)
        return value

    def receive(self, timeout_s: float) -> None:
        for event in self.link.receive(timeout_s):
            if isinstance(event, IncomingMessage):
                self.link.acknowledge(event)
                assert not event.retained
                _, _, kind, _, *device = event.topic.split("/")
                payload = _payload_type()()
                payload.ParseFromString(event.payload)
                self.messages.append((kind, "".join(device), payload))

    def payloads(self, kind: str) -> list[Any]:
        return [payload for each, _, payload in self.messages if each == kind]

    def scores(self) -> list[Any]:
        return [metric for metric in self.metrics("DDATA") if metric.name == "exercise/Score"]

    def metrics(self, kind: str) -> list[Any]:
        return [metric for payload in self.payloads(kind) for metric in payload.metrics]


class Site:
    def __init__(self, folder: Path, broker: MosquittoBroker) -> None:
        self.broker, self.file = BrokerConfig(url=broker.url), folder / "fleet.db"
        self.store = FleetStore(self.file)
        self.sender = MessageSender("pi.01")
        self.store.enrol("pi.01", self.sender.key.public, replace=False, now=NOW)

    def ingest(self, *messages: SignedMessage) -> None:
        arrivals = [Arrival(self.sender.verify(message)) for message in messages]
        self.store.ingest(arrivals, [], clock.now_rfc3339())

    def results(self, *ages_s: float) -> SignedMessage:
        now_us, n = clock.read().wall_us, len(ages_s)
        rows = [self.sender.row + i + 1 for i in range(n)]
        times = [now_us - int(age * 1e6) for age in ages_s]
        columns = {"row": rows, "t": times, "label": ["PEN"] * n, "score": [0.5] * n}
        return self.sender.results(n, columns=columns)

    def bridge(self) -> BridgeThread:
        return sparkplug.build_publisher(
            *(NODE, self.broker, "edge", lambda: StoredDevices(self.file, every_message=True)),
            max_age_s=MAX_AGE_S,
            poll_interval_s=0.1,
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with MosquittoBroker(tmp_path) as broker:
        site = Site(tmp_path, broker)
        yield site
        site.store.close()


@pytest.fixture
def host(site: Site) -> Iterator[Host]:
    host = Host(site.broker)
    yield host
    host.link.close()


def test_a_session_from_birth_to_death(site: Site, host: Host) -> None:
    site.ingest(site.sender.state(), site.results(5))
    with site.bridge():
        host.wait("births", lambda: host.payloads("DBIRTH"))
        assert [kind for kind, _, _ in host.messages] == ["NBIRTH", "DBIRTH"]
        names = [metric.name for metric in host.metrics("DBIRTH")]
        assert names == ["exercise/Label", "exercise/Score", "Alerts/Open", "Alerts/Newest"]

        # A new kind of metric makes a new birth.
        site.ingest(site.sender.drift("drift"))
        host.wait("a birth with drift", lambda: "exercise/Drift" in [metric.name for metric in host.metrics("DBIRTH")])

        # After an outage: three old results and a new one.
        site.ingest(site.results(3000, 2000), site.results(1000, 1))
        scores = host.wait("data", lambda: host.scores() if len(host.scores()) == 4 else [])
        assert [metric.is_historical for metric in scores] == [True, True, True, False]
        assert [metric.timestamp for metric in scores] == sorted(metric.timestamp for metric in scores)

        count = len(host.payloads("NBIRTH"))
        host.link.send(OutgoingMessage(NODE.topic("NCMD"), encode([Metric(REBIRTH, BOOLEAN, True, 1)], 1, 0)))
        host.wait("births again", lambda: len(host.payloads("NBIRTH")) > count)
        host.wait("a device's birth again", lambda: len(host.payloads("DBIRTH")) == 3)

        site.ingest(site.sender.state("stopped"))
        host.wait("its death", lambda: host.payloads("DDEATH"))
        site.ingest(site.sender.state())
        host.wait("its birth", lambda: len(host.payloads("DBIRTH")) == 4)
        site.store.revoke("pi.01", None, NOW)
        host.wait("death of a revoked device", lambda: len(host.payloads("DDEATH")) == 2)
    host.wait("the node's death", lambda: host.payloads("NDEATH"))
    sequence = [payload.seq for kind, _, payload in host.messages if kind[0] in "ND" and kind not in ("NDEATH", "NCMD")]
    births = [i for i, seq in enumerate(sequence) if seq == 0]
    assert len(births) == 2
    assert all(later in (earlier + 1, 0) for earlier, later in pairwise(sequence))
    [death], [birth, _] = host.payloads("NDEATH"), host.payloads("NBIRTH")
    assert not death.HasField("seq")
    assert death.metrics[0].long_value == birth.metrics[0].long_value


def test_the_sequence_number_wraps(site: Site, host: Host) -> None:
    site.ingest(site.sender.state(), site.results(5))
    with site.bridge():
        host.wait("births", lambda: host.payloads("DBIRTH"))
        for i in range(300):
            site.ingest(site.results(300 - i))
            host.receive(0.02)
        host.wait("all", lambda: len(host.scores()) >= 300)
        # Each number follows the one before, modulo 256.
        numbers = [payload.seq for _, _, payload in host.messages]
        assert numbers == [i % 256 for i in range(len(numbers))]


def test_a_killed_node_dies_by_its_will_and_the_next_has_another_number(site: Site, host: Host) -> None:
    site.ingest(site.sender.state())
    with site.bridge():
        host.wait("birth", lambda: host.payloads("DBIRTH"))
        # Another connection with its name makes the broker drop it.
        Link(site.broker, "edge").close()
        host.wait("death", lambda: host.payloads("NDEATH"))
        # What arrives before the next session comes in it, as historical.
        site.ingest(site.results(3000, 2000), site.results(1000))
        host.wait("birth", lambda: len(host.payloads("NBIRTH")) == 2)
        host.wait("its device's birth", lambda: len(host.payloads("DBIRTH")) >= 2)
        # The newest one is in the birth.
        host.wait("the backlog", lambda: len(host.scores()) == 2)
        assert all(metric.is_historical for metric in host.scores())
    first, second = (birth.metrics[0].long_value for birth in host.payloads("NBIRTH"))
    assert second == (first + 1) % 256
    assert host.payloads("NDEATH")[0].metrics[0].long_value == first
