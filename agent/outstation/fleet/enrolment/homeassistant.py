"""Certificates for Home Assistant at the fleet's broker: one for the bridge that publishes, one for itself to read."""

from __future__ import annotations

from pathlib import Path

from outstation.fleet.config import FleetConfig
from outstation.fleet.enrolment import clients
from outstation.fleet.enrolment.clients import AddedClients

BRIDGE, HOME_ASSISTANT = "bridge", "homeassistant"


def add(folder: Path, config: FleetConfig) -> AddedClients:
    """Issue both certificates, once, and let their owners in at the broker. Raises UsageError."""
    for name in (BRIDGE, HOME_ASSISTANT):
        clients.require_no_device(folder, name)
    start = "Add a section [homeassistant] to fleet.toml, and start the collector again."
    if config.ca is None:
        return AddedClients(steps=[f"{clients.WITHOUT_TLS} {start}"])
    done = AddedClients()
    for name in (BRIDGE, HOME_ASSISTANT):
        added = clients.add(folder, config, name, "bridge" if name == BRIDGE else "homeassistant")
        done.files.extend(added.files)
        done.steps.extend(added.steps)
    copy = f"Copy {HOME_ASSISTANT}.crt, {HOME_ASSISTANT}-tls.key and ca.pem to its MQTT integration."
    done.steps.extend([start, copy])
    return done
