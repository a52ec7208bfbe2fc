"""Which TLS certificates of devices connect no more: the list that the broker reads, `crl.pem`.

- `issued/<device>/<serial>.crt` is written before a device's certificate is, and never removed: a certificate whose
  other files are gone can still be revoked, and so can one that was put there by hand
- `crl.pem` in the fleet's folder is the record: each edition holds all entries of the one before
- `broker/crl.pem` is a copy of it, for the broker; its entries are taken over where it has more
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from agent import durable_files
from agent.errors import StorageError, UsageError
from agent.fleet.config import FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment import broker_config, pki

CRL_FILE = "crl.pem"
CERTIFICATE_FILE = "device.crt"


class RevocationOutcome(msgspec.Struct):
    """What a revocation did: key thumbprints, serial numbers in hex, and a sentence where certificates still connect.

    `failed`: they should not. `steps` are what is left to do at the broker.
    """

    keys: list[str]
    certificates: list[str]
    problem: str | None = None
    failed: bool = False
    steps: tuple[str, ...] = ()


def create_crl(folder: Path, authority: pki.CertificateAuthority) -> None:
    """The empty list: a broker whose config names one does not start without."""
    _write_crl(folder / CRL_FILE, authority.build_crl((), ()))
    _write_crl(folder / "broker" / CRL_FILE, (folder / CRL_FILE).read_bytes())


def archive_certificate(folder: Path, device: str, certificate: bytes) -> None:
    """Keep a certificate (PEM) that is given to `device`. Raises UsageError where it is none, StorageError."""
    latest = folder / "devices" / device / CERTIFICATE_FILE
    path = folder / "issued" / device / f"{pki.read_serial(certificate, latest):x}.crt"
    if not path.exists():
        durable_files.write(path, certificate)


def list_issued_serials(folder: Path, device: str) -> list[int]:
    """Serial numbers of all certificates of `device`, as far as they are known. Raises UsageError, StorageError."""
    latest, kept = folder / "devices" / device / CERTIFICATE_FILE, folder / "issued" / device
    try:
        if latest.exists():
            # It may be of a time when none was kept.
            archive_certificate(folder, device, latest.read_bytes())
    except (UsageError, OSError):
        if not list(kept.glob("*.crt")):
            raise
    return sorted({pki.read_serial(path.read_bytes(), path) for path in kept.glob("*.crt")})


def is_revoked(folder: Path, authority: pki.CertificateAuthority, certificate: Path) -> bool:
    """Whether a certificate (PEM file) connects no more. Raises UsageError."""
    file = folder / CRL_FILE
    if not file.exists():
        return False
    number = pki.read_serial(certificate.read_bytes(), certificate)
    return authority.load_crl(file).get_revoked_certificate_by_serial_number(number) is not None


def add(folder: Path, config: FleetConfig, serials: Iterable[int]) -> tuple[str, ...]:
    """Put `serials` on the list; what is left to do. One at a time: call it in a transaction of the fleet's store.

    Raises UsageError, StorageError; then the list is what it was.
    """
    assert config.ca is not None
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    # Where the broker's user keeps its folder to itself, the record is enough.
    there = [path for path in (folder / CRL_FILE, folder / "broker" / CRL_FILE) if os.access(path, os.F_OK)]
    editions = [authority.load_crl(path) for path in there]
    _write_crl(folder / CRL_FILE, authority.build_crl(editions, serials))
    return _publish_crl(folder)


def revoke_device(
    folder: Path, config: FleetConfig, store: FleetStore, device: str, kid: str | None, now: str
) -> RevocationOutcome:
    """Revoke all keys and certificates of `device`, or its key `kid`; certificates with the last key only.

    The list comes before the database: killed in between, it can be said again. Certificates that cannot be revoked
    keep no key valid. Raises UsageError where nothing could be revoked.
    """
    done = RevocationOutcome([], [])

    def revoke_certificates() -> None:
        if config.ca is None:
            return
        if _has_valid_key(store, device):
            done.problem = f"another key of {device} is valid: its certificate connects until that is revoked, too"
            return
        try:
            serials = list_issued_serials(folder, device)
            if not serials:
                raise UsageError(f"{folder / 'devices' / device / CERTIFICATE_FILE}: is gone, and no copy was kept")
            done.steps = add(folder, config, serials)
            done.certificates = [f"{one:x}" for one in serials]
        except (UsageError, StorageError, OSError) as error:
            done.problem = f"its TLS certificate is not revoked and still connects to the broker: {error}"
            done.failed = True

    if kid is None and config.ca is not None and not _has_valid_key(store, device):
        # Revoked before there was a list, or by one who could not finish at the broker.
        with store.transaction():
            revoke_certificates()
    else:
        done.keys = store.revoke(device, kid, now, before_commit=revoke_certificates)
    return done


def make_certificate_revoker(
    folder: Path, config: FleetConfig, store: FleetStore, device: str, outcome: RevocationOutcome
) -> Callable[[], None]:
    """What revokes the certificates that `device` has now, when called; `done` then tells."""
    serials = list_issued_serials(folder, device) if config.ca is not None else []
    if config.ca is not None and not serials and any(owner == device for _, owner, *_ in store.enrolled_keys()):
        outcome.problem = (
            f"no copy of the former certificate of {device} was kept: it is not revoked, and still connects"
        )

    def revoke_certificates() -> None:
        if serials:
            outcome.steps = add(folder, config, serials)
            outcome.certificates = [f"{one:x}" for one in serials]

    return revoke_certificates


def _has_valid_key(store: FleetStore, device: str) -> bool:
    return any(owner == device and not revoked for _, owner, _, revoked, *_ in store.enrolled_keys())


def _publish_crl(folder: Path) -> tuple[str, ...]:
    """Hand the list to the broker in this folder, and say what only its operator can do."""
    listed, copy, conf = folder / CRL_FILE, folder / "broker" / CRL_FILE, folder / "broker" / "mosquitto.conf"
    steps = []
    try:
        text = conf.read_text(encoding="utf-8")
        _write_crl(copy, listed.read_bytes())
        if not broker_config.has_crl_setting(text):
            line = broker_config.crl_setting(copy.parent.resolve())
            steps.append(f"{conf}: names no list, so that the broker reads none. Add this line after `keyfile`: {line}")
    except (StorageError, OSError) as error:
        steps.append(f"The list is not in the broker's folder ({error}): copy {listed} to the broker's `crlfile`.")
    steps.append(
        f"Where the broker runs on another machine, copy {listed} there, to its `crlfile`; its user must be able to "
        "read it, else the broker lets everybody in again."
    )
    steps.append(
        "Then restart the broker (systemctl restart mosquitto). A reload (kill -HUP) refuses new connections, too, "
        "but ends none that is open, and takes no new line of the config."
    )
    return tuple(steps)


def _write_crl(path: Path, data: bytes) -> None:
    durable_files.write(path, data)
    # Whatever the umask: Mosquitto has another user, and lets everybody in if it cannot read the list when told to.
    path.chmod(0o644)
