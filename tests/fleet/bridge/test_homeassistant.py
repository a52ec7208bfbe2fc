"""The bridge to Home Assistant at the collector, with a real broker and a real database."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from outstation.fleet.bridge.homeassistant import _stored_verdicts, build_publisher
from outstation.fleet.bridge.stored_devices import StoredDevices
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import clients, homeassistant, revocation
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation import clock
from outstation.foundation.errors import ConfigError, UsageError
from outstation.integrations.homeassistant import publisher
from outstation.integrations.homeassistant.config import HomeAssistantConfig, check
from outstation.integrations.homeassistant.discovery import Place
from outstation.integrations.homeassistant.presses import VerdictSink
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import IncomingMessage, OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.fleet import LocalFleet
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage
from outstation.workbench.testing.patience import TIMEOUT_S
from scripts.kit.broker_client import NOT_AUTHORIZED, publish_one, subscribe_anyway

NOW = "2026-01-01T00:00:00Z"
PLACE = Place(FLEET, "collector", "homeassistant")
MAX_AGE_S = 600.0
LATEST = f"outstation-bridge/{FLEET}/latest"


class HomeAssistant:
    """A client with the subscriptions of Home Assistant: topic → payload, and how often each came."""

    def __init__(self, broker: BrokerConfig, name: str) -> None:
        self.link = Link(broker, name, subscribe=["homeassistant/#", f"outstation-bridge/{FLEET}/#"])
        self.documents: dict[str, bytes] = {}
        self.counts: dict[str, int] = {}

    def wait(self, event: str, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"{event}; documents: {self.documents}"
            self.receive(0.1)
        return value

    def receive(self, timeout_s: float) -> None:
        for event in self.link.receive(timeout_s):
            if isinstance(event, IncomingMessage):
                self.link.acknowledge(event)
                self.documents[event.topic] = event.payload
                self.counts[event.topic] = self.counts.get(event.topic, 0) + 1

    def read(self, topic: str) -> Any:
        return json.loads(self.documents.get(topic) or b"null")

    def publish_birth(self, state: bytes) -> None:
        self.link.send(OutgoingMessage(PLACE.birth_topic, state))


Connect = Callable[..., HomeAssistant]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Yield a function that connects such a client; all are closed afterwards."""
    with contextlib.ExitStack() as closing:

        def open_client(broker: BrokerConfig, name: str = "homeassistant") -> HomeAssistant:
            client = HomeAssistant(broker, name)
            closing.callback(client.link.close)
            return client

        yield open_client


class Site:
    """A database with the device `pi.01`, a broker, and the bridge between them."""

    def __init__(self, folder: Path, broker: MosquittoBroker) -> None:
        self.broker = BrokerConfig(url=broker.url)
        self.file = folder / "fleet.db"
        self.store = FleetStore(self.file)
        self.is_leader = True
        self.senders = {name: self.enrol(name) for name in ("pi.01", "pi.02")}

    def enrol(self, name: str) -> MessageSender:
        sender = MessageSender(name)
        self.store.enrol(name, sender.key.public, replace=False, now=NOW)
        return sender

    def ingest(self, name: str, *messages: SignedMessage) -> None:
        arrivals = [Arrival(self.senders[name].verify(message)) for message in messages]
        self.store.ingest(arrivals, [], clock.now_rfc3339())

    def bridge(self, store_verdict: VerdictSink | None = None) -> BridgeThread:
        return publisher.build_publisher(
            *(PLACE, self.broker, "bridge", lambda: StoredDevices(self.file)),
            max_age_s=MAX_AGE_S,
            cleans_up=True,
            is_active=lambda: self.is_leader,
            poll_interval_s=0.1,
            store_verdict=store_verdict,
        )


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with MosquittoBroker(tmp_path) as broker:
        site = Site(tmp_path, broker)
        yield site
        site.store.close()


def results_at(sender: MessageSender, age_s: float, label: str) -> SignedMessage:
    at_us = clock.read().wall_us - int(age_s * 1e6)
    columns = {"row": [sender.row + 100], "t": [at_us], "label": [label], "score": [0.9]}
    return sender.results(1, columns=columns)


def test_a_device_appears_changes_and_goes(site: Site, connect: Connect) -> None:
    ours, config = site.senders["pi.01"], PLACE.config_topic("pi.01")
    assert config == "homeassistant/device/outstation_piDOT01_AT_acme/config"
    site.ingest("pi.01", ours.state(), results_at(ours, 5, "PEN"))
    home = connect(site.broker)
    with site.bridge():
        home.wait("discovery", lambda: home.read(config) is not None)
        assert "label-exercise" in home.read(config)["cmps"]
        home.wait("its result", lambda: home.read(f"{LATEST}/pi.01/exercise"))
        assert home.read(f"{LATEST}/pi.01/exercise")["label"] == "PEN"
        assert home.read(f"{LATEST}/pi.01/_device")["state"] == "online"
        assert home.documents[PLACE.status_topic] == b"online"
        assert PLACE.config_topic("pi.02") not in home.documents, "a device that never reported is unknown"

        site.ingest("pi.01", ours.drift("drift"), ours.alert(), ours.health(), results_at(ours, 1, "ABD"))
        home.wait("drift", lambda: "drift-exercise" in home.read(config)["cmps"])
        home.wait("an alert", lambda: home.read(f"{LATEST}/pi.01/_device")["alerts"] == 1)
        home.wait("a result", lambda: home.read(f"{LATEST}/pi.01/exercise")["label"] == "ABD")

        site.ingest("pi.01", ours.alert(state="cleared"), ours.state("stopped"))
        home.wait("no alert", lambda: home.read(f"{LATEST}/pi.01/_device")["alerts"] == 0)
        home.wait("stopped", lambda: home.read(f"{LATEST}/pi.01/_device")["state"] == "stopped")

        site.store.revoke("pi.01", None, NOW)
        home.wait("removal", lambda: home.documents[config] == b"")
        home.wait("removal", lambda: home.documents[f"{LATEST}/pi.01/exercise"] == b"")
    home.wait("goodbye", lambda: home.documents[PLACE.status_topic] == b"offline")


def test_a_button_becomes_a_verdict_of_the_result_that_is_shown(site: Site, connect: Connect) -> None:
    ours = site.senders["pi.01"]
    site.ingest("pi.01", ours.state(), results_at(ours, 5, "PEN"))
    home = connect(site.broker)
    with site.bridge(_stored_verdicts(site.file, "home")):
        components = home.wait("discovery", lambda: (home.read(PLACE.config_topic("pi.01")) or {}).get("cmps"))
        button = components["confirm-exercise"]
        home.wait("its result", lambda: home.read(f"{LATEST}/pi.01/exercise"))
        home.link.send(OutgoingMessage(button["cmd_t"], button["pl_prs"].encode()))
        home.link.send(OutgoingMessage(components["correct-exercise"]["cmd_t"], b"sideways"))

        def verdicts() -> list[Any]:
            with site.store.snapshot() as db:
                return db.execute("SELECT given_by, via, verdict, label FROM verdicts").fetchall()

        assert home.wait("the verdict", verdicts) == [("home", "homeassistant", "confirmed", "PEN")]


def test_buttons_are_refused_at_a_broker_that_asks_nobody_who_presses() -> None:
    broker = BrokerConfig(url="mqtt://127.0.0.1:1883")
    with pytest.raises(ConfigError, match="anybody could press"):
        check("fleet.toml", HomeAssistantConfig(verdicts="home", broker=broker))
    check("fleet.toml", HomeAssistantConfig(verdicts="home", broker=replace(broker, username="bridge")))


def test_home_assistant_starts_and_gets_everything_again(site: Site, connect: Connect) -> None:
    ours, config = site.senders["pi.01"], PLACE.config_topic("pi.01")
    site.ingest("pi.01", ours.state(), results_at(ours, 5, "PEN"))
    home = connect(site.broker)
    with site.bridge():
        home.wait("discovery", lambda: home.counts.get(config))
        home.wait("its result", lambda: home.counts.get(f"{LATEST}/pi.01/exercise"))
        before = dict(home.counts)
        home.publish_birth(b"offline")
        home.receive(0.5)
        assert home.counts[config] == before[config], "without a change nothing is sent again"
        home.publish_birth(b"online")
        home.wait("discovery again", lambda: home.counts[config] == before[config] + 1)
        home.wait(
            "its result again", lambda: home.counts[f"{LATEST}/pi.01/exercise"] > before[f"{LATEST}/pi.01/exercise"]
        )


def test_a_backlog_never_reaches_home_assistant(site: Site, connect: Connect) -> None:
    ours, topic = site.senders["pi.01"], f"{LATEST}/pi.01/exercise"
    site.ingest("pi.01", ours.state(), results_at(ours, 2 * MAX_AGE_S, "OLD"))
    home = connect(site.broker)
    with site.bridge():
        home.wait("discovery", lambda: home.read(PLACE.config_topic("pi.01")))
        home.receive(0.5)
        assert topic not in home.documents
        site.ingest("pi.01", results_at(ours, 5, "NEW"))
        home.wait("its result", lambda: home.read(topic))
        site.ingest("pi.01", results_at(ours, 60, "LATE"))
        home.receive(0.6)
        assert home.read(topic)["label"] == "NEW"
    # Nor after a restart, when only the broker knows what was published.
    site.ingest("pi.01", results_at(ours, 90, "LATER"))
    with site.bridge():
        home.wait("online", lambda: home.documents[PLACE.status_topic] == b"online")
        home.receive(0.6)
        assert home.read(topic)["label"] == "NEW"


# A broker far away answers after this pause.
@pytest.mark.parametrize("quiet_s", [publisher._QUIET_S, 0.0])
def test_what_was_removed_while_no_bridge_ran_is_removed_by_the_next_one(
    site: Site, connect: Connect, monkeypatch: pytest.MonkeyPatch, quiet_s: float
) -> None:
    monkeypatch.setattr(publisher, "_QUIET_S", quiet_s)
    ours, config = site.senders["pi.01"], PLACE.config_topic("pi.01")
    foreign = "homeassistant/device/zigbee_lamp/config"
    site.ingest("pi.01", ours.state(), results_at(ours, 5, "PEN"))
    home = connect(site.broker)
    home.link.send(OutgoingMessage(foreign, b'{"o":{"name":"zigbee"}}', retain=True))
    with site.bridge():
        home.wait("discovery", lambda: home.documents.get(config))
    site.store.revoke("pi.01", None, NOW)
    with site.bridge():
        home.wait("removal", lambda: home.documents[config] == b"")
    later = connect(site.broker, "later")
    later.receive(0.5)
    assert config not in later.documents
    assert not [topic for topic in later.documents if topic.startswith(LATEST)]


def test_the_leader_alone_publishes(site: Site, connect: Connect) -> None:
    ours = site.senders["pi.01"]
    site.ingest("pi.01", ours.state())
    site.is_leader = False
    home = connect(site.broker)
    with site.bridge():
        home.receive(1.5)
        assert not home.documents
        site.is_leader = True
        home.wait("discovery", lambda: home.documents.get(PLACE.config_topic("pi.01")))
        site.is_leader = False
        home.wait("goodbye", lambda: home.documents[PLACE.status_topic] == b"offline")


def test_an_alert_fires_once_when_raised_and_cleared_and_never_for_a_backlog(site: Site, connect: Connect) -> None:
    ours, topic = site.senders["pi.01"], PLACE.event_topic("pi.01")
    home = connect(site.broker)

    def ago(seconds: float) -> str:
        return clock.to_rfc3339(clock.read().wall_us - int(seconds * 1e6))

    def raise_alert(identity: str, age_s: float, state: str = "raised", **members: Any) -> None:
        site.ingest("pi.01", ours.alert(identity, state, f"{identity} {state}", time=ago(age_s), **members))

    site.ingest("pi.01", ours.state())
    with site.bridge():
        home.wait("discovery", lambda: "alert" in (home.read(PLACE.config_topic("pi.01")) or {}).get("cmps", ()))
        assert home.read(PLACE.config_topic("pi.01"))["cmps"]["alert"]["evt_typ"] == ["raised", "cleared"]
        raise_alert("exercise/ax/1", 1)
        home.wait("raised", lambda: home.counts.get(topic) == 1)
        event = home.read(topic)
        assert (event["event_type"], event["summary"]) == ("raised", "exercise/ax/1 raised")
        # After an outage of two hours: raised and cleared then.
        raise_alert("exercise/ay/1", 7200)
        home.wait("it is open", lambda: home.read(f"{LATEST}/pi.01/_device")["alerts"] == 2)
        raise_alert("exercise/ay/1", 7000, "cleared")
        raise_alert("exercise/ax/1", 0, "cleared")
        home.wait("cleared", lambda: home.counts[topic] == 2)
        assert home.read(topic)["event_type"] == "cleared"
        raise_alert("exercise/az/1", 1)
        home.wait("raised", lambda: home.counts[topic] == 3)
        home.publish_birth(b"online")
        home.receive(1.0)
    # Another bridge, such as the next leader's, repeats nothing, and misses nothing that happened in between.
    raise_alert("exercise/ax/2", 2)
    with site.bridge():
        home.wait("raised meanwhile", lambda: home.counts[topic] == 4)
        assert home.read(topic)["summary"] == "exercise/ax/2 raised"
        raise_alert("exercise/az/1", 0, severity="critical", revision=2)
        home.wait("it became worse", lambda: home.counts[topic] == 5)
        assert home.read(topic)["severity"] == "critical"
        home.receive(1.0)
    assert home.counts[topic] == 5
    late = connect(site.broker, "late")
    late.receive(1.0)
    assert topic not in late.documents, "an event is not retained"


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[FleetConfig]:
    """Yield a fleet whose broker runs with the certificates and access rules of `fleet init`."""
    port = free_port()
    config = init_fleet(tmp_path / FLEET, FLEET, BrokerConfig(url=f"mqtts://localhost:{port}"))
    conf = keep_user_root(tmp_path / FLEET / "broker" / "mosquitto.conf")
    with MosquittoBroker(tmp_path, conf=conf, port=port):
        yield config


def test_at_the_fleets_broker_each_may_do_its_part_and_no_more(
    secured: FleetConfig, tmp_path: Path, connect: Connect
) -> None:
    folder = tmp_path / FLEET
    store = FleetStore(secured.fleet.db)
    sender = MessageSender("pi.01")
    store.enrol("pi.01", sender.key.public, replace=False, now=NOW)
    store.ingest([Arrival(sender.verify(sender.state()))], [], NOW)
    section = HomeAssistantConfig()
    with pytest.raises(UsageError, match="outstation fleet keys homeassistant"):
        build_publisher(secured, section, secured.fleet.db, lambda: True)
    done = homeassistant.add(folder, secured)
    assert homeassistant.add(folder, secured) == done, "the command can be repeated"
    config = PLACE.config_topic("pi.01")
    home = connect(secured.broker_for(clients.certificate_of(folder, homeassistant.HOME_ASSISTANT)))
    with build_publisher(secured, section, secured.fleet.db, lambda: True):
        home.wait("discovery", lambda: home.documents.get(config))
        home.wait("its state", lambda: home.documents.get(f"{LATEST}/pi.01/_device"))
        assert home.documents[PLACE.status_topic] == b"online"
        count = home.counts[config]
        home.publish_birth(b"online")
        home.wait("discovery again", lambda: home.counts[config] > count)
    for topic in (config, f"outstation/{FLEET}/pi.01/cmd", f"{LATEST}/pi.01/exercise", PLACE.event_topic("pi.01")):
        assert publish_one(home.link, OutgoingMessage(topic, b"{}")) == NOT_AUTHORIZED
    assert all(subscribe_anyway(home.link, [f"outstation/{FLEET}/#", "#"]))
    assert publish_one(home.link, OutgoingMessage(PLACE.press_topic("pi.01", "exercise"), b"confirm")) == 0
    bridge = Link(secured.broker_for(clients.certificate_of(folder, homeassistant.BRIDGE)), "x")
    assert publish_one(bridge, OutgoingMessage(PLACE.event_topic("pi.01"), b"{}")) < 0x80
    # A button's press becomes a verdict: nobody but Home Assistant may press.
    presses = (PLACE.press_topic("pi.01", "exercise"), f"{PLACE.press_topic('pi.01', 'exercise')}/label")
    for topic in (f"outstation/{FLEET}/pi.01/results/exercise", f"outstation/{FLEET}/pi.01/ack", *presses):
        assert publish_one(bridge, OutgoingMessage(topic, b"{}")) == NOT_AUTHORIZED
    bridge.close()
    revocation.revoke_device(folder, secured, store, "pi.01", None, NOW)
    store.close()


def test_from_a_real_device_over_the_collector_and_from_the_device_alone(tmp_path: Path, connect: Connect) -> None:
    with LocalFleet(tmp_path) as fleet:
        fleet.broker.start()
        with (fleet.home / "fleet.toml").open("a", encoding="utf-8") as file:
            file.write('\n[homeassistant]\ndashboard = "https://fleet.example.org"\n')
        device = fleet.add_device("pi.01").add_replay_stream(4000, 50).add_task("exercise")
        fleet.collector.start()
        device.start_and_wait()
        home = connect(BrokerConfig(url=fleet.broker.url))
        config = PLACE.config_topic("pi.01")
        home.wait("a result", lambda: home.read(f"{LATEST}/pi.01/exercise"))
        home.wait("health", lambda: (home.read(f"{LATEST}/pi.01/_device") or {}).get("storage_bytes"))
        home.wait("an entity", lambda: "label-exercise" in (home.read(config) or {}).get("cmps", ()))
        assert home.read(config)["dev"]["cu"] == "https://fleet.example.org/devices/pi.01"
        device.stop()
        home.wait("stopped", lambda: home.read(f"{LATEST}/pi.01/_device")["state"] == "stopped")
        fleet.collector.stop()

        device.append_config("[homeassistant]\nprefix = 'alone'\n").start_and_wait()
        alone = Link(BrokerConfig(url=fleet.broker.url), "alone", subscribe=["alone/device/+/config"])
        seen: list[Any] = []
        deadline = time.monotonic() + 60
        while not seen or "label-exercise" not in seen[-1]["cmps"]:
            assert time.monotonic() < deadline, seen
            seen += [json.loads(e.payload) for e in alone.receive(0.2) if isinstance(e, IncomingMessage)]
        assert seen[-1]["avty"][0]["t"] == f"outstation-bridge/{FLEET}/status/pi.01"
        # The newest messages of the log were written before this start.
        assert seen[-1]["dev"]["ids"] == ["outstation_piDOT01_AT_acme"]
        alone.close()
