"""Sink of a device: opened by the module of its scheme, and with `[privacy] encrypt` sealed to the collector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from outstation.device.config import Config
from outstation.device.config.sinks import SINKS
from outstation.foundation.errors import ConfigError
from outstation.protocol.wire.keys import EncryptionKey, parse_encryption_key

if TYPE_CHECKING:
    from outstation.device.uplink.sink import OpenSink, Sink, SinkModule
    from outstation.protocol.transport.packets import OutgoingMessage

_ENCRYPTS = "[privacy] encrypt seals messages"


def sink_opener(file: Path, conf: Config) -> OpenSink:
    """Return the function that opens the sink of `[broker] url`. Raises ConfigError."""
    open_sink = partial(load_sink_module(file, conf).open_sink, conf)
    return open_sink if SINKS.is_shipped(conf.broker.scheme) else partial(_open_foreign, open_sink)


def load_sink_module(file: Path, conf: Config) -> SinkModule:
    """Return the module that opens the sink. Raises ConfigError."""
    module: SinkModule = SINKS.load(conf.broker.scheme, str(file), "broker.url")
    return module


def _open_foreign(open_sink: OpenSink, subscriptions: Sequence[str], will: OutgoingMessage) -> Sink:
    """Open the sink of another package, whose errors never end the daemon. Raises LinkDown."""
    from outstation.device.uplink.foreign_sink import ForeignSink

    return ForeignSink(open_sink, subscriptions, will)


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
