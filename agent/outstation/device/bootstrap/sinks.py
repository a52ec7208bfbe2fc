"""Registry of sinks, by the scheme of `[broker] url`: which module takes the device's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outstation.device.config import Config
from outstation.foundation.errors import ConfigError
from outstation.protocol.wire.keys import EncryptionKey, parse_encryption_key

if TYPE_CHECKING:
    from outstation.device.uplink.sink import OpenSink, Sink
    from outstation.protocol.transport.packets import OutgoingMessage

_ENCRYPTS = "[privacy] encrypt seals messages"


# Sinks are imported when they are opened: most commands need none.
def _open_mqtt(conf: Config, subscriptions: Sequence[str], will: OutgoingMessage) -> Sink:
    from outstation.device.machine.certificate import choose_certificate
    from outstation.device.uplink.mqtt_sink import open_mqtt_sink

    return open_mqtt_sink(choose_certificate(conf), conf.device.id, subscriptions, will)


SINKS: dict[str, Callable[[Config, Sequence[str], OutgoingMessage], Sink]] = {"mqtt": _open_mqtt, "mqtts": _open_mqtt}


def sink_opener(conf: Config) -> OpenSink:
    return partial(SINKS[conf.broker.scheme], conf)


def seal_to_collector(
    file: Path, conf: Config, open_sink: OpenSink, find_key: Callable[[EncryptionKey], EncryptionKey | None]
) -> OpenSink:
    """Seal all messages to the key that `find_key` returns for the key of the config. Raises ConfigError."""
    from outstation.device.uplink.sealing_sink import open_sealing_sink

    configured = load_encryption_key(file, conf)
    return partial(open_sealing_sink, open_sink, lambda: find_key(configured))


def load_encryption_key(file: Path, conf: Config, purpose: str = _ENCRYPTS) -> EncryptionKey:
    """Return the encryption key of the config; `purpose` says which section needs it. Raises ConfigError."""
    key = find_encryption_key(file, conf)
    if key is None:
        problem = f"empty: {purpose} to it; copy it from the fleet's folder, encryption/*.pub"
        raise ConfigError(str(file), "collector.encryption_key", problem)
    return key


def find_encryption_key(file: Path, conf: Config) -> EncryptionKey | None:
    """Return the encryption key of the config, if it has one. Raises ConfigError."""
    try:
        return parse_encryption_key(text) if (text := conf.collector.encryption_key) else None
    except ValueError as error:
        problem = f"not a key: {error}; copy it again from encryption/*.pub"
        raise ConfigError(str(file), "collector.encryption_key", problem) from None
