"""Access control at a real Mosquitto with the config and access rules that `fleet init` writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.foundation.errors import LinkDown
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.fleet import FLEET
from scripts.kit.broker_client import NOT_AUTHORIZED, publish_one, receive_messages, receive_through
from tests.kit.commands import call_outstation
from tests.kit.enrolments import let_in, site

BASE = f"outstation/{FLEET}"


@dataclass
class Access:
    """A fleet of two devices and its broker; `as_…` return broker settings with the certificate of that role."""

    home: Path
    config: FleetConfig

    def as_device(self, name: str) -> BrokerConfig:
        folder = site(self.home, name)
        files = {"cert_file": str(folder / "device.crt"), "tls_key_file": str(folder / "device-tls.key")}
        return msgspec.structs.replace(self.config.broker, **files)

    @property
    def as_operator(self) -> BrokerConfig:
        return self.config.broker_for(self.config.operator)

    @property
    def as_commander(self) -> BrokerConfig:
        assert self.config.commander is not None
        return self.config.broker_for(self.config.commander)

    @property
    def as_collector(self) -> BrokerConfig:
        return self.config.broker_for(self.config.collector)


@pytest.fixture(scope="module")
def access(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    folder = tmp_path_factory.mktemp("access")
    port = free_port()
    config = init_fleet(folder / "fleet", FLEET, BrokerConfig(url=f"mqtts://localhost:{port}"))
    for name in ("pi-a", "pi-b"):
        let_in(config, folder / "fleet", name)
    conf = keep_user_root(folder / "fleet" / "broker" / "mosquitto.conf")
    with MosquittoBroker(folder, conf=conf, port=port):
        yield Access(folder / "fleet", config)


def code(broker: BrokerConfig, topic: str) -> int:
    """Return the broker's reason code for a message on `topic`."""
    with Link(broker, "someone") as link:
        return publish_one(link, OutgoingMessage(topic, b"{}"))


def is_refused(broker: BrokerConfig, topic: str) -> bool:
    """Return True if the broker refuses a subscription."""
    try:
        Link(broker, "listener", subscribe=[topic]).close()
    except LinkDown as error:
        return "refused" in str(error)
    return False


def reaches_subscriber(broker: BrokerConfig, own_topic: str, sender: BrokerConfig, topic: str) -> bool:
    """Return True if a message by `sender` on `topic` reaches a subscriber of `own_topic`, which reads that as well."""
    with Link(broker, "listener", subscribe=[own_topic]) as listener, Link(sender, "speaker") as speaker:
        for name, payload in ((topic, b"{}"), (own_topic, b"last")):
            assert publish_one(speaker, OutgoingMessage(name, payload)) < 0x80
        seen = receive_through(listener, b"last")
    assert b"last" in seen
    return b"{}" in seen


OWN = ("results/x", "drift/x", "quality/x", "alerts/x", "health", "audit", "state", "keys", "reply")


@pytest.mark.parametrize("kind", OWN)
def test_a_device_publishes_under_its_own_name_and_under_no_other(access: Access, kind: str) -> None:
    assert code(access.as_device("pi-a"), f"{BASE}/pi-a/{kind}") < 0x80
    assert code(access.as_device("pi-a"), f"{BASE}/pi-b/{kind}") == NOT_AUTHORIZED


@pytest.mark.parametrize("kind", ["ack", "cmd", "desired"])
def test_a_device_publishes_nothing_that_goes_down_not_even_to_itself(access: Access, kind: str) -> None:
    for name in ("pi-a", "pi-b", "_all"):
        assert code(access.as_device("pi-a"), f"{BASE}/{name}/{kind}") == NOT_AUTHORIZED


@pytest.mark.parametrize("kind", ["ack", "cmd", "desired"])
def test_what_goes_down_to_one_device_does_not_reach_another(access: Access, kind: str) -> None:
    sender = access.as_collector if kind == "ack" else access.as_operator
    topic = f"{BASE}/pi-b/{kind}"
    for other in (topic, "#", f"{BASE}/+/{kind}"):
        assert is_refused(access.as_device("pi-a"), other), other
    assert not reaches_subscriber(access.as_device("pi-a"), f"{BASE}/pi-a/{kind}", sender, topic)
    assert reaches_subscriber(access.as_device("pi-b"), topic, sender, topic)


def test_a_device_does_not_see_what_others_measure(access: Access) -> None:
    for topic in ("#", f"{BASE}/pi-b/health", f"{BASE}/+/health", f"{BASE}/pi-a/health"):
        assert is_refused(access.as_device("pi-a"), topic), topic


def test_a_device_cannot_throw_another_off_by_taking_its_client_id(access: Access) -> None:
    with Link(access.as_device("pi-b"), "pi-b") as victim:
        thief = Link(access.as_device("pi-a"), "pi-b")
        thief.close()
        assert publish_one(victim, OutgoingMessage(f"{BASE}/pi-b/health", b"{}")) < 0x80


@pytest.mark.parametrize("who", ["operator", "commander"])
def test_operators_publish_commands_and_desired_state_only(access: Access, who: str) -> None:
    broker = access.as_operator if who == "operator" else access.as_commander
    for kind in ("cmd", "desired"):
        assert code(broker, f"{BASE}/pi-a/{kind}") < 0x80
    for kind in (*OWN, "ack"):
        assert code(broker, f"{BASE}/pi-a/{kind}") == NOT_AUTHORIZED


def test_the_collector_acknowledges_and_commands_nobody(access: Access) -> None:
    assert code(access.as_collector, f"{BASE}/pi-a/ack") < 0x80
    # On the topics of a device's log it deletes what is retained; it has no key that signs a message there.
    for kind in ("state", "keys", "reply", "cmd", "desired"):
        assert code(access.as_collector, f"{BASE}/pi-a/{kind}") == NOT_AUTHORIZED


def test_a_command_does_not_end_the_connection_of_somebody_who_watches(access: Access) -> None:
    with Link(access.as_operator, "watch", subscribe=[f"{BASE}/pi-a/health"]) as watching:
        assert code(access.as_commander, f"{BASE}/pi-a/cmd") < 0x80
        assert watching.receive(0.3) == []


@pytest.mark.parametrize(("to", "topic"), [("all", "_all/desired"), ("group:roof", "_group/desired/roof")])
def test_a_roll_out_is_retained_for_devices_and_ends_nobodys_connection(
    access: Access, tmp_path: Path, to: str, topic: str
) -> None:
    file = tmp_path / "rollout.toml"
    file.write_text(
        f'[rollout]\nname = "{to.replace(":", "-")}"\ntask = "exercise"\nbundle = "exercise"\nversion = "1.1.0"\n'
        f'digest = "sha256:{"cd" * 32}"\ntarget = "{to}"\n[[steps]]\nstrategy = "all"\n'
        "[promote]\nmin_devices = 2\nmin_agreement = 0.9\n",
        encoding="utf-8",
    )
    with Link(access.as_operator, "watch", subscribe=[f"{BASE}/+/health"]) as watcher:
        done = call_outstation("fleet", "rollout", "start", str(file), "--dir", str(access.home))
        assert done.returncode == 0, done.stderr
        device = Link(access.as_device("pi-a"), "pi-a", subscribe=[f"{BASE}/{topic}"])
        [arrived] = receive_messages(device, 1)
        device.close()
        assert (arrived.topic, arrived.retained) == (f"{BASE}/{topic}", True)
        assert code(access.as_device("pi-a"), f"{BASE}/{topic}") == NOT_AUTHORIZED
        assert watcher.receive(0.1) == []


def test_nobody_connects_without_a_certificate_of_this_fleet(access: Access, tmp_path: Path) -> None:
    other = init_fleet(tmp_path / "other", FLEET, BrokerConfig(url=access.config.broker.url))
    foreign = msgspec.structs.replace(other.broker_for(other.operator), ca_file=access.config.broker.ca_file)
    with pytest.raises(LinkDown):
        Link(foreign, "someone", timeout_s=3.0)
    with pytest.raises(LinkDown):
        Link(msgspec.structs.replace(foreign, cert_file=None, tls_key_file=None), "someone", timeout_s=3.0)
