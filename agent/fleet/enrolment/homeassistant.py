"""Certificates for Home Assistant at the fleet's broker: one for the bridge that publishes, one for itself to read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from agent.errors import UsageError
from agent.fleet.config import FleetConfig
from agent.fleet.enrolment import clients

BRIDGE, HOME_ASSISTANT = "bridge", "homeassistant"


class AddedClients(msgspec.Struct, frozen=True):
    """Files created for the clients, and the steps left to the operator."""

    files: list[Path] = msgspec.field(default_factory=list)
    steps: list[str] = msgspec.field(default_factory=list)


def add(folder: Path, config: FleetConfig) -> AddedClients:
    """Issue both certificates, once, and let their owners in at the broker. Raises UsageError."""
    taken = [name for name in (BRIDGE, HOME_ASSISTANT) if (folder / "devices" / name).exists()]
    if taken:
        raise UsageError(f"a device is enrolled as {taken[0]!r}, a name that this needs at the broker; rename it first")
    start = "Add a section [homeassistant] to fleet.toml, and start the collector again."
    if config.ca is None:
        return AddedClients(steps=[f"The broker is used without TLS, so no certificate is needed. {start}"])
    done = AddedClients()
    for name in (BRIDGE, HOME_ASSISTANT):
        files, steps = clients.add(folder, config, name, "bridge" if name == BRIDGE else "homeassistant")
        done.files.extend(files)
        done.steps.extend(steps)
    copy = f"Copy {HOME_ASSISTANT}.crt, {HOME_ASSISTANT}-tls.key and ca.pem to its MQTT integration."
    done.steps.extend([start, copy])
    return done
