"""Config of a device: all sections of its `outstation.toml`, checked against each other."""

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.config import samples, updates
from outstation.device.config.device import (
    BufferConfig,
    CollectorConfig,
    DeviceConfig,
    IntakeConfig,
    ModelsConfig,
    OperatorsConfig,
    PrivacyConfig,
    PublishersConfig,
    ThrottleConfig,
    check_buffer,
    check_device,
    check_intake,
)
from outstation.device.config.samples import SamplesConfig
from outstation.device.config.sinks import check_sink
from outstation.device.config.sources import SOURCES, FilesSource
from outstation.device.config.streams import StreamConfig, check_stream, with_media_fields
from outstation.device.config.tasks import TaskConfig, check_task
from outstation.device.config.updates import UpdatesConfig
from outstation.foundation.config import toml_files
from outstation.foundation.config.quantities import Size
from outstation.foundation.config.toml_files import Section
from outstation.foundation.errors import ConfigError
from outstation.integrations.homeassistant import config as homeassistant
from outstation.integrations.homeassistant.config import HomeAssistantConfig
from outstation.integrations.notify.config import TARGETS, NotifyConfig, check_notify
from outstation.protocol.transport.broker_config import MQTT_SCHEMES, UplinkBrokerConfig, check_metered

_STRANGERS = {
    "fleet": "is a section of fleet.toml, which `outstation fleet` reads; -c names a device's outstation.toml",
}


class Config(Section, frozen=True):
    """The whole config. Paths are absolute after `load`."""

    device: DeviceConfig
    broker: UplinkBrokerConfig = msgspec.field(default_factory=UplinkBrokerConfig)
    collector: CollectorConfig = msgspec.field(default_factory=CollectorConfig)
    operators: OperatorsConfig = msgspec.field(default_factory=OperatorsConfig)
    publishers: PublishersConfig = msgspec.field(default_factory=PublishersConfig)
    buffer: BufferConfig = msgspec.field(default_factory=BufferConfig)
    privacy: PrivacyConfig = msgspec.field(default_factory=PrivacyConfig)
    intake: IntakeConfig = msgspec.field(default_factory=IntakeConfig)
    throttle: ThrottleConfig = msgspec.field(default_factory=ThrottleConfig)
    models: ModelsConfig = msgspec.field(default_factory=ModelsConfig)
    updates: UpdatesConfig | None = None
    homeassistant: HomeAssistantConfig | None = None
    notify: NotifyConfig = msgspec.field(default_factory=NotifyConfig)
    samples: SamplesConfig | None = None
    streams: dict[str, StreamConfig] = msgspec.field(default_factory=dict)
    tasks: dict[str, TaskConfig] = msgspec.field(default_factory=dict)

    @property
    def data_dir(self) -> Path:
        return Path(self.device.data_dir)

    @property
    def intake_token_file(self) -> Path:
        return self.data_dir / (self.intake.token_file or "intake.token")


def load(path: Path) -> Config:
    """Load and check a device config. Raises ConfigError."""
    plugins = {"streams.*.source": SOURCES, "notify.targets.*": TARGETS}
    config, file = toml_files.read(path, Config, strangers=_STRANGERS, plugins=plugins), str(path)
    check_device(file, config.device)
    check_sink(file, config.broker)
    check_metered(file, config.broker)
    if config.updates is not None:
        updates.check(file, config.updates)
    if config.homeassistant is not None:
        homeassistant.check(file, config.homeassistant)
        _check_bridge(file, config, config.homeassistant)
    check_notify(file, config.notify)
    if config.samples is not None:
        samples.check(file, config.samples, config.tasks)
    check_intake(file, config.intake)
    check_buffer(file, config.buffer)
    streams = {name: with_media_fields(file, name, stream) for name, stream in config.streams.items()}
    for name, stream in streams.items():
        check_stream(file, name, stream)
    for name, task in config.tasks.items():
        check_task(file, name, task, streams)
    config = _with_absolute_paths(msgspec.structs.replace(config, streams=streams), path.resolve().parent)
    for name, stream in config.streams.items():
        if isinstance(stream.source, FilesSource):
            _check_watched_folder(path, f"streams.{name}.source.folder", Path(stream.source.folder), config.data_dir)
    return config


def digest(config: Config) -> str:
    """Return `sha256:…` of the parsed config, without the broker's password and what only tells others of results."""
    broker = msgspec.structs.replace(config.broker, password=None)
    silent = {"updates": None, "homeassistant": None, "notify": NotifyConfig()}
    # The same device in another folder gives the same results.
    device = msgspec.structs.replace(config.device, data_dir="")
    shown = msgspec.structs.replace(config, broker=broker, device=device, **silent)
    data = msgspec.json.encode(msgspec.to_builtins(shown, enc_hook=_encode_quantity, order="deterministic"))
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _encode_quantity(value: Any) -> Any:
    return int(value) if isinstance(value, Size) else float(value)


def _check_bridge(file: str, config: Config, bridge: HomeAssistantConfig) -> None:
    """Check that a device can publish on its own broker, if no other is named. Raises ConfigError."""
    if bridge.broker is not None or not bridge.enabled:
        return
    key, fix = "homeassistant.broker", "name Home Assistant's broker here"
    if config.broker.scheme not in MQTT_SCHEMES:
        raise ConfigError(file, key, f"is missing, and [broker] is no MQTT broker; {fix}")
    if bridge.verdicts and not homeassistant.is_authenticated(config.broker):
        raise ConfigError(file, "homeassistant.verdicts", homeassistant.NOT_AUTHENTICATED)
    if config.broker.cert_file is not None:
        problem = "is missing: the fleet's broker takes one connection per certificate"
        raise ConfigError(file, key, f"{problem}; {fix}, or let the collector publish ([homeassistant] in fleet.toml)")
    if config.privacy.encrypt:
        problem = "is missing: [privacy] encrypt hides results from the fleet's broker"
        raise ConfigError(file, key, f"{problem}; {fix}, or remove [homeassistant]")


def _check_watched_folder(file: Path, key: str, folder: Path, data_dir: Path) -> None:
    """Check that a stream does not read the daemon's own files as data. Raises ConfigError."""
    for content, path in (("this config", file), ("[device] data_dir", data_dir)):
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            problem = f"{folder} contains {content}, whose files are no data; name a folder that holds data only"
            raise ConfigError(str(file), key, problem)


def _with_absolute_paths(config: Config, base: Path) -> Config:
    broker = config.broker.with_absolute_paths(base)
    streams = {
        name: msgspec.structs.replace(stream, source=stream.source.with_absolute_paths(base))
        for name, stream in config.streams.items()
    }
    tasks = {
        name: msgspec.structs.replace(task, bundle=str(base / task.bundle)) if "/" in task.bundle else task
        for name, task in config.tasks.items()
    }
    intake = config.intake
    if intake.token_file is not None:
        intake = msgspec.structs.replace(intake, token_file=str(base / intake.token_file))
    device = msgspec.structs.replace(config.device, data_dir=str(base / config.device.data_dir))
    fetching = config.updates and updates.with_absolute_paths(config.updates, base)
    bridge = config.homeassistant and homeassistant.with_absolute_paths(config.homeassistant, base)
    return msgspec.structs.replace(
        config,
        device=device,
        broker=broker,
        intake=intake,
        updates=fetching,
        homeassistant=bridge,
        notify=config.notify.with_absolute_paths(base),
        streams=streams,
        tasks=tasks,
    )
