"""Viewers at a real Mosquitto: they read, publish nothing, join no collector, and are shut out at once."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.config import BrokerConfig
from agent.errors import LinkDown, UsageError
from agent.fleet.config import FleetConfig, load
from agent.fleet.enrolment import collectors, enrol, viewers
from agent.fleet.enrolment.enrol import init_fleet
from agent.testing.broker import MosquittoBroker, free_port, keep_user_root
from agent.testing.fleet import FLEET
from agent.testing.process import wait_until
from agent.transport.mqtt import Link
from agent.transport.packets import IncomingMessage, OutgoingMessage
from scripts.kit.broker_client import NOT_AUTHORIZED, publish_one
from tests.kit.commands import call_outstation

BASE = f"outstation/{FLEET}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("viewers")
    port = free_port()
    init_fleet(folder / "fleet", FLEET, BrokerConfig(url=f"mqtts://localhost:{port}"))
    conf = keep_user_root(folder / "fleet" / "broker" / "mosquitto.conf")
    with MosquittoBroker(folder, conf=conf, port=port):
        yield folder / "fleet"


def let_in(home: Path, name: str) -> BrokerConfig:
    done = call_outstation("fleet", "viewer", name, "--dir", str(home))
    assert done.returncode == 0, done.stderr
    return load(home).broker_for(viewers.certificate_of(home, name))


def receives(broker: BrokerConfig, filters: list[str], home: Path) -> bool:
    """Return True if an acknowledgement that the collector sends reaches a subscriber."""
    config: FleetConfig = load(home)
    listener, speaker = Link(broker, "x", subscribe=filters), Link(config.broker_for(config.collector), "y")
    try:
        assert publish_one(speaker, OutgoingMessage(f"{BASE}/pi-1/ack", b"{}")) < 0x80
        return any(isinstance(event, IncomingMessage) for event in listener.receive(2.0))
    finally:
        listener.close()
        speaker.close()


def is_down(link: Link) -> bool:
    try:
        link.receive(0.1)
    except LinkDown:
        return True
    return False


@pytest.mark.parametrize("topic", ["#", f"{BASE}/#", f"{BASE}/+/ack"])
def test_a_viewer_reads_the_fleet(home: Path, topic: str) -> None:
    assert receives(let_in(home, "laptop"), [topic], home)


def test_a_viewer_publishes_nothing(home: Path) -> None:
    link = Link(let_in(home, "laptop"), "x")
    try:
        for topic in ("pi-1/health", "pi-1/cmd", "pi-1/ack", "_all/desired", "viewer-laptop/health"):
            assert publish_one(link, OutgoingMessage(f"{BASE}/{topic}", b"{}")) == NOT_AUTHORIZED, topic
        assert publish_one(link, OutgoingMessage("$CONTROL/dynamic-security/v1", b"{}")) == NOT_AUTHORIZED
    finally:
        link.close()


def test_a_viewer_cannot_join_the_collectors_even_if_it_knows_their_group(home: Path) -> None:
    group = tomllib.loads((home / "fleet.toml").read_text())["fleet"]["share_group"]
    assert group
    broker = let_in(home, "laptop")
    for topic in (f"$share/{group}/{BASE}/+/health", f"$share/{group}/{BASE}/#", f"$share/{group}/#", "$share/own/#"):
        with pytest.raises(LinkDown, match="Not authorized"):
            Link(broker, "x", subscribe=[topic])


def test_two_viewers_and_the_collector_do_not_throw_each_other_off(home: Path) -> None:
    config = load(home)
    first = Link(let_in(home, "one"), "collector", subscribe=[f"{BASE}/#"])
    second = Link(let_in(home, "two"), "collector", subscribe=[f"{BASE}/#"])
    collector = Link(config.broker_for(config.collector), "collector")
    try:
        assert publish_one(collector, OutgoingMessage(f"{BASE}/pi-1/ack", b"{}")) < 0x80
        for link in (first, second):
            assert any(isinstance(event, IncomingMessage) for event in link.receive(5.0))
    finally:
        for link in (first, second, collector):
            link.close()


def test_a_revoked_viewer_is_thrown_off_and_stays_out_until_it_is_let_in_again(home: Path) -> None:
    broker = let_in(home, "lost")
    files = [Path(str(broker.cert_file)), Path(str(broker.tls_key_file))]
    stolen = [file.read_bytes() for file in files]
    link = Link(broker, "x", subscribe=[f"{BASE}/#"])
    done = call_outstation("fleet", "viewer", "lost", "--revoke", "--dir", str(home))
    assert done.returncode == 0, done.stderr
    assert "ended its session" in done.stdout
    wait_until("the viewer is thrown off", lambda: is_down(link))
    link.close()
    for file, data in zip(files, stolen, strict=True):
        file.write_bytes(data)
    with pytest.raises(LinkDown):
        Link(broker, "x", subscribe=[f"{BASE}/#"])
    for file in files:
        file.unlink()
    assert receives(let_in(home, "lost"), ["#"], home)


def test_a_revoked_collector_is_thrown_off(home: Path) -> None:
    assert call_outstation("fleet", "collector", "b", "--dir", str(home)).returncode == 0
    config = load(home)
    broker = config.broker_for(collectors.resolve_identity(config, "b"))
    link = Link(broker, "x", subscribe=[f"{BASE}/#"])
    done = call_outstation("fleet", "collector", "b", "--revoke", "--dir", str(home))
    assert (done.returncode, "ended its session" in done.stdout) == (0, True), done.stderr
    wait_until("the collector is thrown off", lambda: is_down(link))
    link.close()
    assert not Path(str(broker.cert_file)).exists()


def test_the_stolen_certificate_of_a_role_is_refused_and_the_new_one_connects(home: Path, tmp_path: Path) -> None:
    config = load(home)
    broker = config.broker_for(config.operator)
    link = Link(broker, "x", subscribe=[f"{BASE}/#"])
    stolen = [tmp_path / "stolen.crt", tmp_path / "stolen.key"]
    for copy, file in zip(stolen, (broker.cert_file, broker.tls_key_file), strict=True):
        copy.write_bytes(Path(str(file)).read_bytes())
    done = call_outstation("fleet", "reissue", "operator", "--dir", str(home))
    assert (done.returncode, "ended its session" in done.stdout) == (0, True), done.stderr
    wait_until("the thief is thrown off", lambda: is_down(link))
    link.close()
    with pytest.raises(LinkDown):
        Link(replace(broker, cert_file=str(stolen[0]), tls_key_file=str(stolen[1])), "x", subscribe=[f"{BASE}/#"])
    assert receives(broker, [f"{BASE}/#"], home)
    assert "is no role" in call_outstation("fleet", "reissue", "boss", "--dir", str(home)).stderr


def test_names_do_not_collide_with_devices(home: Path) -> None:
    let_in(home, "desk")
    with pytest.raises(UsageError, match="name of a viewer"):
        enrol.device_folder(home, "viewer-desk")
    done = call_outstation("fleet", "viewer", "../x", "--dir", str(home))
    assert done.returncode == 2
    assert "cannot name a viewer" in done.stderr
    assert "there is no viewer" in call_outstation("fleet", "viewer", "nobody", "--revoke", "--dir", str(home)).stderr
