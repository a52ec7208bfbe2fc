"""Enrolment: nothing is overwritten, and the broker config isolates devices from each other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from outstation.device import config as device_config
from outstation.fleet import config as fleet_config
from outstation.fleet.collector.quota import DeviceQuotas
from outstation.fleet.collector.subscriptions import topic_filters
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.evidence import EvidenceQueries
from outstation.fleet.database.keyring import Keyring
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import collectors, join_tokens, pki, revocation
from outstation.fleet.enrolment.device_files import pack_device_files
from outstation.fleet.enrolment.enrol import enrol, init_fleet
from outstation.foundation import clock
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import LinkDown, StorageBusy, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.protocol.transport.packets import OutgoingMessage, PublishReceipt
from outstation.protocol.wire import keys
from outstation.protocol.wire.verification import verify_message
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.messages import MessageSender, new_key
from scripts.kit.broker_client import receive_messages
from scripts.kit.certificates import make_expired
from tests.kit.enrolments import join, let_in, site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "acme"


@pytest.fixture
def config(folder: Path) -> FleetConfig:
    return init_fleet(folder, "acme", BrokerConfig(url=f"mqtts://127.0.0.1:{free_port()}"))


def test_a_fleet_is_made_once_and_its_private_keys_are_its_owners_alone(folder: Path, config: FleetConfig) -> None:
    private = [path for path in folder.rglob("*.key") if path.is_file()]
    [encryption] = (folder / "encryption").glob("*.key")
    assert {path.name for path in private} - {encryption.name} == {
        *("ca.key", "collector.key", "operator.key", "collector-tls.key", "operator-tls.key", "commander-tls.key"),
        *("broker-admin-tls.key", "server.key"),
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="never overwritten"):
        init_fleet(folder, "acme", BrokerConfig(url="mqtts://other"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert config.broker.ca_file == str(folder / "ca.pem")


def test_a_half_made_fleet_is_not_made_over(folder: Path) -> None:
    folder.mkdir()
    keys.generate(folder / "collector.key")
    with pytest.raises(UsageError, match=r"collector\.key: exists already"):
        init_fleet(folder, "acme", BrokerConfig(url="mqtts://broker"))


@pytest.mark.parametrize("name", ["collector", "operator", "commander", "_all", "Pi", "a/b", "", "a" * 65])
def test_names_of_roles_and_invalid_topic_levels_are_not_enrolled(folder: Path, config: FleetConfig, name: str) -> None:
    with pytest.raises(UsageError, match="device"):
        let_in(config, folder, name)


def test_enrolling_twice_changes_nothing_and_replacing_needs_an_option(folder: Path, config: FleetConfig) -> None:
    first = let_in(config, folder, "pi-07")
    files = held(first.folder)
    again = let_in(config, folder, "pi-07")
    assert (first.is_new, again.is_new) == (True, False)
    assert first.key.text == again.key.text
    assert (first.made_by, again.made_by) == ("operator", None)
    assert held(again.folder) == files
    with pytest.raises(UsageError, match="--replace"):
        let_in(config, folder, "pi-07", key=new_key().public)
    replaced = let_in(config, folder, "pi-07", replace=True)
    assert replaced.key.text != first.key.text
    assert (replaced.folder / "device.crt").read_bytes() != files["device.crt"]


def test_the_device_bundle_is_private_reproducible_and_its_config_loads(
    tmp_path: Path, folder: Path, config: FleetConfig
) -> None:
    done = let_in(config, folder, "pi-07")
    [item] = tmp_path.glob("*.tar.gz")
    two = tmp_path / "two.tar.gz"
    pack_device_files(held(site(folder, "pi-07")), two)
    assert item.read_bytes() == two.read_bytes()
    assert stat.S_IMODE(item.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="name a new file"):
        pack_device_files({}, item)
    with tarfile.open(item) as tar:
        assert tar.getnames() == ["ca.pem", "device-tls.key", "device.crt", "device.key", "outstation.toml"]
        tar.extractall(tmp_path / "device", filter="data")
    loaded = device_config.load(tmp_path / "device" / "outstation.toml")
    assert (loaded.device.id, loaded.device.fleet) == ("pi-07", "acme")
    assert loaded.collector.key == keys.load_private(folder / "collector.key").public.text
    assert loaded.operators.keys == [keys.load_private(folder / "operator.key").public.text]
    assert loaded.broker.cert_file == str(tmp_path / "device" / "device.crt")
    assert keys.load_private(tmp_path / "device" / "device.key").public.text == done.key.text


def test_a_device_that_keeps_its_own_key_gets_no_private_signing_key(folder: Path, config: FleetConfig) -> None:
    own = new_key()
    done = let_in(config, folder, "pi-07", key=own.public)
    again = let_in(config, folder, "pi-07")
    assert again.key.text == own.public.text
    assert done.made_by == "device"
    assert set(held(site(folder, "pi-07"))) == {"ca.pem", "device-tls.key", "device.crt", "outstation.toml"}


def test_the_certificates_name_the_host_the_device_and_what_they_are_for(folder: Path, config: FleetConfig) -> None:
    let_in(config, folder, "pi-07", request=join(site(folder, "pi-07"), "pi-07"))
    device = x509.load_pem_x509_certificate((folder / "devices/pi-07/device.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "broker/server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    device.verify_directly_issued_by(authority)
    server.verify_directly_issued_by(authority)
    names = device.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert device.subject.rfc4514_string() == "CN=pi-07"
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:outstation:acme:pi-07"]
    hosts = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in hosts.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    assert not device.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_fleet_without_tls_has_no_certificates_and_its_broker_starts(tmp_path: Path) -> None:
    port = free_port()
    config = init_fleet(tmp_path / "home", "home", BrokerConfig(url=f"mqtt://127.0.0.1:{port}"))
    let_in(config, tmp_path / "home", "pi-07")
    assert set(held(tmp_path / "home/devices/pi-07")) == {"outstation.toml"}
    assert set(held(site(tmp_path / "home", "pi-07"))) == {"device.key", "outstation.toml"}
    with MosquittoBroker(tmp_path, conf=as_this_user(tmp_path / "home"), port=port):
        Link(config.broker, "pi-07").close()


def as_this_user(folder: Path) -> Path:
    """Return the generated mosquitto.conf with `user root`, because another user cannot read the test's folder."""
    path = folder / "broker" / "mosquitto.conf"
    text = path.read_text(encoding="utf-8")
    if "\nuser " not in text:
        path.write_text(text + "user root\n", encoding="utf-8")
    return path


def settings_of(folder: Path, device: str) -> BrokerConfig:
    return device_config.load(site(folder, device) / "outstation.toml").broker


def answer(link: Link, topic: str) -> str:
    """Return the broker's reason code for a publish to `topic`."""
    token = link.send(OutgoingMessage(topic, b"{}", retain=False))
    for _ in range(50):
        for event in link.receive(0.2):
            if isinstance(event, PublishReceipt) and event.token == token:
                return event.reason
    raise AssertionError("no PUBACK")


def test_the_broker_config_lets_a_device_write_only_its_own_topics(
    tmp_path: Path, folder: Path, config: FleetConfig
) -> None:
    for device in ("pi-07", "pi-08"):
        let_in(config, folder, device)
    with MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port):
        collector = Link(config.broker_for(config.collector), "any", subscribe=topic_filters("acme"))
        sender = Link(
            settings_of(folder, "pi-07"),
            "pi-07",
            subscribe=[f"outstation/acme/pi-07/{kind}" for kind in ("ack", "cmd")],
        )
        base = "outstation/acme/pi-07"
        for kind in ("results/x", "drift/x", "quality/x", "alerts/x", "health", "audit", "state", "keys", "reply"):
            assert answer(sender, f"{base}/{kind}") in ("Success", "No matching subscribers"), kind
        for topic in (
            "outstation/acme/pi-08/results/x", f"{base}/ack", f"{base}/cmd", f"{base}/desired", f"{base}/results",
            "outstation/acme/_all/desired", "outstation/other/pi-07/health", "$SYS/x",
        ):  # fmt: skip
            assert answer(sender, topic) == "Not authorized", topic
        assert receive_messages(collector, 1)
        assert answer(collector, "outstation/acme/pi-08/ack") in ("Success", "No matching subscribers")
        assert answer(collector, f"{base}/cmd") == "Not authorized"
        assert answer(collector, f"{base}/ack") == "Success"
        assert [message.topic for message in receive_messages(sender, 1)] == [f"{base}/ack"]
        operator = Link(config.broker_for(config.operator), "any")
        assert answer(operator, f"{base}/cmd") == "Success"
        assert answer(operator, f"{base}/ack") == "Not authorized"
        for link in (collector, sender, operator):
            link.close()


def test_collectors_have_their_own_sessions_and_share_messages(
    tmp_path: Path, folder: Path, config: FleetConfig
) -> None:
    let_in(config, folder, "pi-07")
    with pytest.raises(UsageError, match=r"collector-b\.crt: no such file.*fleet keys collector b"):
        collectors.resolve_identity(config, "b")
    for name in ("a", "b", "b"):
        added = collectors.add(folder, config, name)
    assert "fleet collect --share b" in added.steps[-1]
    rules = json.loads((folder / "broker" / "dynamic-security.json").read_text())
    assert [client["username"] for client in rules["clients"]].count("collector-b") == 1
    with pytest.raises(UsageError, match="name of a collector"):
        let_in(config, folder, "collector-b")
    with MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port):
        filters = topic_filters("acme", group=config.fleet.share_group)
        links = [
            Link(config.broker_for(collectors.resolve_identity(config, name)), name, subscribe=filters)
            for name in ("a", "b")
        ]
        sender = Link(settings_of(folder, "pi-07"), "pi-07")
        base = "outstation/acme/pi-07"
        for kind in ("health", "audit", "health", "audit", "state"):
            assert answer(sender, f"{base}/{kind}") == "Success"
        seen = [[message.topic for message in receive_messages(link, 3)] for link in links]
        # Each collector gets some of the logged messages, and both get the state.
        assert sorted(map(len, seen)) == [3, 3]
        assert all(f"{base}/state" in topics for topics in seen)
        assert answer(links[1], f"{base}/ack") in ("Success", "No matching subscribers")
        assert answer(links[1], f"{base}/cmd") == "Not authorized"
        for link in (*links, sender):
            link.close()


def test_no_certificate_a_foreign_one_and_a_foreign_ca_do_not_connect(
    tmp_path: Path, folder: Path, config: FleetConfig
) -> None:
    let_in(config, folder, "pi-07")
    other = init_fleet(tmp_path / "other", "acme", BrokerConfig(url=config.broker.url))
    let_in(other, tmp_path / "other", "pi-07")
    good = settings_of(folder, "pi-07")
    foreign = settings_of(tmp_path / "other", "pi-07")
    with MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port):
        Link(good, "pi-07").close()
        for bad in (
            BrokerConfig(url=good.url, ca_file=good.ca_file),
            BrokerConfig(
                url=good.url, ca_file=good.ca_file, cert_file=foreign.cert_file, tls_key_file=foreign.tls_key_file
            ),
            BrokerConfig(
                url=good.url, ca_file=foreign.ca_file, cert_file=good.cert_file, tls_key_file=good.tls_key_file
            ),
        ):
            with pytest.raises(LinkDown):
                Link(bad, "pi-07", timeout_s=5.0)


def test_a_certificate_that_has_ended_is_named(tmp_path: Path, folder: Path, config: FleetConfig) -> None:
    let_in(config, folder, "pi-07")
    certificate = site(folder, "pi-07") / "device.crt"
    certificate.write_bytes(
        make_expired(certificate.read_bytes(), pki.load_authority(folder / "ca.pem", folder / "ca.key"))
    )
    with (
        MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port),
        pytest.raises(LinkDown, match=r"device\.crt expired on 20.*replace it"),
    ):
        Link(settings_of(folder, "pi-07"), "pi-07", timeout_s=5.0)


def test_a_device_cannot_throw_another_off_by_taking_its_client_id(
    tmp_path: Path, folder: Path, config: FleetConfig
) -> None:
    for device in ("pi-07", "pi-08"):
        let_in(config, folder, device)
    with MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port):
        victim = Link(settings_of(folder, "pi-07"), "pi-07")
        thief = Link(settings_of(folder, "pi-08"), "pi-07")
        assert answer(victim, "outstation/acme/pi-07/health") == "No matching subscribers"
        assert answer(thief, "outstation/acme/pi-08/health") == "No matching subscribers"
        victim.close()
        thief.close()


def test_the_fleet_folder_is_located_and_invalid_settings_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, config: FleetConfig
) -> None:
    monkeypatch.delenv("OUTSTATION_FLEET", raising=False)
    monkeypatch.chdir(tmp_path)
    assert fleet_config.find_folder("x") == Path("x")
    assert fleet_config.find_folder(None) == fleet_config.SYSTEM_FOLDER
    monkeypatch.setenv("OUTSTATION_FLEET", "y")
    assert fleet_config.find_folder(None) == Path("y")
    monkeypatch.delenv("OUTSTATION_FLEET")
    monkeypatch.chdir(folder)
    assert fleet_config.find_folder(None) == Path()
    assert fleet_config.load(Path()).fleet.db == str(folder / "fleet.db")
    with pytest.raises(UsageError, match="fleet init"):
        fleet_config.load(tmp_path)
    (folder / "fleet.toml").write_text('[fleet]\nname = "acme"\ndbb = "x"\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"fleet\.dbb: unknown key; did you mean 'db'"):
        fleet_config.load(folder)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("fleet.db", "/base/fleet.db"),
        ("/var/lib/fleet.db", "/var/lib/fleet.db"),
        ("sqlite:///fleet.db", "/base/fleet.db"),
        ("sqlite:////var/lib/fleet.db", "/var/lib/fleet.db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
    ],
)
def test_a_database_is_a_path_or_a_url(url: str, path: str) -> None:
    assert fleet_config.resolve_database(url, Path("/base")) == path


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('db = "postgresql://h/d"\npartitions = 0', "must be 1 to 1024"),
        ("partitions = 4", "needs a PostgreSQL database"),
    ],
)
def test_partitions_are_those_of_postgresql(folder: Path, config: FleetConfig, line: str, problem: str) -> None:
    file = folder / "fleet.toml"
    written = re.sub(r"^db = .*$", line, file.read_text(), flags=re.MULTILINE)
    file.write_text(written)
    with pytest.raises(UsageError, match=rf"fleet\.partitions: {problem}"):
        fleet_config.load(folder)


@pytest.mark.parametrize(("rate", "burst"), [("0.5", "1"), ("0.0001", "1000.0")])
def test_a_quota_that_lets_no_message_pass_is_refused(folder: Path, config: FleetConfig, rate: str, burst: str) -> None:
    file = folder / "fleet.toml"
    written = file.read_text()
    file.write_text(f"{written}\n[quota]\nmessages_per_s = {rate}\nburst_s = {burst}\n")
    with pytest.raises(UsageError, match=r"fleet\.toml: quota\.messages_per_s: no message ever passes"):
        fleet_config.load(folder)
    file.write_text(f"{written}\n[quota]\nmessages_per_s = 0.5\nburst_s = 2\n")
    assert DeviceQuotas(fleet_config.load(folder).quota).admit("pi-07", 1, {"pi-07"}, 0.0)


@pytest.mark.parametrize("url", ["oracle://me:secret@host/db", "mysql://host/db", "sqlite://", "sqlite:///"])
def test_other_databases_are_refused_without_repeating_the_password(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        fleet_config.resolve_database(url, Path("/base"))
    assert "secret" not in str(refused.value)


# --- replacement of a key ---


def held(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}


def active(config: FleetConfig, device: str) -> str:
    with FleetStore(Path(config.fleet.db)) as store:
        key = store.active_key(device)
    assert key is not None
    return key.text


def key_of(home: Path) -> str:
    return keys.load_private(home / "device.key").public.text


def test_a_replacement_that_is_refused_leaves_the_devices_files_whole(folder: Path, config: FleetConfig) -> None:
    home = let_in(config, folder, "pi-07").folder
    other = let_in(config, folder, "pi-08")
    before = held(home)
    with pytest.raises(UsageError, match="belongs to device 'pi-08'"):
        let_in(config, folder, "pi-07", key=other.key, replace=True)
    assert held(home) == before
    assert active(config, "pi-07") == key_of(site(folder, "pi-07"))
    assert len([*folder.parent.glob("pi-07-*.tar.gz")]) == 1


def test_a_replacement_after_the_loss_of_the_database_revokes_the_former_certificate(
    folder: Path, config: FleetConfig
) -> None:
    let_in(config, folder, "pi-07")
    former = revocation.list_issued_serials(folder, "pi-07")
    for file in folder.glob("fleet.db*"):
        file.unlink()
    let_in(config, folder, "pi-07", replace=True)
    listed = x509.load_pem_x509_crl((folder / revocation.CRL_FILE).read_bytes())
    assert [entry.serial_number for entry in listed] == former


def test_a_replacement_with_a_locked_database_leaves_the_files_complete(
    folder: Path, config: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = let_in(config, folder, "pi-07").folder
    before = held(home)
    store = FleetStore(Path(config.fleet.db))
    monkeypatch.setattr("outstation.fleet.database.sqlite.LOCK_WAIT_S", 0.05)
    with open(config.fleet.db + ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageBusy):
            enrol(folder, config, store, "pi-07", replace=True, bundle=folder / "new.tar.gz")
    store.close()
    assert held(home) == before
    assert not (folder / "new.tar.gz").exists()
    assert active(config, "pi-07") == key_of(site(folder, "pi-07"))


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test catches it."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Killed before the `step`-th rename or removal of a file."""
    left = [step]

    def counted(do: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **more: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            do(*args, **more)

        return run

    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("own", [False, True], ids=["keys made here", "keys made on the device"])
def test_a_replacement_killed_at_any_step_completes_when_repeated(
    folder: Path, config: FleetConfig, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    home = let_in(config, folder, "pi-07").folder
    finished = committed = 0
    for step in range(100):
        was, fresh = active(config, "pi-07"), folder.parent / "fresh" / str(step)
        request = join(fresh, "pi-07") if own else None
        with monkeypatch.context() as patched:
            killed_at(step, patched)
            try:
                let_in(config, folder, "pi-07", request=request, replace=True)
                finished = step
            except Killed:
                pass
        if finished:
            break
        committed += active(config, "pi-07") != was
        again = let_in(config, folder, "pi-07", request=request, replace=True)
        device = fresh if own else site(folder, "pi-07")
        assert again.key.text == active(config, "pi-07") == key_of(device)
        pair(home / "device.crt", device / "device-tls.key")
        assert not [*folder.rglob("device*.key")]
    assert 0 < committed < finished


def pair(certificate: Path, key: Path) -> None:
    """Assert that TLS key and certificate match."""
    certified = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    private = load_pem_private_key(key.read_bytes(), None)
    assert certified == private.public_key()


def test_a_command_killed_after_its_commit_leaves_a_complete_file(folder: Path, config: FleetConfig) -> None:
    class CutOff(FleetStore):
        def enrol(self, *args: Any, **more: Any) -> bool:
            super().enrol(*args, **more)
            os._exit(9)

    child = os.fork()
    if child == 0:
        enrol(folder, config, CutOff(Path(config.fleet.db)), "pi-07", bundle=folder.parent / "pi-07.tar.gz")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    home = site(folder, "pi-07")
    with tarfile.open(folder.parent / "pi-07.tar.gz") as tar:
        tar.extractall(home, filter="data")
    assert active(config, "pi-07") == key_of(home)
    pair(home / "device.crt", home / "device-tls.key")


# --- attacks on keys and requests ---


@pytest.mark.attack("enrolment")
def test_an_operators_folder_holds_no_private_key_of_a_device(folder: Path, config: FleetConfig) -> None:
    before = {path for path in folder.rglob("*.key") if path.is_file()}
    let_in(config, folder, "pi-07")
    let_in(config, folder, "pi-08", request=join(site(folder, "pi-08"), "pi-08"))
    let_in(config, folder, "pi-07", replace=True)
    private = [keys.load_private(site(folder, device) / "device.key").pem for device in ("pi-07", "pi-08")]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path for path in files if b"PRIVATE KEY" in path.read_bytes()} == before
    assert not any(pem in path.read_bytes() for path in files for pem in private)


def test_keys_made_here_without_a_file_for_them_are_refused(folder: Path, config: FleetConfig) -> None:
    store = FleetStore(Path(config.fleet.db))
    with pytest.raises(UsageError, match=r"no private key stays.*--bundle-out.*outstation request"):
        enrol(folder, config, store, "pi-07")
    assert store.active_key("pi-07") is None
    store.close()
    assert not (folder / "devices").exists()


def test_a_device_that_joins_gets_a_certificate_for_its_own_key(
    folder: Path, config: FleetConfig, tmp_path: Path
) -> None:
    home = site(folder, "pi-07")
    request = join(home, "pi-07")
    done = let_in(config, folder, "pi-07", request=request)
    assert (done.made_by, done.key.text) == ("device", key_of(home))
    pair(home / "device.crt", home / "device-tls.key")
    files = held(done.folder)
    again = let_in(config, folder, "pi-07", request=request)
    assert (again.is_new, held(again.folder)) == (False, files)
    let_in(config, folder, "pi-08")
    store = FleetStore(Path(config.fleet.db))
    with store.snapshot() as db:
        assert [row["made_by"] for row in EvidenceQueries(store, db).load_keys()] == ["device", "operator"]
    store.close()
    with MosquittoBroker(tmp_path, conf=as_this_user(folder), port=config.broker.port):
        Link(settings_of(folder, "pi-07"), "pi-07").close()


@pytest.mark.attack("enrolment")
def test_a_request_for_another_device_or_fleet_lets_nobody_in(folder: Path, config: FleetConfig) -> None:
    with pytest.raises(UsageError, match="is for device 'pi-08' of fleet 'acme', not 'pi-07'"):
        let_in(config, folder, "pi-07", request=join(site(folder, "a"), "pi-08"))
    with pytest.raises(UsageError, match="of fleet 'other'"):
        let_in(config, folder, "pi-07", request=join(site(folder, "b"), "pi-07", "other"))
    assert not (folder / "devices").exists()


@pytest.mark.attack("enrolment", control=True)
def test_an_operator_who_compares_neither_token_nor_thumbprint_lets_a_stranger_write_a_devices_log(
    folder: Path, config: FleetConfig
) -> None:
    stranger = site(folder, "stranger")
    let_in(config, folder, "pi-07", request=join(stranger, "pi-07"))
    pair(site(folder, "pi-07") / "device.crt", stranger / "device-tls.key")
    forged = MessageSender("pi-07", keys.load_private(stranger / "device.key")).results()
    store = FleetStore(Path(config.fleet.db))
    assert verify_message(forged.topic, forged.payload, (forged.jws,), Keyring(store).find).body.device == "pi-07"
    store.close()


@pytest.mark.attack("enrolment")
def test_a_strangers_request_needs_the_token_or_the_thumbprint(folder: Path, config: FleetConfig) -> None:
    home, now = folder / "devices" / "pi-07", 1_000_000
    stranger = join(site(folder, "stranger"), "pi-07")
    with pytest.raises(UsageError, match=r"without a token.*--thumbprint"):
        join_tokens.authenticate(home, stranger, None, now)
    with pytest.raises(UsageError, match="another device's request"):
        join_tokens.authenticate(home, stranger, new_key().public.kid, now)
    join_tokens.authenticate(home, stranger, stranger.key.kid, now)
    guess = join(site(folder, "guess"), "pi-07", token="AAAAAAAAAAAAAAAAAAAAAA")
    with pytest.raises(UsageError, match="no join token"):
        join_tokens.authenticate(home, guess, None, now)
    token = join_tokens.create(home, now + 10)
    with pytest.raises(UsageError, match="another join token: it may be a forgery"):
        join_tokens.authenticate(home, guess, None, now)
    not_ascii = msgspec.structs.replace(guess, body=msgspec.structs.replace(guess.body, proof="é" * 43))
    with pytest.raises(UsageError, match="another join token: it may be a forgery"):
        join_tokens.authenticate(home, not_ascii, None, now)
    genuine = join(site(folder, "pi-07"), "pi-07", token=token)
    with pytest.raises(UsageError, match="expired"):
        join_tokens.authenticate(home, genuine, None, now + 11)
    join_tokens.authenticate(home, genuine, None, now)
    join_tokens.authenticate(home, genuine, None, now + 11)
    with pytest.raises(UsageError, match="already let key"):
        join_tokens.authenticate(home, join(site(folder, "thief"), "pi-07", token=token), None, now)


def test_a_device_is_enrolled_where_only_public_keys_of_the_roles_are(folder: Path, config: FleetConfig) -> None:
    public = [keys.load_private(folder / f"{role}.key").public.text for role in ("collector", "operator")]
    for role in ("collector", "operator"):
        (folder / f"{role}.key").unlink()
    loaded = device_config.load(let_in(config, folder, "pi-07").folder / "outstation.toml")
    assert [loaded.collector.key, *loaded.operators.keys] == public


def test_nothing_is_made_or_enrolled_while_the_clock_is_not_set(tmp_path: Path) -> None:
    unset = ClockReading(wall_us=120_000_000, boot_s=120.0, quality="unsynced")
    with clock.simulated(lambda: unset, lambda: "boot"):
        with pytest.raises(UsageError, match=r"the clock of this machine is not set, it is 1970-01-01: certificates"):
            init_fleet(tmp_path / "acme", "acme", BrokerConfig(url="mqtt://127.0.0.1:1"))
        assert not (tmp_path / "acme").exists()
    config = init_fleet(tmp_path / "acme", "acme", BrokerConfig(url="mqtt://127.0.0.1:1"))
    with (
        contextlib.closing(FleetStore(config.fleet.db)) as store,
        clock.simulated(lambda: unset, lambda: "boot"),
    ):
        with pytest.raises(UsageError, match="is not set"):
            enrol(tmp_path / "acme", config, store, "pi-01", bundle=tmp_path / "pi-01.tar.gz")
        assert store.enrolled_devices() == []


def test_no_certificate_is_issued_or_renewed_while_the_clock_is_not_set(
    config: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.ca is not None
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    monkeypatch.setattr(pki, "_now", lambda: datetime(1970, 1, 1, tzinfo=UTC))
    with pytest.raises(UsageError, match="is not set, it is 1970-01-01"):
        authority.issue_client("pi-07", "acme")
    with pytest.raises(UsageError, match="is not set"):
        pki.create_authority("acme")
    # A revocation does not wait for a time server.
    assert b"X509 CRL" in authority.build_crl([], [7])
