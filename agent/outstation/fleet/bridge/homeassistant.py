"""Home Assistant from the collector: which broker, under which name, and from which database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from outstation.fleet.bridge.stored_devices import StoredDevices
from outstation.fleet.config import FleetConfig
from outstation.fleet.database.store import FleetStore
from outstation.fleet.enrolment import clients
from outstation.fleet.enrolment.homeassistant import BRIDGE
from outstation.fleet.labelling import verdicts
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.integrations.homeassistant import publisher
from outstation.integrations.homeassistant.config import NOT_AUTHENTICATED, HomeAssistantConfig, is_authenticated
from outstation.integrations.homeassistant.discovery import Place
from outstation.integrations.homeassistant.presses import VerdictSink
from outstation.integrations.homeassistant.thread import BridgeThread
from outstation.protocol.transport.broker_config import BrokerConfig


def build_publisher(
    config: FleetConfig, section: HomeAssistantConfig, location: Path | str, is_leader: Callable[[], bool]
) -> BridgeThread:
    """Build the publisher for the fleet's database at `location`. Raises UsageError."""
    place = Place(config.fleet.name, "collector", section.prefix, section.dashboard)
    broker = _choose_broker(config, section)
    if section.verdicts and not is_authenticated(broker):
        raise UsageError(f"fleet.toml: [homeassistant] verdicts: {NOT_AUTHENTICATED}")
    return publisher.build_publisher(
        *(place, broker, f"outstation-{config.fleet.name}-bridge"),
        lambda: StoredDevices(location),
        max_age_s=section.max_age,
        cleans_up=True,
        is_active=is_leader,
        store_verdict=_stored_verdicts(location, section.verdicts) if section.verdicts else None,
    )


def _stored_verdicts(location: Path | str, by: str) -> VerdictSink:
    """Return a sink that stores verdicts in the fleet's database, opened only as long as this takes."""

    def store(device: str, task: str, row: int, label: str) -> str:
        judge = verdicts.Judge(by, "homeassistant", clock.now_rfc3339())
        with FleetStore(location) as opened, opened.transaction() as db:
            given = verdicts.judge_result(db, device, task, row, label, judge)
        return f"row {row} is {given.label}: {given.verdict}"

    return store


def _choose_broker(config: FleetConfig, section: HomeAssistantConfig) -> BrokerConfig:
    if section.broker is not None:
        return section.broker
    if config.ca is None:
        return config.broker
    identity = clients.certificate_of(Path(config.ca.cert_file).parent, BRIDGE)
    if not Path(identity.cert_file).exists():
        raise UsageError(
            "fleet.toml: [homeassistant] needs a certificate of its own at the fleet's broker; issue it by `outstation "
            "fleet keys homeassistant`, or name Home Assistant's broker in [homeassistant.broker]"
        )
    return config.broker_for(identity)
