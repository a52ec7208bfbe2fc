"""Viewers: certificates and passwords that read the fleet's messages, for MQTT Explorer, mosquitto_sub or Node-RED.

A viewer subscribes to the fleet's topics and publishes nothing. It cannot join the collectors' shared subscriptions,
and so takes no message from them. The fleet's broker makes the name in a certificate the client id, so that no client
disconnects another one: a certificate has one connection there. At the viewers' broker (`viewers_broker`) a certificate
or a password may have any number of connections.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment import clients
from outstation.fleet.enrolment.clients import AddedClients
from outstation.fleet.enrolment.revocation import RevocationOutcome
from outstation.fleet.enrolment.viewers_broker import ViewersBroker
from outstation.foundation.errors import StorageError, UsageError
from outstation.foundation.names import is_name

_PASSWORD_BYTES = 18

_WITHOUT_TLS = "The broker is used without TLS: every program on this machine can read it already."


def user_name(name: str) -> str:
    return f"viewer-{name}"


def is_viewer(folder: Path, name: str) -> bool:
    return name.startswith("viewer-") and (folder / f"{name}.crt").exists()


def add(folder: Path, config: FleetConfig, name: str) -> AddedClients:
    """Issue a viewer's certificate, once, and let it in at the broker. Raises UsageError."""
    user = _check_name(name)
    clients.require_no_device(folder, user)
    if config.ca is None:
        return AddedClients(steps=[_WITHOUT_TLS], user=user)
    added = clients.add(folder, config, user, "viewer")
    certificate, key = added.files
    command = (
        f"mosquitto_sub -h {config.broker.host} -p {config.broker.port} --cafile {config.ca.cert_file} --cert "
        f"{certificate} --key {key} -V mqttv5 -v -t 'outstation/{config.fleet.name}/#'"
    )
    added.steps.append(f"Watch: {command}")
    if (broker := ViewersBroker(folder, config)).exists:
        added.steps.extend(broker.admit(user))
        more = f"With port {broker.ports[0]} in its place, any number of programs watches at the same time."
        added.steps.append(more)
    return added


def add_password(folder: Path, config: FleetConfig, name: str) -> AddedClients:
    """Let a viewer in at the viewers' broker with a new password; the former one ends. Raises UsageError."""
    user = _check_name(name)
    if config.ca is None:
        return AddedClients(steps=[_WITHOUT_TLS], user=user)
    broker, password = ViewersBroker(folder, config), secrets.token_urlsafe(_PASSWORD_BYTES)
    steps = broker.create()
    steps += broker.admit(user, password)
    watch = (
        f"mosquitto_sub -h {config.broker.host} -p {broker.ports[1]} --cafile {config.ca.cert_file} -u {user} "
        f"-P PASSWORD -V mqttv5 -v -t 'outstation/{config.fleet.name}/#'"
    )
    return AddedClients([], [*steps, f"Watch: {watch}"], user, password)


def revoke(folder: Path, config: FleetConfig, name: str) -> RevocationOutcome:
    """Shut a viewer out, at the viewers' broker too. Raises UsageError.

    The certificate comes first: it is revoked whatever state the viewers' broker is in.
    """
    user, broker = _check_name(name), ViewersBroker(folder, config)
    has_certificate = Path(clients.certificate_of(folder, user).cert_file).exists()
    is_inside = broker.has(user)
    revokes = has_certificate or not is_inside
    outcome = clients.revoke(folder, config, user) if revokes else RevocationOutcome([], [])
    if not is_inside:
        return outcome
    try:
        steps = broker.expel(user)
    except (OSError, StorageError, ValueError) as error:
        revoked = "its certificate is revoked, but " if has_certificate else ""
        raise UsageError(
            f"{user}: {revoked}the viewers' broker may still let it in: {error}; start that broker, then repeat this"
        ) from None
    outcome.steps = (*steps, *outcome.steps)
    outcome.ended = outcome.ended if has_certificate else not steps
    return outcome


def _check_name(name: str) -> str:
    user = user_name(name)
    if not is_name(user):
        raise UsageError(f"{name!r} cannot name a viewer: use up to 56 of a-z 0-9 . _ -")
    return user
