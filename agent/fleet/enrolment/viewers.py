"""Viewers: certificates that read the fleet's messages at the broker, for MQTT Explorer, mosquitto_sub or Node-RED.

A viewer subscribes to the fleet's topics and publishes nothing. It cannot join the collectors' shared subscriptions,
and so takes no message from them. The broker makes the name in a certificate the client id, so that nobody throws
another one off: each certificate has one connection, and each program a viewer of its own.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent import durable_files
from agent.errors import UsageError
from agent.fleet.config import ClientCertificate, FleetConfig
from agent.fleet.database.store import FleetStore
from agent.fleet.enrolment import broker_control, clients, pki
from agent.fleet.enrolment.broker_access import AccessChange
from agent.fleet.enrolment.revocation import RevocationOutcome
from agent.names import is_name


class AddedViewer(msgspec.Struct, frozen=True):
    """Files of a viewer, and the steps left to the operator."""

    files: list[Path] = msgspec.field(default_factory=list)
    steps: list[str] = msgspec.field(default_factory=list)


def user_name(name: str) -> str:
    return f"viewer-{name}"


def is_viewer(folder: Path, name: str) -> bool:
    return name.startswith("viewer-") and (folder / f"{name}.crt").exists()


def add(folder: Path, config: FleetConfig, name: str) -> AddedViewer:
    """Issue a viewer's certificate, once, and let it in at the broker. Raises UsageError."""
    user = _check_name(name)
    if (folder / "devices" / user).exists():
        raise UsageError(f"a device is enrolled as {user!r}, the name of this viewer at the broker; choose another")
    if config.ca is None:
        return AddedViewer(steps=["The broker is used without TLS: every program on this machine can read it already."])
    files = certificate_of(folder, name)
    certificate, key = Path(files.cert_file), Path(files.tls_key_file)
    if not certificate.exists():
        authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
        issued = authority.issue_client(user, config.fleet.name)
        durable_files.write(key, issued.key, 0o600)
        durable_files.write(certificate, issued.certificate, 0o600)
    access = broker_control.apply(folder, config, AccessChange(user, "viewer"))
    command = (
        f"mosquitto_sub -h {config.broker.host} -p {config.broker.port} --cafile {config.ca.cert_file} --cert "
        f"{certificate} --key {key} -V mqttv5 -v -t 'outstation/{config.fleet.name}/#'"
    )
    return AddedViewer([certificate, key], [*access.steps, f"Watch: {command}"])


def revoke(folder: Path, config: FleetConfig, store: FleetStore, name: str) -> RevocationOutcome:
    """Shut a viewer out. Raises UsageError."""
    return clients.revoke(folder, config, store, _check_name(name), certificate_of(folder, name))


def certificate_of(folder: Path, name: str) -> ClientCertificate:
    user = user_name(name)
    return ClientCertificate(cert_file=str(folder / f"{user}.crt"), tls_key_file=str(folder / f"{user}-tls.key"))


def _check_name(name: str) -> str:
    user = user_name(name)
    if not is_name(user):
        raise UsageError(f"{name!r} cannot name a viewer: use up to 56 of a-z 0-9 . _ -")
    return user
