"""Collectors beside the first one: each has a name at the broker, which is its client id, and so its session."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent import durable_files
from agent.errors import UsageError
from agent.fleet.config import FleetConfig, Identity
from agent.fleet.enrolment import broker_config, pki
from agent.names import is_name

# Of a fleet that `fleet init` made: its broker takes the name in the certificate as the client id.
_OWN_CERTIFICATE = "collector.crt"


class AddedCollector(msgspec.Struct, frozen=True):
    files: list[Path] = msgspec.field(default_factory=list)
    steps: list[str] = msgspec.field(default_factory=list)


def resolve_identity(config: FleetConfig, name: str) -> Identity:
    """What the collector `name` connects with. Raises UsageError where it has no certificate of its own."""
    _check_name(name)
    given = config.collector
    if given.cert_file is None or Path(given.cert_file).name != _OWN_CERTIFICATE:
        return given
    certificate, key = _certificate_files(Path(given.cert_file).parent, name)
    if not certificate.exists():
        raise UsageError(
            f"{certificate}: no such file; the broker knows collectors apart by their certificates: "
            f"`outstation fleet collector {name}` makes this one"
        )
    return msgspec.structs.replace(given, cert_file=str(certificate), tls_key_file=str(key))


def add(folder: Path, config: FleetConfig, name: str) -> AddedCollector:
    """Its certificate and its place in the broker's access list; what is there already stays. Raises UsageError."""
    _check_name(name)
    user = user_name(name)
    if (folder / "devices" / user).exists():
        raise UsageError(f"a device is enrolled as {user!r}, this collector's name at the broker; choose another")
    if config.ca is None:
        return AddedCollector(
            steps=[f"The broker is used without TLS: nothing to make. Start it: {_start_command(name)}"]
        )
    certificate, key = _certificate_files(folder, name)
    if not certificate.exists():
        authority = pki.load_authority(Path(config.ca.cert_file), Path(config.ca.key_file))
        issued = authority.issue_client(user, config.fleet.name)
        durable_files.write(key, issued.key, 0o600)
        durable_files.write(certificate, issued.certificate, 0o600)
    return AddedCollector(
        [certificate, key], [*_grant_access(folder, config.fleet.name, user), f"Start it: {_start_command(name)}"]
    )


def is_collector(folder: Path, name: str) -> bool:
    """Whether a collector has this name at the broker."""
    return name.startswith("collector-") and (folder / f"{name}.crt").exists()


def user_name(name: str) -> str:
    return f"collector-{name}"


def _grant_access(folder: Path, fleet: str, user: str) -> list[str]:
    path = folder / "broker" / "acl"
    lines = broker_config.collector_acl(fleet, user)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return [f"The broker's access list is not here ({error.strerror}): {path}; add there: {', '.join(lines)}"]
    if lines[0] not in text.splitlines():
        # Not anew: it belongs to the user that runs the broker.
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))
    return [
        f"Where the broker runs on another machine, copy {path} there, to its `acl_file`. "
        "Then let it read that: systemctl reload mosquitto (kill -HUP)."
    ]


def _check_name(name: str) -> None:
    if not is_name(user_name(name)):
        raise UsageError(f"{name!r} cannot name a collector: up to 54 of a-z 0-9 . _ -")


def _certificate_files(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f"{user_name(name)}.crt", folder / f"{user_name(name)}-tls.key"


def _start_command(name: str) -> str:
    return f"outstation fleet collect --share {name}"
