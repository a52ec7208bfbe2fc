"""Further collectors of a fleet: the name in a collector's certificate is its client id and broker session."""

from __future__ import annotations

from pathlib import Path

import msgspec

from outstation.fleet.config import FleetConfig, Identity
from outstation.fleet.enrolment import clients
from outstation.fleet.enrolment.clients import AddedClients
from outstation.fleet.enrolment.revocation import RevocationOutcome
from outstation.foundation.errors import UsageError
from outstation.foundation.names import is_name

# Name of the certificate that `fleet init` issues; the broker of such a fleet uses the name in it as the client id.
_INITIAL_CERTIFICATE = "collector.crt"


def resolve_identity(config: FleetConfig, name: str) -> Identity:
    """Return the identity of the collector `name`. Raises UsageError if it has no certificate."""
    _check_name(name)
    configured = config.collector
    if configured.cert_file is None or Path(configured.cert_file).name != _INITIAL_CERTIFICATE:
        return configured
    files = clients.certificate_of(Path(configured.cert_file).parent, user_name(name))
    if not Path(files.cert_file).exists():
        raise UsageError(
            f"{files.cert_file}: no such file; the broker tells collectors apart by their certificates, and "
            f"`outstation fleet keys collector {name}` issues this one"
        )
    return msgspec.structs.replace(configured, cert_file=files.cert_file, tls_key_file=files.tls_key_file)


def add(folder: Path, config: FleetConfig, name: str) -> AddedClients:
    """Issue a collector's certificate, once, and let it in at the broker. Raises UsageError."""
    _check_name(name)
    user, start = user_name(name), f"Start it: outstation fleet collect --share {name}"
    clients.require_no_device(folder, user)
    if config.ca is None:
        return AddedClients(steps=[f"{clients.WITHOUT_TLS} {start}"])
    added = clients.add(folder, config, user, "collector")
    added.steps.append(start)
    return added


def revoke(folder: Path, config: FleetConfig, name: str) -> RevocationOutcome:
    """Shut a collector out. Raises UsageError."""
    _check_name(name)
    return clients.revoke(folder, config, user_name(name))


def is_collector(folder: Path, name: str) -> bool:
    return name.startswith("collector-") and (folder / f"{name}.crt").exists()


def user_name(name: str) -> str:
    return f"collector-{name}"


def _check_name(name: str) -> None:
    if not is_name(user_name(name)):
        raise UsageError(f"{name!r} cannot name a collector: use up to 54 of a-z 0-9 . _ -")
