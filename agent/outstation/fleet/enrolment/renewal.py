"""Renewal of devices' TLS certificates: the key that a device has is certified again before its certificate ends.

`devices/<device>/device.crt` is the certificate that the device is known to have. A renewed one is archived in
`issued/` before it is sent, and takes that place when the device confirms it. A repeated renewal sends the same one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding

from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import pki, revocation
from outstation.fleet.enrolment.device_files import CERTIFICATE
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError


class DueCertificate(msgspec.Struct, frozen=True):
    """A device's certificate, and when it ends."""

    device: str
    certificate: x509.Certificate

    @property
    def end(self) -> datetime:
        return self.certificate.not_valid_after_utc

    def days_left(self, now: datetime) -> int:
        return (self.end - now).days


def list_due(
    folder: Path, store: FleetStore, before_s: float, only: frozenset[str] = frozenset()
) -> list[DueCertificate]:
    """Return the certificates of enrolled devices that end within `before_s`, the next to end first. Raises UsageError.

    `only`: these devices, whenever theirs end.
    """
    due, now = [], datetime.now(UTC)
    for device in sorted({owner for _, owner, _, revoked, *_ in store.enrolled_keys() if not revoked}):
        path = folder / "devices" / device / CERTIFICATE
        if (only and device not in only) or not path.exists():
            continue
        certificate = _load(path)
        if only or (certificate.not_valid_after_utc - now).total_seconds() < before_s:
            due.append(DueCertificate(device, certificate))
    if missing := sorted(only - {entry.device for entry in due}):
        raise UsageError(f"{missing[0]}: no enrolled device with a certificate; see `outstation fleet devices`")
    return sorted(due, key=lambda entry: entry.end)


def issue(folder: Path, config: FleetConfig, store: FleetStore, due: DueCertificate) -> bytes | None:
    """Return a certificate (PEM) that ends later: an archived one that was not confirmed, or a new one.

    None if the device was revoked or enrolled anew since `list_due`: one more certificate of its former key would be
    in no revocation list. Raises UsageError and StorageError.
    """
    with store.transaction() as db:
        db.lock_devices([due.device])
        return None if _is_withdrawn(folder, config, store, due) else _issue(folder, config, due)


def _is_withdrawn(folder: Path, config: FleetConfig, store: FleetStore, due: DueCertificate) -> bool:
    """Call it in a transaction that has locked the device, so that nobody revokes it meanwhile."""
    assert config.ca is not None
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    revoked = revocation.is_revoked(folder, authority, due.certificate.serial_number)
    return revoked or store.active_key(due.device) is None


def _issue(folder: Path, config: FleetConfig, due: DueCertificate) -> bytes:
    assert config.ca is not None
    key = due.certificate.public_key()
    assert isinstance(key, Ed25519PublicKey)
    waiting = _list_newer(folder, due)
    fresh = datetime.now(UTC) + pki.RENEW_BEFORE
    if waiting and (newest := max(waiting, key=lambda entry: entry.not_valid_after_utc)).not_valid_after_utc > fresh:
        return newest.public_bytes(Encoding.PEM)
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    pem = authority.certify_client(due.device, config.fleet.name, key, pki.DEVICE_LIFETIME)
    revocation.archive_certificate(folder, due.device, pem)
    return pem


def may_have_newer(folder: Path, due: DueCertificate) -> bool:
    """Return True if the device may have a valid certificate whose receipt is not recorded. Raises UsageError."""
    return any(entry.not_valid_after_utc > datetime.now(UTC) for entry in _list_newer(folder, due))


def _list_newer(folder: Path, due: DueCertificate) -> list[x509.Certificate]:
    """Return the archived certificates of the same key that end later."""
    key = due.certificate.public_key()
    archived = [_load(path) for path in (folder / "issued" / due.device).glob("*.crt")]
    return [entry for entry in archived if entry.public_key() == key and entry.not_valid_after_utc > due.end]


def confirm(folder: Path, config: FleetConfig, store: FleetStore, due: DueCertificate, pem: bytes) -> None:
    """Record that the device has the certificate, unless it was revoked since. Raises UsageError and StorageError."""
    with store.transaction() as db:
        db.lock_devices([due.device])
        if not _is_withdrawn(folder, config, store, due):
            durable_files.write(folder / "devices" / due.device / CERTIFICATE, pem, 0o600)


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(input_files.read_bytes(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a certificate: {error}; restore it from a backup") from None
