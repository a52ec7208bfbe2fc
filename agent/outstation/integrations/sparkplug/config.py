"""Section [sparkplug] of fleets: whether and where Sparkplug hosts find the results."""

from pathlib import Path
from typing import Annotated

import msgspec

from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker


class SparkplugConfig(Section, frozen=True):
    """Edge node of [Sparkplug B](../guides/sparkplug.md), through which its hosts find the results.

    ```toml
    [sparkplug]
    group = "plant-7"

    [sparkplug.broker]
    url = "mqtts://scada.example.org:8883"
    ```
    """

    enabled: bool = True
    """False switches it off."""
    group: Annotated[str, msgspec.Meta(pattern=r"^[^+/#\x00]{0,64}\Z")] = ""
    """Group id; the fleet's name without it."""
    node: Annotated[str, msgspec.Meta(pattern=r"^[^+/#\x00]{1,64}\Z")] = "outstation"
    """Id of the edge node."""
    max_age: Duration = Duration(600.0)
    """A result that is older when it arrives is marked as historical."""
    broker: BrokerConfig | None = None
    """Broker of the hosts, with the keys of [broker](config.md#broker); without it, the fleet's broker."""


def with_absolute_paths(config: SparkplugConfig, base: Path) -> SparkplugConfig:
    """Return the section with its file paths resolved against `base`."""
    broker = config.broker and config.broker.with_absolute_paths(base)
    return msgspec.structs.replace(config, broker=broker)


def check(file: str, config: SparkplugConfig, fleet_broker: BrokerConfig) -> None:
    """Check the section. Raises ConfigError."""
    if config.broker is not None:
        check_broker(file, config.broker, "sparkplug.broker")
    elif fleet_broker.cert_file is not None:
        problem = (
            "is missing: the fleet's broker takes one connection per certificate; name the broker of the hosts here"
        )
        raise ConfigError(file, "sparkplug.broker", problem)
    if not 1.0 <= config.max_age <= 31 * 86_400.0:
        raise ConfigError(file, "sparkplug.max_age", "must be between 1 s and 31 d")
