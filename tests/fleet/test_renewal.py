"""Certificates of devices: a year, renewed for the same key, and installed only if they are the fleet's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace

from outstation.__main__ import main
from outstation.device import config as device_config
from outstation.device.bootstrap.joining import read_enrolment
from outstation.device.config.config import Config
from outstation.device.machine import certificate
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import device_list, pki, renewal, revocation
from outstation.fleet.enrolment.enrol import enrol, enrol_on_this_machine, init_fleet
from outstation.foundation.errors import RowRejected, UsageError
from outstation.protocol.transport.broker_config import BrokerConfig
from tests.kit.commands import call_outstation
from tests.kit.enrolments import let_in

YEAR = timedelta(days=365)


@pytest.fixture
def fleet(tmp_path: Path) -> FleetConfig:
    return init_fleet(tmp_path / "acme", "acme", BrokerConfig(url="mqtts://broker"))


@pytest.fixture
def device(tmp_path: Path, fleet: FleetConfig) -> Config:
    """An enrolled device with a data folder."""
    store = FleetStore(Path(fleet.fleet.db))
    home = enrol_on_this_machine(tmp_path / "acme", fleet, store, "pi-07", tmp_path / "pi")
    store.close()
    conf = device_config.load(home / "outstation.toml")
    conf.data_dir.mkdir()
    return conf


def due(tmp_path: Path, fleet: FleetConfig, before: timedelta, *only: str) -> list[renewal.DueCertificate]:
    with FleetStore(Path(fleet.fleet.db)) as store:
        return renewal.list_due(tmp_path / "acme", store, before.total_seconds(), frozenset(only))


def issue(tmp_path: Path, fleet: FleetConfig, entry: renewal.DueCertificate) -> bytes | None:
    with FleetStore(Path(fleet.fleet.db)) as store:
        return renewal.issue(tmp_path / "acme", fleet, store, entry)


def confirm(tmp_path: Path, fleet: FleetConfig, entry: renewal.DueCertificate, pem: bytes) -> None:
    with FleetStore(Path(fleet.fleet.db)) as store:
        renewal.confirm(tmp_path / "acme", fleet, store, entry, pem)


def test_a_certificate_ends_after_a_year_and_is_due_before(tmp_path: Path, fleet: FleetConfig, device: Config) -> None:
    [entry] = due(tmp_path, fleet, YEAR)
    assert abs(entry.end - datetime.now(UTC) - YEAR) < timedelta(hours=1)
    assert due(tmp_path, fleet, timedelta.max) == [entry]
    assert due(tmp_path, fleet, pki.RENEW_BEFORE) == []
    assert due(tmp_path, fleet, pki.RENEW_BEFORE, "pi-07") == [entry]
    with pytest.raises(UsageError, match="pi-09: no enrolled device"):
        due(tmp_path, fleet, YEAR, "pi-07", "pi-09")


def test_a_renewal_that_was_not_confirmed_sends_the_same_certificate_again(
    tmp_path: Path, fleet: FleetConfig, device: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    [entry] = due(tmp_path, fleet, YEAR)
    monkeypatch.setattr(pki, "DEVICE_LIFETIME", 2 * YEAR)
    pem = issue(tmp_path, fleet, entry)
    assert pem
    assert issue(tmp_path, fleet, entry) == pem
    assert due(tmp_path, fleet, YEAR) == [entry]
    confirm(tmp_path, fleet, entry, pem)
    assert due(tmp_path, fleet, YEAR) == []


def test_a_device_that_is_revoked_while_others_are_renewed_gets_no_certificate(
    tmp_path: Path, fleet: FleetConfig, device: Config
) -> None:
    folder = tmp_path / "acme"
    [entry] = due(tmp_path, fleet, YEAR)
    with FleetStore(Path(fleet.fleet.db)) as store:
        done = revocation.revoke_device(folder, fleet, store, "pi-07", None, "2026-01-01T00:00:00Z")
    assert done.certificates == [f"{entry.certificate.serial_number:x}"]
    assert issue(tmp_path, fleet, entry) is None
    assert len([*(folder / "issued" / "pi-07").iterdir()]) == 1


def test_a_late_confirmation_does_not_bring_back_the_certificate_of_a_replaced_device(
    tmp_path: Path, fleet: FleetConfig, device: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "acme"
    [entry] = due(tmp_path, fleet, YEAR)
    monkeypatch.setattr(pki, "DEVICE_LIFETIME", 2 * YEAR)
    pem = issue(tmp_path, fleet, entry)
    assert pem
    let_in(fleet, folder, "pi-07", replace=True)
    confirm(tmp_path, fleet, entry, pem)
    [current] = due(tmp_path, fleet, 3 * YEAR)
    assert current.certificate.public_key() != entry.certificate.public_key()
    listed = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    renewed = x509.load_pem_x509_certificate(pem)
    assert listed.get_revoked_certificate_by_serial_number(renewed.serial_number) is not None
    assert listed.get_revoked_certificate_by_serial_number(current.certificate.serial_number) is None


def test_a_device_uses_the_certificate_that_ends_last_and_keeps_its_key(
    tmp_path: Path, fleet: FleetConfig, device: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    [entry] = due(tmp_path, fleet, YEAR)
    assert certificate.choose_certificate(device) == device.broker
    monkeypatch.setattr(pki, "DEVICE_LIFETIME", 2 * YEAR)
    pem = (issue(tmp_path, fleet, entry) or b"").decode()
    end = certificate.install_certificate(device, pem)
    assert end > entry.end
    assert certificate.install_certificate(device, pem) == end
    chosen = certificate.choose_certificate(device)
    assert chosen == replace(device.broker, cert_file=str(device.data_dir / "device.crt"))
    (device.data_dir / "device.crt").write_text("torn")
    assert certificate.choose_certificate(device) == device.broker


def test_a_renewal_with_a_lost_answer_is_repeated(tmp_path: Path, fleet: FleetConfig, device: Config) -> None:
    folder = tmp_path / "acme"
    [entry] = due(tmp_path, fleet, YEAR)
    key: Any = entry.certificate.public_key()
    ended = _authority(fleet).certify_client("pi-07", "acme", key, timedelta(seconds=-10))
    (folder / "devices" / "pi-07" / "device.crt").write_bytes(ended)
    [former] = due(tmp_path, fleet, YEAR)
    assert former.days_left(datetime.now(UTC)) < 0
    # The certificate of `entry` is archived, and valid.
    assert renewal.may_have_newer(folder, former)
    assert not renewal.may_have_newer(folder, entry)
    assert issue(tmp_path, fleet, former) == entry.certificate.public_bytes(Encoding.PEM)


Forge = Callable[[FleetConfig, renewal.DueCertificate], bytes]


def _authority(fleet: FleetConfig) -> pki.CertificateAuthority:
    assert fleet.ca
    return pki.load_authority(Path(fleet.ca.cert_file), Path(fleet.ca.key_file))


def _other_key(fleet: FleetConfig, entry: renewal.DueCertificate) -> bytes:
    return _authority(fleet).issue_client("pi-07", "acme").certificate


def _other_authority(fleet: FleetConfig, entry: renewal.DueCertificate) -> bytes:
    key: Any = entry.certificate.public_key()
    return pki.create_authority("acme").certify_client("pi-07", "acme", key)


def _other_device(fleet: FleetConfig, entry: renewal.DueCertificate) -> bytes:
    key: Any = entry.certificate.public_key()
    return _authority(fleet).certify_client("pi-08", "acme", key)


def _earlier(fleet: FleetConfig, entry: renewal.DueCertificate) -> bytes:
    key: Any = entry.certificate.public_key()
    return _authority(fleet).certify_client("pi-07", "acme", key, timedelta(days=3))


@pytest.mark.parametrize(
    ("forge", "problem"),
    [
        (lambda *_: b"x", "not a certificate"),
        (_other_key, "another key or device"),
        (_other_device, "another key or device"),
        (_other_authority, "not a certificate of this fleet's authority"),
        (_earlier, "before the one in use"),
    ],
)
def test_a_certificate_that_is_not_the_fleets_for_this_device_is_refused(
    tmp_path: Path, fleet: FleetConfig, device: Config, forge: Forge, problem: str
) -> None:
    [entry] = due(tmp_path, fleet, YEAR)
    with pytest.raises(RowRejected, match=problem):
        certificate.install_certificate(device, forge(fleet, entry).decode())
    assert not (device.data_dir / "device.crt").exists()


# --- lists of devices ---


def test_a_list_is_enrolled_once_however_often_it_is_given(tmp_path: Path) -> None:
    home, out, file = tmp_path / "acme", tmp_path / "out", tmp_path / "devices.csv"
    assert call_outstation("fleet", "init", str(home), "--broker", "mqtts://broker").returncode == 0
    joined = call_outstation("request", str(tmp_path / "pi-03"), "--fleet", "acme", "--id", "pi-03")
    assert joined.returncode == 0
    file.write_text("device,request\npi-01,\npi-02,\npi-03,pi-03/pi-03.request\n\n")
    words = ["fleet", "enrol-list", str(file), "--out", str(out), "--dir", str(home)]
    first = call_outstation(*words)
    assert (first.returncode, "thumbprint" in first.stderr, "2 enrolled" in first.stdout) == (1, True, True)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == ["pi-01.tar.gz", "pi-02.tar.gz"]
    again = call_outstation(*words)
    assert (again.returncode, "2 enrolled before" in again.stdout) == (1, True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_device_that_is_enrolled_again_keeps_its_keys(
    tmp_path: Path, fleet: FleetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, certificate_file = tmp_path / "acme", tmp_path / "acme" / "devices" / "q1" / "device.crt"
    with FleetStore(Path(fleet.fleet.db)) as store:
        with monkeypatch.context() as patched:
            patched.setattr(pki, "DEVICE_LIFETIME", timedelta(days=3))
            enrol(folder, fleet, store, "q1", bundle=tmp_path / "first.tar.gz")
        former = certificate_file.read_bytes()
        enrol(folder, fleet, store, "q1", bundle=tmp_path / "second.tar.gz")
    first, second = (read_enrolment(tmp_path / f"{name}.tar.gz") for name in ("first", "second"))
    assert set(first) - set(second) == {"device.key", "device-tls.key"}
    old, new = (x509.load_pem_x509_certificate(members["device.crt"]) for members in (first, second))
    assert old.public_key() == new.public_key()
    assert new.not_valid_after_utc - old.not_valid_after_utc > pki.RENEW_BEFORE
    # The device does not have the new one yet: it stays due.
    assert certificate_file.read_bytes() == former
    assert [entry.device for entry in due(tmp_path, fleet, YEAR)] == ["q1"]


def test_a_list_that_is_given_again_completes_what_was_killed_and_makes_no_second_keys(
    tmp_path: Path, fleet: FleetConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file, home = tmp_path / "out", tmp_path / "devices.csv", tmp_path / "acme" / "devices" / "q1"
    file.write_text("device\nq1\n")

    def enrol_list(out: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["fleet", "enrol-list", str(file), "--out", str(out), "--dir", str(tmp_path / "acme"), "--json"])
        assert not ended.value.code
        [result] = json.loads(capsys.readouterr().out)
        return str(result["state"])

    assert enrol_list(out) == "enrolled"
    files = {path.name: path.read_bytes() for path in home.iterdir()}
    # Killed after the commit, before any file was written.
    shutil.rmtree(home)
    assert enrol_list(out) == "enrolled before"
    assert {path.name: path.read_bytes() for path in home.iterdir()} == files
    assert enrol_list(tmp_path / "other") == "enrolled before, file gone"
    assert (list((tmp_path / "other").iterdir()), (home / "device.crt").read_bytes()) == ([], files["device.crt"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no column device"),
        ("name\npi-01\n", "column 'name' is unknown"),
        ("device\n", "names 0 devices"),
        ("device\nPi 1\n", r"devices\.csv:2: 'Pi 1' cannot name a device"),
        ("device\npi-1,x\n", "more cells than columns"),
        ("device\npi-1\npi-2\npi-1\n", "lists pi-1 twice"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "devices.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=problem):
        device_list.read(file)


def test_the_repository_is_there_before_the_first_device_is_enrolled(tmp_path: Path) -> None:
    home, bundle = tmp_path / "acme", tmp_path / "pi.tar.gz"
    assert call_outstation("fleet", "init", str(home), "--broker", "mqtts://broker.example.org").returncode == 0
    assert call_outstation("fleet", "enrol", "pi-01", "--bundle-out", str(bundle), "--dir", str(home)).returncode == 0
    assert call_outstation("join", str(bundle), "--dir", str(tmp_path / "pi")).returncode == 0
    conf = device_config.load(tmp_path / "pi" / "outstation.toml")
    assert conf.updates is not None
    assert conf.updates.url == "https://broker.example.org/acme/repository"
    assert Path(conf.updates.root).read_bytes() == (home / "repository" / "metadata" / "1.root.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "acme.root-keys").glob("*.key")) == [
        "root-1.key",
        "root-2.key",
        "root-3.key",
    ]
    status = call_outstation("fleet", "repository", "status", "--dir", str(home))
    assert (status.returncode, "still on this machine" in status.stdout) == (1, True)
    (tmp_path / "acme.root-keys").rename(tmp_path / "stick")
    assert call_outstation("fleet", "repository", "status", "--dir", str(home)).returncode == 0
