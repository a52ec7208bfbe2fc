"""Sparkplug from the collector: which broker, under which name, and from which database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outstation.fleet.bridge.stored_devices import StoredDevices
from outstation.fleet.config import FleetConfig
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.integrations.sparkplug import sparkplug
from outstation.integrations.sparkplug.config import SparkplugConfig
from outstation.integrations.sparkplug.sparkplug import Node


def build_publisher(
    config: FleetConfig, section: SparkplugConfig, location: Path | str, is_leader: Callable[[], bool]
) -> BridgeThread:
    """Build the edge node for the fleet's database at `location`."""
    return sparkplug.build_publisher(
        *(Node(section.group or config.fleet.name, section.node), section.broker or config.broker),
        f"outstation-{config.fleet.name}-sparkplug",
        lambda: StoredDevices(location, every_message=True),
        max_age_s=section.max_age,
        is_active=is_leader,
    )
