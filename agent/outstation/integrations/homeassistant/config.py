"""Section [homeassistant], of devices and fleets: whether and where Home Assistant finds the results."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker, check_no_password

SECTION = "homeassistant"
DEFAULT_PREFIX = "homeassistant"
NOT_AUTHENTICATED = (
    "anybody could press: the broker of [homeassistant] asks nobody for a name; give Home Assistant and Outstation a "
    "user name and password or a certificate there, and let only Home Assistant publish below "
    "outstation-bridge/FLEET/verdict"
)


class HomeAssistantConfig(Section, frozen=True):
    """Publishing for Home Assistant.

    ```toml
    [homeassistant]
    max_age = "10 min"

    [homeassistant.broker]
    url = "mqtt://127.0.0.1:1883"
    username = "outstation"
    password = "secret"
    ```

    Without this section nothing is published for it. A device needs it only where no collector publishes.
    See [docs/guides/home-assistant.md](../guides/home-assistant.md).
    """

    enabled: bool = True
    """False switches it off."""
    prefix: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}\Z")] = DEFAULT_PREFIX
    """Discovery prefix of Home Assistant."""
    dashboard: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """URL of `fleet dashboard`, to which the device's page in Home Assistant links."""
    max_age: Duration = Duration(3600.0)
    """A result that is older when it arrives is not published."""
    verdicts: Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?\Z")] = ""
    """Name under which [presses of its buttons](../guides/labels.md#home-assistant) are stored as verdicts; empty for
    no buttons."""
    broker: BrokerConfig | None = None
    """Home Assistant's broker, as section `[homeassistant.broker]` with the keys of `[broker]`; without it,
    `[broker]`."""


def with_absolute_paths(config: HomeAssistantConfig, base: Path) -> HomeAssistantConfig:
    """Return the section with its file paths resolved against `base`."""
    broker = config.broker and config.broker.with_absolute_paths(base)
    return msgspec.structs.replace(config, broker=broker)


def is_authenticated(broker: BrokerConfig) -> bool:
    """Return True if the broker asks who connects, so that its access rules can tell who may press a button."""
    return broker.username is not None or broker.cert_file is not None


def check(file: str, config: HomeAssistantConfig) -> None:
    """Check the section. Raises ConfigError."""
    if config.broker is not None:
        check_broker(file, config.broker, f"{SECTION}.broker")
        if config.verdicts and not is_authenticated(config.broker):
            raise ConfigError(file, f"{SECTION}.verdicts", NOT_AUTHENTICATED)
    if not 1.0 <= config.max_age <= 31 * 86_400.0:
        raise ConfigError(file, f"{SECTION}.max_age", "must be between 1 s and 31 d")
    if config.dashboard:
        key = f"{SECTION}.dashboard"
        check_no_password(file, key, config.dashboard, "the page asks who signs in")
        try:
            parts = urlsplit(config.dashboard)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            usable = False
        if not usable or not config.dashboard.isprintable() or parts.query or parts.fragment:
            raise ConfigError(file, key, f"{config.dashboard!r} is not http://HOST[:PORT] or https://HOST[:PORT]")
