"""Registry of sinks, by the scheme of `[broker] url`: which module takes the device's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from agent.config import Config

if TYPE_CHECKING:
    from agent.device.uplink.sink import OpenSink, Sink
    from agent.transport.packets import OutgoingMessage


# Sinks are imported when they are opened: most commands need none.
def _open_mqtt(conf: Config, subscriptions: Sequence[str], will: OutgoingMessage) -> Sink:
    from agent.device.uplink.mqtt_sink import open_mqtt_sink

    return open_mqtt_sink(conf.broker, conf.device.id, subscriptions, will)


SINKS: dict[str, Callable[[Config, Sequence[str], OutgoingMessage], Sink]] = {"mqtt": _open_mqtt, "mqtts": _open_mqtt}


def sink_opener(conf: Config) -> OpenSink:
    return partial(SINKS[conf.broker.scheme], conf)
