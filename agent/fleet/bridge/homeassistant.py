"""Home Assistant from the collector: which broker, under which name, and from which database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.bridge import publisher
from agent.bridge.discovery import Place
from agent.bridge.thread import BridgeThread
from agent.config import BrokerConfig, HomeAssistantConfig
from agent.errors import UsageError
from agent.fleet.bridge.stored_devices import StoredDevices
from agent.fleet.config import FleetConfig
from agent.fleet.enrolment.homeassistant import BRIDGE, certificate_of


def build_publisher(
    config: FleetConfig, section: HomeAssistantConfig, location: Path | str, is_leader: Callable[[], bool]
) -> BridgeThread:
    """Build the publisher for the fleet's database at `location`. Raises UsageError."""
    place = Place(config.fleet.name, "collector", section.prefix, section.dashboard)
    return publisher.build_publisher(
        *(place, _choose_broker(config, section), f"outstation-{config.fleet.name}-bridge"),
        lambda: StoredDevices(location),
        max_age_s=section.max_age,
        cleans_up=True,
        is_active=is_leader,
    )


def _choose_broker(config: FleetConfig, section: HomeAssistantConfig) -> BrokerConfig:
    if section.broker is not None:
        return section.broker
    if config.ca is None:
        return config.broker
    identity = certificate_of(Path(config.ca.cert_file).parent, BRIDGE)
    if not Path(identity.cert_file).exists():
        raise UsageError(
            "fleet.toml: [homeassistant] needs a certificate of its own at the fleet's broker; issue it by `outstation "
            "fleet homeassistant`, or name Home Assistant's broker in [homeassistant.broker]"
        )
    return config.broker_for(identity)
