"""Revocation of devices: their signing keys in the database, their TLS certificates in the CRL `crl.pem`, their access.

The broker withdraws a device's access and ends its session at once. It refuses the certificate once it reads the CRL:
at once if it runs on this machine, otherwise once the operator has copied the list. Until then the certificate connects
without any right.

- `issued/<device>/<serial>.crt` is written before a device's certificate, and never removed: a certificate can be
  revoked after its other files are gone, and so can one that an operator put there
- `crl.pem` in the fleet's folder is the record; each edition has all entries of the one before
- `broker/crl.pem` is a copy for the broker; entries that only the copy has are kept
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_config, broker_control, pki
from outstation.fleet.enrolment.broker_access import AccessChange
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import LinkDown, StorageError, UsageError

CRL_FILE = "crl.pem"
CERTIFICATE_FILE = "device.crt"
_COPY_STEP = (
    "If the broker runs on another machine, copy {} to its `crlfile` there. The broker's user must be able to read "
    "it, or the broker accepts every certificate."
)
_RELOAD_STEP = (
    "Then reload the broker (systemctl reload mosquitto, kill -HUP): it reads the list, and refuses the certificate."
)


class RevocationOutcome(msgspec.Struct):
    """Revoked key thumbprints and certificate serial numbers (hex), and the steps left to the broker's operator.

    `problem`: why certificates still connect; `failed` if they should not. `ended`: the broker ended the session.
    """

    keys: list[str]
    certificates: list[str]
    problem: str | None = None
    failed: bool = False
    steps: tuple[str, ...] = ()
    ended: bool = False


def create_crl(folder: Path, authority: pki.CertificateAuthority) -> None:
    """Write an empty CRL, without which a broker that is configured to use one does not start."""
    _write_crl(folder / CRL_FILE, authority.build_crl((), ()))
    _write_crl(folder / "broker" / CRL_FILE, input_files.read_bytes(folder / CRL_FILE))


def archive_certificate(folder: Path, device: str, certificate: bytes) -> None:
    """Archive a certificate (PEM) of `device`. Raises UsageError if it is invalid, and StorageError."""
    latest = folder / "devices" / device / CERTIFICATE_FILE
    path = folder / "issued" / device / f"{pki.read_serial(certificate, latest):x}.crt"
    if not path.exists():
        durable_files.write(path, certificate)


def list_issued_serials(folder: Path, device: str) -> list[int]:
    """Return the serial numbers of all known certificates of `device`. Raises UsageError and StorageError."""
    latest, archive = folder / "devices" / device / CERTIFICATE_FILE, folder / "issued" / device
    try:
        if latest.exists():
            # An operator may have replaced it by hand.
            archive_certificate(folder, device, input_files.read_bytes(latest))
    except (UsageError, OSError):
        if not list(archive.glob("*.crt")):
            raise
    return sorted({pki.read_serial(input_files.read_bytes(path), path) for path in archive.glob("*.crt")})


def is_revoked(folder: Path, authority: pki.CertificateAuthority, serial: int) -> bool:
    """Return True if a certificate is in the CRL. Raises UsageError."""
    file = folder / CRL_FILE
    return file.exists() and authority.load_crl(file).get_revoked_certificate_by_serial_number(serial) is not None


def add(folder: Path, config: FleetConfig, serials: Iterable[int]) -> tuple[str, ...]:
    """Add `serials` to the CRL, let the broker read it, and return the steps left to the operator.

    One process at a time does it. Raises UsageError and StorageError; the CRL is unchanged then.
    """
    with contextlib.ExitStack() as held:
        try:
            # A transaction would not do: on PostgreSQL those of two devices run at once.
            held.enter_context(durable_files.lock(folder / "crl.lock"))
        except OSError as error:
            raise StorageError(f"{folder / 'crl.lock'}: cannot be opened: {error.strerror}") from error
        return _add(folder, config, serials)


def _add(folder: Path, config: FleetConfig, serials: Iterable[int]) -> tuple[str, ...]:
    assert config.ca is not None
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    listed, copy, conf = folder / CRL_FILE, folder / "broker" / CRL_FILE, folder / "broker" / "mosquitto.conf"
    # The broker's folder may be unreadable for this user; the record is enough.
    editions = [authority.load_crl(path) for path in (listed, copy) if os.access(path, os.F_OK)]
    _write_crl(listed, authority.build_crl(editions, serials))
    steps = []
    try:
        text = input_files.read_text(conf)
        _write_crl(copy, input_files.read_bytes(listed))
        if not any(line.split()[:1] == ["crlfile"] for line in text.splitlines()):
            line = broker_config.crl_setting(copy.parent.resolve())
            steps.append(f"{conf}: names no CRL, so the broker reads none. Add this line after `keyfile`: {line}")
    except (StorageError, OSError) as error:
        steps.append(f"The CRL could not be copied to the broker's folder ({error}): copy {listed} to its `crlfile`.")
    if not steps and broker_control.reload(folder):
        return ()
    return (*steps, _COPY_STEP.format(listed), _RELOAD_STEP)


def revoke_device(
    folder: Path, config: FleetConfig, store: FleetStore, device: str, kid: str | None, now: str
) -> RevocationOutcome:
    """Revoke all keys and certificates of `device`, or its key `kid`; certificates only with the last valid key.

    The CRL is written before the database commits, so the command can be repeated after a crash. The keys are revoked
    even if the certificates cannot be. Raises UsageError if nothing could be revoked.
    """
    done = RevocationOutcome([], [])

    def revoke_certificates() -> None:
        if config.ca is None:
            return
        if _has_valid_key(store, device):
            done.problem = f"another key of {device} is valid: its certificate connects until that key is revoked, too"
            return
        try:
            serials = list_issued_serials(folder, device)
            if not serials:
                missing = folder / "devices" / device / CERTIFICATE_FILE
                raise UsageError(f"{missing}: is missing, and no copy is archived")
            done.steps = add(folder, config, serials)
            done.certificates = [f"{serial:x}" for serial in serials]
        except (UsageError, StorageError, OSError) as error:
            done.problem = f"its TLS certificate is not revoked, and still connects to the broker: {error}"
            done.failed = True

    if kid is None and config.ca is not None and not _has_valid_key(store, device):
        # A repeated command: the keys are revoked already, the certificates may not be.
        with store.transaction():
            revoke_certificates()
    else:
        done.keys = store.revoke(device, kid, now, before_commit=revoke_certificates)
    if not _has_valid_key(store, device):
        change_access(folder, config, AccessChange(device, "none"), done)
    return done


def change_access(folder: Path, config: FleetConfig, change: AccessChange, outcome: RevocationOutcome) -> None:
    """Put a change of a device's access in force, and end the session that a revoked certificate opened."""
    steps: tuple[str, ...] = ()
    try:
        is_in_force, steps = broker_control.apply(folder, config, change)
        if is_in_force and config.ca is not None and (outcome.certificates or change.access == "none"):
            authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
            broker_control.end_session(config, change.client, authority)
            outcome.ended = True
    except (LinkDown, StorageError, UsageError) as error:
        steps = (f"The broker may still have its session: {error}. Repeat the command, or restart the broker.", *steps)
    outcome.steps = (*steps, *outcome.steps)


def replace_certificates(
    folder: Path,
    config: FleetConfig,
    device: str,
    issue: Callable[[], None],
    outcome: RevocationOutcome,
    *,
    was_enrolled: bool,
) -> None:
    """Revoke the certificates that `device` has before `issue` makes another one, and report in `outcome`.

    Call it in a transaction, so that no renewal adds one meanwhile. `was_enrolled`: the database knows it;
    after its loss the archive may know one still. Raises UsageError and StorageError.
    """
    serials = list_issued_serials(folder, device)
    issue()
    if serials:
        outcome.steps = add(folder, config, serials)
        outcome.certificates = [f"{serial:x}" for serial in serials]
    elif was_enrolled:
        problem = f"no copy of the former certificate of {device} is archived"
        outcome.problem = f"{problem}: it is not revoked, and still connects"


def _has_valid_key(store: FleetStore, device: str) -> bool:
    return any(owner == device and not revoked for _, owner, _, revoked, *_ in store.enrolled_keys())


def _write_crl(path: Path, data: bytes) -> None:
    durable_files.write(path, data)
    # Whatever the umask: Mosquitto runs as another user, and accepts every certificate if it cannot read the list.
    path.chmod(0o644)
