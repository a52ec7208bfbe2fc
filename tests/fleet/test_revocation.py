"""Revocation of certificates, with real TLS and a real Mosquitto on the config that `fleet init` writes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.device import config as device_config
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_control, pki, revocation
from outstation.fleet.enrolment.device_files import CERTIFICATE, TLS_KEY
from outstation.fleet.enrolment.enrol import init_fleet
from outstation.fleet.enrolment.revocation import revoke_device
from outstation.foundation.errors import LinkDown, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from outstation.protocol.transport.mqtt import Link
from outstation.workbench.testing.broker import MosquittoBroker, free_port
from outstation.workbench.testing.messages import new_key
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from tests.kit.commands import call_outstation
from tests.kit.enrolments import let_in, site

NOW = "2026-01-01T00:00:00Z"


class Desk:
    """A fleet of two devices, `pi-07` and `pi-08`, and its broker."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.folder = folder / "acme"
        self.config: FleetConfig = init_fleet(self.folder, "acme", BrokerConfig(url=f"mqtts://localhost:{port}"))
        self.conf = self.folder / "broker" / "mosquitto.conf"
        # The broker logs when it reloads.
        more = "log_type information\n" + ("user root\n" if os.geteuid() == 0 else "")
        self.conf.write_text(self.conf.read_text(encoding="utf-8") + more, encoding="utf-8")
        self.store = FleetStore(Path(self.config.fleet.db))
        for device in ("pi-07", "pi-08"):
            self.enrol(device)
        self.broker = MosquittoBroker(folder, conf=self.conf, port=port)

    def enrol(self, device: str, *, replace: bool = False, keep_certificate: bool = False) -> None:
        let_in(self.config, self.folder, device, replace=replace, keep_certificate=keep_certificate)

    def serial(self, device: str) -> int:
        return pki.read_serial((self.folder / "devices" / device / "device.crt").read_bytes(), Path())

    def credentials(self, device: str) -> BrokerConfig:
        """Copy the device's TLS files, as a thief would; the copy survives a new enrolment."""
        broker = device_config.load(site(self.folder, device) / "outstation.toml").broker
        taken = self.folder.parent / f"taken-{device}-{self.serial(device)}"
        taken.mkdir(exist_ok=True)
        for name in (TLS_KEY, CERTIFICATE):
            shutil.copy(site(self.folder, device) / name, taken)
        key, certificate = (str(taken / name) for name in (TLS_KEY, CERTIFICATE))
        return BrokerConfig(url=broker.url, ca_file=self.config.broker.ca_file, cert_file=certificate, tls_key_file=key)

    def reload(self) -> None:
        """Send SIGHUP, and wait until the single-threaded broker handles it."""
        before = self.broker.log.read_text(encoding="utf-8").count("Reloading config")
        os.kill(self.broker.pid, signal.SIGHUP)
        wait_until("a reload", lambda: self.broker.log.read_text(encoding="utf-8").count("Reloading config") > before)

    def cli(self, *words: str) -> tuple[int, dict[str, Any]]:
        done = call_outstation("fleet", *words, "--dir", str(self.folder), "--json")
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def connects(who: BrokerConfig) -> bool:
    try:
        Link(who, "someone", timeout_s=10.0).close()
    except LinkDown:
        return False
    return True


def listed(file: Path) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl(file.read_bytes())}


def test_a_revoked_device_is_refused_after_the_broker_reads_the_crl(desk: Desk) -> None:
    stolen, other = desk.credentials("pi-07"), desk.credentials("pi-08")
    with desk.broker:
        assert connects(stolen), "nobody is on the empty list"
        assert connects(other)
        code, document = desk.cli("revoke", "pi-07")
        assert (code, document["device"], document["problem"]) == (0, "pi-07", None)
        assert len(document["revoked"]) == 1
        assert document["certificates"] == [f"{desk.serial('pi-07'):x}"]
        assert document["session_ended"]
        assert document["steps"] == []
        assert not connects(stolen)
        assert connects(other)
        assert connects(desk.config.broker_for(desk.config.collector))


def test_a_process_that_has_the_number_of_a_broker_that_ended_is_left_alone(desk: Desk) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        (desk.folder / "broker" / broker_control.PID_FILE).write_text(f"{other.pid}\n", encoding="ascii")
        done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
        assert any("reload the broker" in step for step in done.steps)
        assert other.poll() is None
        other.kill()


def test_a_broker_that_starts_and_does_not_catch_the_signal_yet_is_not_ended_by_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_control, "_TIMEOUT_S", 0.3)
    program = "import time; open('/proc/self/comm', 'w').write('mosquitto'); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program]) as starting:
        comm = Path(f"/proc/{starting.pid}/comm")
        wait_until("the name of the process", lambda: comm.read_text(encoding="utf-8") == "mosquitto\n")
        (desk.folder / "broker" / broker_control.PID_FILE).write_text(f"{starting.pid}\n", encoding="ascii")
        assert not broker_control.reload(desk.folder)
        assert starting.poll() is None
        starting.kill()


def test_after_a_replacement_only_the_new_certificate_connects(desk: Desk) -> None:
    stolen = desk.credentials("pi-07")
    with desk.broker:
        bundle = desk.folder.parent / "replaced.tar.gz"
        code, document = desk.cli("enrol", "pi-07", "--replace", "--bundle-out", str(bundle))
        assert (code, len(document["revoked_certificates"])) == (0, 1)
        with tarfile.open(bundle) as tar:
            tar.extractall(site(desk.folder, "pi-07"), filter="data")
        desk.reload()
        assert connects(desk.credentials("pi-07"))
        assert not connects(stolen)


def test_a_revoked_device_enrolled_with_a_new_key_gets_a_valid_certificate(desk: Desk) -> None:
    revoked = desk.credentials("pi-07")
    revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    let_in(desk.config, desk.folder, "pi-07", key=new_key(5).public)
    with desk.broker:
        assert connects(desk.credentials("pi-07"))
        assert not connects(revoked)


def test_a_certificate_stays_on_request_when_the_key_is_replaced(desk: Desk) -> None:
    before = desk.credentials("pi-07")
    with desk.broker:
        desk.enrol("pi-07", replace=True, keep_certificate=True)
        desk.reload()
        assert connects(before)
    assert desk.serial("pi-07") == pki.read_serial(Path(str(before.cert_file)).read_bytes(), Path())


def test_keeping_a_certificate_that_nothing_replaces_is_wrong_use(desk: Desk) -> None:
    done = call_outstation("fleet", "enrol", "pi-07", "--keep-certificate", "--dir", str(desk.folder))
    assert (done.returncode, "--replace" in done.stderr) == (2, True)


def test_every_edition_holds_the_entries_of_the_one_before_and_is_newer(desk: Desk) -> None:
    first, file = desk.serial("pi-07"), desk.folder / "crl.pem"
    ca = x509.load_pem_x509_certificate((desk.folder / "ca.pem").read_bytes())
    editions = [x509.load_pem_x509_crl(file.read_bytes())]
    for _ in range(3):
        desk.enrol("pi-07", replace=True)
        editions.append(x509.load_pem_x509_crl(file.read_bytes()))
    assert [len(edition) for edition in editions] == [0, 1, 2, 3]
    assert first in listed(file)
    times = [edition.last_update_utc for edition in editions]
    assert times == sorted(set(times)), "OpenSSL takes the older of two that say the same"
    assert times[-1] < datetime.now(UTC) - timedelta(hours=23), "for brokers whose clocks lag"
    assert editions[-1].next_update_utc == ca.not_valid_after_utc
    assert listed(file) == listed(desk.folder / "broker" / "crl.pem")


@pytest.mark.parametrize("where", ["", "broker"])
def test_a_lost_or_outdated_crl_is_restored_from_its_copy(desk: Desk, where: str) -> None:
    empty = (desk.folder / "crl.pem").read_bytes()
    desk.enrol("pi-07", replace=True)
    before = listed(desk.folder / "crl.pem")
    (desk.folder / where / "crl.pem").write_bytes(empty)
    desk.enrol("pi-07", replace=True)
    assert before < listed(desk.folder / "crl.pem") == listed(desk.folder / "broker" / "crl.pem")
    (desk.folder / where / "crl.pem").unlink()
    desk.enrol("pi-07", replace=True)
    assert len(listed(desk.folder / "crl.pem")) == 3


@pytest.mark.parametrize("damage", ["junk", "foreign"])
def test_a_damaged_crl_stays_and_the_signing_key_is_revoked_anyway(desk: Desk, tmp_path: Path, damage: str) -> None:
    file = desk.folder / "crl.pem"
    foreign = pki.create_authority("acme").build_crl((), ())
    file.write_bytes(b"junk" if damage == "junk" else foreign)
    before = file.read_bytes()
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert done.failed
    assert str(file) in str(done.problem)
    assert (len(done.keys), done.certificates) == (1, [])
    assert desk.store.active_key("pi-07") is None
    assert file.read_bytes() == before
    with pytest.raises(UsageError, match=r"crl\.pem"):
        desk.enrol("pi-08", replace=True)
    assert desk.store.active_key("pi-08") is not None, "nothing was replaced"


def test_revoke_can_be_repeated_after_a_crash_before_the_commit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException): ...

    real = revocation.add

    def killed(*members: object) -> tuple[str, ...]:
        real(*members)  # type: ignore[arg-type]
        raise Killed

    monkeypatch.setattr(revocation, "add", killed)
    with pytest.raises(Killed):
        revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}
    assert desk.store.active_key("pi-07") is not None
    monkeypatch.undo()
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert (len(done.keys), len(done.certificates)) == (1, 1)
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}


def test_two_devices_revoked_at_once_are_both_on_the_list(desk: Desk) -> None:
    with ThreadPoolExecutor() as both:
        commands = [("fleet", "revoke", device, "--dir", str(desk.folder)) for device in ("pi-07", "pi-08")]
        assert [done.returncode for done in both.map(lambda words: run_outstation(*words), commands)] == [0, 0]
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07"), desk.serial("pi-08")}
    rules = json.loads((desk.folder / "broker" / "dynamic-security.json").read_bytes())
    assert {client["username"] for client in rules["clients"] if client.get("disabled")} == {"pi-07", "pi-08"}


def test_no_entry_is_lost_by_processes_without_a_common_transaction(desk: Desk) -> None:
    # On PostgreSQL the transactions of two devices run at once.
    serials = set(range(1, 25))
    with ThreadPoolExecutor(8) as many:
        for _ in many.map(lambda serial: revocation.add(desk.folder, desk.config, [serial]), serials):
            pass
    assert listed(desk.folder / "crl.pem") == serials


def test_a_revoked_device_is_added_to_a_crl_that_lacks_it(desk: Desk) -> None:
    desk.store.revoke("pi-07", None, NOW)
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert (done.keys, done.failed) == ([], False)
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}


def test_a_fleet_without_a_crl_gets_one_with_steps_for_its_broker(desk: Desk) -> None:
    stolen = desk.credentials("pi-07")
    for file in (desk.folder / "crl.pem", desk.folder / "broker" / "crl.pem"):
        file.unlink()
    for file in (desk.folder / "issued").rglob("*.crt"):
        file.unlink()
    text = desk.conf.read_text(encoding="utf-8")
    line = f"crlfile {desk.folder}/broker/crl.pem"
    desk.conf.write_text(text.replace(line + "\n", ""), encoding="utf-8")
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    [step] = [step for step in done.steps if "names no CRL" in step]
    assert str(desk.conf) in step
    assert step.endswith(line)
    desk.conf.write_text(text, encoding="utf-8")
    with desk.broker:
        assert not connects(stolen)
        assert connects(desk.credentials("pi-08"))


def test_a_crl_signed_by_another_tool_is_continued(desk: Desk) -> None:
    authority = pki.load_authority(desk.folder / "ca.pem", desk.folder / "ca.key")
    now = datetime.now(UTC).replace(microsecond=0)
    entry = x509.RevokedCertificateBuilder().serial_number(99).revocation_date(now).build()
    builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
    by_hand = builder.last_update(now).next_update(now + timedelta(days=30)).add_revoked_certificate(entry)
    (desk.folder / "crl.pem").write_bytes(by_hand.sign(authority.key, None).public_bytes(Encoding.PEM))
    revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert listed(desk.folder / "crl.pem") == {99, desk.serial("pi-07")}


def test_a_fleet_with_a_remote_broker_gets_a_copy_step(desk: Desk) -> None:
    shutil.rmtree(desk.folder / "broker")
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert not done.failed
    assert "could not be written either" in done.steps[0]
    assert f"copy {desk.folder / 'crl.pem'} to its `crlfile`" in done.steps[1]
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}


def test_a_device_with_missing_files_is_revoked(desk: Desk) -> None:
    serial = desk.serial("pi-07")
    for file in (desk.folder / "devices" / "pi-07").iterdir():
        file.unlink()
    assert not revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW).failed
    assert listed(desk.folder / "crl.pem") == {serial}


def test_a_certificate_added_to_the_archive_by_hand_is_revoked(desk: Desk) -> None:
    before = Path(str(desk.credentials("pi-07").cert_file))
    desk.enrol("pi-07", replace=True, keep_certificate=True)
    forgotten = pki.read_serial(before.read_bytes(), before)
    for file in (desk.folder / "issued" / "pi-07").iterdir():
        file.unlink()
    (desk.folder / "devices" / "pi-07" / "device.crt").unlink()
    desk.enrol("pi-07")
    revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}
    shutil.copy(before, desk.folder / "issued" / "pi-07" / "old.crt")
    revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    assert listed(desk.folder / "crl.pem") == {forgotten, desk.serial("pi-07")}


def test_a_damaged_copy_does_not_keep_a_device_in(desk: Desk) -> None:
    serial = desk.serial("pi-07")
    (desk.folder / "devices" / "pi-07" / "device.crt").write_bytes(b"junk")
    assert not revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW).failed
    assert listed(desk.folder / "crl.pem") == {serial}


def test_an_unknown_former_certificate_is_reported_as_valid(desk: Desk) -> None:
    for file in (desk.folder / "devices" / "pi-07" / "device.crt", *(desk.folder / "issued" / "pi-07").iterdir()):
        file.unlink()
    code, document = desk.cli("revoke", "pi-07")
    assert code == 1
    assert len(document["revoked"]) == 1
    assert "still connects" in str(document["problem"])
    assert listed(desk.folder / "crl.pem") == set()


def test_the_certificate_stays_while_another_key_of_the_device_is_valid(desk: Desk) -> None:
    old = desk.store.active_key("pi-07")
    assert old is not None
    desk.store.enrol("pi-07", new_key(5).public, replace=True, now=NOW, keep_through=3)
    done = revoke_device(desk.folder, desk.config, desk.store, "pi-07", old.kid, NOW)
    assert (done.keys, done.certificates, done.failed) == ([old.kid], [], False)
    assert "another key of pi-07 is valid" in str(done.problem)
    last = desk.store.active_key("pi-07")
    assert last is not None
    assert revoke_device(desk.folder, desk.config, desk.store, "pi-07", last.kid, NOW).certificates
    assert listed(desk.folder / "crl.pem") == {desk.serial("pi-07")}


def test_a_key_that_is_none_of_the_devices_changes_no_list(desk: Desk) -> None:
    before = (desk.folder / "crl.pem").read_bytes()
    with pytest.raises(UsageError, match="no key x"):
        revoke_device(desk.folder, desk.config, desk.store, "pi-07", "x", NOW)
    assert (desk.folder / "crl.pem").read_bytes() == before


def test_an_operators_umask_does_not_keep_the_list_from_the_brokers_user(desk: Desk) -> None:
    before = os.umask(0o077)
    try:
        revoke_device(desk.folder, desk.config, desk.store, "pi-07", None, NOW)
    finally:
        os.umask(before)
    for file in (desk.folder / "crl.pem", desk.folder / "broker" / "crl.pem"):
        assert file.stat().st_mode & 0o777 == 0o644


def test_the_broker_does_not_start_without_the_list(desk: Desk) -> None:
    (desk.folder / "broker" / "crl.pem").unlink()
    # The broker listens for a moment before it reads the CRL.
    with contextlib.suppress(RuntimeError):
        desk.broker.start()
    output = "Unable to load certificate revocation file"
    wait_until("the broker says why", lambda: output in desk.broker.log.read_text(errors="replace"))
    wait_until("and ends", lambda: not desk.broker.is_running)


def test_a_fleet_without_tls_revokes_keys_and_speaks_of_no_certificate(tmp_path: Path) -> None:
    config = init_fleet(tmp_path / "home", "home", BrokerConfig(url="mqtt://127.0.0.1:1883"))
    store = FleetStore(Path(config.fleet.db))
    let_in(config, tmp_path / "home", "pi-07")
    done = revoke_device(tmp_path / "home", config, store, "pi-07", None, NOW)
    store.close()
    assert (len(done.keys), done.certificates, done.problem, done.steps) == (1, [], None, ())
    assert not (tmp_path / "home" / "crl.pem").exists()
