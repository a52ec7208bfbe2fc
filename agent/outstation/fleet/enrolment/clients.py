"""Certificates of broker clients that are no devices: issue, revoke and replace them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from outstation.fleet.config import ClientCertificate, FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import broker_access, broker_control, pki, revocation
from outstation.fleet.enrolment.broker_access import Access, AccessChange
from outstation.fleet.enrolment.revocation import RevocationOutcome
from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import LinkDown, StorageError, UsageError

WITHOUT_TLS = "The broker is used without TLS, so no certificate is needed."
ROLES = ("collector", "operator", "commander", broker_access.ADMIN)


class AddedClients(msgspec.Struct, frozen=True):
    """Files created for clients, and the steps left to the operator. `password` is stored nowhere, but for its hash."""

    files: list[Path] = msgspec.field(default_factory=list)
    steps: list[str] = msgspec.field(default_factory=list)
    user: str = ""
    password: str | None = None


def certificate_of(folder: Path, user: str) -> ClientCertificate:
    return ClientCertificate(str(folder / f"{user}.crt"), str(folder / f"{user}-tls.key"))


def require_no_device(folder: Path, user: str) -> None:
    """Raise UsageError if a device has the name of a client, which is one at the broker."""
    if (folder / "devices" / user).exists():
        raise UsageError(f"a device is enrolled as {user!r}, the name of this client at the broker; choose another")


def add(folder: Path, config: FleetConfig, user: str, access: Access) -> AddedClients:
    """Issue a client's certificate, once, and let it in at a broker with TLS. Raises UsageError."""
    assert config.ca is not None
    files = certificate_of(folder, user)
    certificate, key = Path(files.cert_file), Path(files.tls_key_file)
    if not certificate.exists():
        authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
        issued = authority.issue_client(user, config.fleet.name)
        durable_files.write(key, issued.key, 0o600)
        durable_files.write(certificate, issued.certificate, 0o600)
    steps = broker_control.apply(folder, config, AccessChange(user, access)).steps
    return AddedClients([certificate, key], [*steps], user)


def revoke(folder: Path, config: FleetConfig, user: str) -> RevocationOutcome:
    """Withdraw a client's access: revoke its certificate, end its session and remove its files.

    Raises UsageError and StorageError.
    """
    files = certificate_of(folder, user)
    certificate = Path(files.cert_file)
    if config.ca is None or not certificate.exists():
        raise UsageError(f"{certificate}: no such file, so there is no {user}")
    outcome = _revoke_certificate(folder, config, certificate)
    revocation.change_access(folder, config, AccessChange(user, "none"), outcome)
    durable_files.remove(certificate)
    durable_files.remove(Path(files.tls_key_file))
    return outcome


def reissue(folder: Path, config: FleetConfig, store: FleetStore, role: str) -> RevocationOutcome:
    """Revoke the certificate of a role, and issue another with a new key in its place. A killed call can be repeated.

    Raises UsageError and StorageError.
    """
    certificate, key = folder / f"{role}.crt", folder / f"{role}-tls.key"
    if role not in ROLES:
        raise UsageError(f"{role!r} is no role with a certificate; roles are {', '.join(ROLES)}")
    if config.ca is None or not certificate.exists():
        raise UsageError(f"{certificate}: no such file; the broker is used without TLS, or another folder has it")
    authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
    # Two calls at once must not leave the key of one beside the certificate of the other.
    with store.transaction():
        outcome = _revoke_certificate(folder, config, certificate)
        issued = authority.issue_client(role, config.fleet.name)
        durable_files.write(key, issued.key, 0o600)
        durable_files.write(certificate, issued.certificate, 0o644)
    try:
        if role != broker_access.ADMIN:
            broker_control.end_session(config, role, authority)
            outcome.ended = True
    except (LinkDown, StorageError, UsageError) as error:
        outcome.steps = (f"The broker may still have its session: {error}. Restart the broker.", *outcome.steps)
    return outcome


def _revoke_certificate(folder: Path, config: FleetConfig, certificate: Path) -> RevocationOutcome:
    serial = pki.read_serial(input_files.read_bytes(certificate), certificate)
    return RevocationOutcome([], [f"{serial:x}"], steps=revocation.add(folder, config, [serial]))
