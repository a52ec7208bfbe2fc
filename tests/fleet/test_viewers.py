"""Viewers at a real Mosquitto: they read, publish nothing, join no collector, and are shut out at once."""

from __future__ import annotations

import contextlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from outstation.fleet.config import FleetConfig, load
from outstation.fleet.enrolment import clients, collectors, enrol, pki, viewers
from outstation.fleet.enrolment.broker_control import ACCESS_FILE
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.enrolment.viewers_broker import ViewersBroker
from outstation.foundation.errors import LinkDown, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage
from outstation.workbench.testing.broker import MosquittoBroker, free_port, keep_user_root
from outstation.workbench.testing.fleet import FLEET
from outstation.workbench.testing.patience import wait_until
from scripts.kit.broker_client import (
    NOT_AUTHORIZED,
    publish_one,
    receive_messages,
    receive_through,
    subscribe_anyway,
)
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
    return load(home).broker_for(clients.certificate_of(home, viewers.user_name(name)))


def receives(broker: BrokerConfig, filters: list[str], home: Path) -> bool:
    """Return True if an acknowledgement that the collector sends reaches a subscriber."""
    config: FleetConfig = load(home)
    with Link(broker, "x", subscribe=filters) as listener, Link(config.broker_for(config.collector), "y") as speaker:
        assert publish_one(speaker, OutgoingMessage(f"{BASE}/pi-1/ack", b"{}")) < 0x80
        return bool(receive_messages(listener, 1))


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
    with Link(let_in(home, "laptop"), "x") as link:
        for topic in ("pi-1/health", "pi-1/cmd", "pi-1/ack", "_all/desired", "viewer-laptop/health"):
            assert publish_one(link, OutgoingMessage(f"{BASE}/{topic}", b"{}")) == NOT_AUTHORIZED, topic
        assert publish_one(link, OutgoingMessage("$CONTROL/dynamic-security/v1", b"{}")) == NOT_AUTHORIZED


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
            assert receive_messages(link, 1)
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


def test_a_viewer_is_revoked_although_the_file_of_the_viewers_broker_cannot_be_read(tmp_path: Path) -> None:
    config = init_fleet(tmp_path, FLEET, BrokerConfig(url=f"mqtts://localhost:{free_port()}"))
    viewers.add(tmp_path, config, "lost")
    viewers.add_password(tmp_path, config, "lost")
    certificate = tmp_path / "viewer-lost.crt"
    serial = pki.read_serial(certificate.read_bytes(), certificate)
    file = ViewersBroker(tmp_path, config).folder / ACCESS_FILE
    file.unlink()
    # Mode 0600 of another user does not stop root.
    file.mkdir()
    with pytest.raises(UsageError, match="certificate is revoked, but the viewers' broker may still let it in"):
        viewers.revoke(tmp_path, config, "lost")
    with pytest.raises(UsageError, match="viewer-lost: the viewers' broker may still let it in"):
        viewers.revoke(tmp_path, config, "lost")
    assert not certificate.exists()
    assert config.ca
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    assert authority.load_crl(tmp_path / "crl.pem").get_revoked_certificate_by_serial_number(serial) is not None


class PasswordViewer:
    """The viewers' broker of a fleet, and a viewer that `fleet keys viewer --password` lets in while it runs."""

    def __init__(self, home: Path, broker: MosquittoBroker) -> None:
        self.home, self.broker = home, broker
        self.settings, self.password = self.let_in("pad")

    def let_in(self, name: str) -> tuple[BrokerConfig, str]:
        done = call_outstation("fleet", "viewer", name, "--password", "--json", "--dir", str(self.home))
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        return self.connect_as(made["username"], made["password"]), made["password"]

    def connect_as(self, user: str, password: str) -> BrokerConfig:
        config = load(self.home)
        url = f"mqtts://localhost:{ViewersBroker(self.home, config).ports[1]}"
        return BrokerConfig(url=url, ca_file=config.broker.ca_file, username=user, password=password)

    def with_certificate(self, name: str) -> BrokerConfig:
        config = load(self.home)
        port = ViewersBroker(self.home, config).ports[0]
        return msgspec.structs.replace(let_in(self.home, name), url=f"mqtts://localhost:{port}")


@pytest.fixture(scope="module")
def pad(home: Path) -> Iterator[PasswordViewer]:
    # The first call writes the config; the broker starts with the viewer in its file.
    assert "shown once" in call_outstation("fleet", "viewer", "first", "--password", "--dir", str(home)).stdout
    viewers_broker = ViewersBroker(home, load(home))
    conf = keep_user_root(viewers_broker.conf)
    with MosquittoBroker(home.parent / "second", conf=conf, port=viewers_broker.ports[1]) as broker:
        yield PasswordViewer(home, broker)


def speak(home: Path, topic: str, payload: bytes) -> None:
    config = load(home)
    sender = config.collector if topic.endswith("ack") else config.operator
    with Link(config.broker_for(sender), "y") as link:
        assert publish_one(link, OutgoingMessage(f"{BASE}/{topic}", payload)) < 0x80


def test_a_viewer_has_as_many_connections_as_it_likes_with_password_and_certificate(pad: PasswordViewer) -> None:
    with contextlib.ExitStack() as closing:
        links = []
        for settings in (pad.settings, pad.with_certificate("many")):
            for number in range(3):
                client, topic = f"explorer-{number}-{settings.port}", ["#", f"{BASE}/#"][number % 2]
                links.append(Link(settings, client, subscribe=[topic]))
                closing.callback(links[-1].close)

        def reach_all() -> bool:
            speak(pad.home, "pi-1/ack", b"last")
            return all(b"last" in receive_through(link, b"last", 1.0) for link in links)

        wait_until("the viewers' broker copies the fleet's messages", reach_all)


@pytest.mark.attack("viewers")
def test_a_viewer_with_a_password_publishes_nothing_and_reads_no_command(pad: PasswordViewer) -> None:
    for settings in (pad.settings, pad.with_certificate("sly")):
        with Link(settings, "x", subscribe=["#"]) as link:
            for topic in ("pi-1/health", "pi-1/cmd", "pi-1/ack", "_all/desired", "pi-1/results/exercise"):
                assert publish_one(link, OutgoingMessage(f"{BASE}/{topic}", b"{}")) == NOT_AUTHORIZED, topic
            control = OutgoingMessage("$CONTROL/dynamic-security/v1", b'{"commands":[{"command":"listClients"}]}')
            assert publish_one(link, control) == NOT_AUTHORIZED
            orders = [f"{BASE}/+/cmd", f"{BASE}/pi-1/cmd", f"{BASE}/_all/desired", f"{BASE}/_group/desired/+"]
            refused = [*orders, "$CONTROL/#", "$share/g/#", f"$share/g/{BASE}/#", "$SYS/#"]
            assert all(subscribe_anyway(link, refused))
            speak(pad.home, "pi-1/cmd", b"an order")
            speak(pad.home, "pi-1/ack", b"last")
            seen = receive_through(link, b"last")
            assert b"last" in seen
            assert b"an order" not in seen


@pytest.mark.attack("viewers")
def test_at_the_fleets_broker_too_a_viewer_reads_no_command(home: Path) -> None:
    with Link(let_in(home, "nosy"), "x", subscribe=["#"]) as link:
        assert all(subscribe_anyway(link, [f"{BASE}/+/cmd", f"{BASE}/_all/desired"]))
        speak(home, "pi-1/cmd", b"an order")
        speak(home, "pi-1/ack", b"last")
        assert receive_through(link, b"last") == [b"last"]


@pytest.mark.attack("viewers")
def test_a_viewer_that_takes_the_id_of_another_throws_nobody_off_the_fleets_broker(pad: PasswordViewer) -> None:
    config = load(pad.home)
    with Link(config.broker_for(config.collector), "x") as collector:
        for client in ("collector", "operator", "viewers", "pi-1", "broker-admin"):
            Link(pad.settings, client).close()
        assert publish_one(collector, OutgoingMessage(f"{BASE}/pi-1/ack", b"{}")) < 0x80


@pytest.mark.attack("viewers")
def test_without_its_password_nobody_enters_and_no_file_holds_one(pad: PasswordViewer) -> None:
    settings, password = pad.let_in("phone")
    Link(settings, "a").close()
    for user, wrong in (("viewer-phone", "wrong"), ("viewer-phone", ""), ("broker-admin", ""), ("viewer-x", password)):
        with pytest.raises(LinkDown):
            Link(pad.connect_as(user, wrong), "b")
    with pytest.raises(LinkDown):
        Link(msgspec.structs.replace(settings, username=None, password=None), "c")
    files = [path for path in pad.home.rglob("*") if path.is_file()]
    assert not [path for path in files if password.encode() in path.read_bytes()]
    # A new password ends the former one.
    again, _ = pad.let_in("phone")
    with pytest.raises(LinkDown):
        Link(settings, "d")
    link = Link(again, "e", subscribe=["#"])
    done = call_outstation("fleet", "viewer", "phone", "--revoke", "--dir", str(pad.home))
    assert done.returncode == 0, done.stderr
    wait_until("the viewer is thrown off", lambda: is_down(link))
    link.close()
    with pytest.raises(LinkDown):
        Link(again, "f")


def test_a_password_made_while_the_viewers_broker_is_down_works_once_it_starts(pad: PasswordViewer) -> None:
    pad.broker.kill()
    done = call_outstation("fleet", "viewer", "night", "--password", "--json", "--dir", str(pad.home))
    made = json.loads(done.stdout)
    assert any("restart the viewers' broker" in step for step in made["steps"])
    pad.broker.start()
    Link(pad.connect_as(made["username"], made["password"]), "x").close()
    Link(pad.settings, "y").close()
