"""Sinks of the device's messages: one for each scheme of `[broker] url`.

The module of a scheme opens it; other packages can add schemes.
"""

from outstation.foundation.config.plugins import PluginGroup
from outstation.foundation.errors import ConfigError
from outstation.protocol.transport.broker_config import MQTT_SCHEMES, UplinkBrokerConfig, check_broker

SINKS = PluginGroup("outstation.sinks", dict.fromkeys(MQTT_SCHEMES, "outstation.device.uplink.mqtt_sink"))


def check_sink(file: str, broker: UplinkBrokerConfig) -> None:
    """Check the address of the sink, and the certificates of MQTT. Raises ConfigError."""
    if SINKS.is_shipped(broker.scheme) or broker.scheme not in SINKS:
        check_broker(file, broker)
        return
    try:
        SINKS.load(broker.scheme, file, "broker.url").check_url(broker.url)
    except ValueError as error:
        raise ConfigError(file, "broker.url", f"{broker.shown_url}: {error}") from None
