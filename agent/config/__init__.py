"""Device configuration: frozen structs from TOML. Errors name the file, the key and the fix."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from agent import toml_files
from agent.config import alert_rules, homeassistant, metered
from agent.config import samples as config_samples
from agent.config import updates as config_updates
from agent.config.alert_rules import AlertRuleConfig as AlertRuleConfig
from agent.config.broker import MQTT_SCHEMES
from agent.config.broker import BrokerConfig as BrokerConfig
from agent.config.broker import check_broker as check_broker
from agent.config.broker import parse_loopback as parse_loopback
from agent.config.homeassistant import HomeAssistantConfig as HomeAssistantConfig
from agent.config.metered import UplinkBrokerConfig as UplinkBrokerConfig
from agent.config.notify import NotifyConfig, check_notify
from agent.config.samples import SamplesConfig as SamplesConfig
from agent.config.sources import ReplaySource, SocketSource, SourceConfig
from agent.config.stream_privacy import StreamPrivacy
from agent.config.updates import UpdatesConfig as UpdatesConfig
from agent.errors import ConfigError
from agent.media import MediaFormat
from agent.names import is_name
from agent.quantities import Duration as Duration
from agent.quantities import Size as Size
from agent.quantities import decode_quantity
from agent.quantities import parse_duration as parse_duration
from agent.quantities import parse_size as parse_size
from agent.toml_files import Section as Section
from agent.toml_files import did_you_mean

_MIN_STORE_BYTES = 2**20
# Limit for fields listed by hand; image and sound sources define their own.
MAX_FIELDS = 256
_MAX_RETENTION_S = 3650 * 86_400.0


class DeviceConfig(Section, frozen=True):
    id: str
    fleet: str
    data_dir: str = "/var/lib/outstation"
    # A group's desired state applies to this device; the first listed group wins.
    groups: Annotated[list[str], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=list)


class CollectorConfig(Section, frozen=True):
    key: str = ""
    # What messages are sealed to with [privacy] encrypt, until a trust document names another one.
    encryption_key: str = ""
    delivery: Literal["collector", "broker"] = "collector"


class OperatorsConfig(Section, frozen=True):
    """Keys by role, until a trust document replaces them (see `agent.wire.trust`)."""

    keys: list[str] = msgspec.field(default_factory=list)
    deployers: list[str] = msgspec.field(default_factory=list)
    reporters: list[str] = msgspec.field(default_factory=list)
    # A wipe that one operator's key confirms happens this much later, so that others can cancel it.
    wipe_delay: Duration = Duration(3600.0)


class PublishersConfig(Section, frozen=True):
    keys: list[str] = msgspec.field(default_factory=list)


class BufferConfig(Section, frozen=True):
    max_size: Size = Size(2**30)
    commit_every: Duration = Duration(1.0)
    keep_readings: Duration = Duration(24 * 3600.0)
    keep_messages: Duration = Duration(48 * 3600.0)
    keep_results: Duration = Duration(7 * 86_400.0)
    when_full: Literal["evict", "refuse"] = "evict"


class PrivacyConfig(Section, frozen=True):
    """Limits of what leaves the device. A bundle may demand a larger `min_count`, never a smaller one."""

    min_count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    values_in_logs: bool = False
    # Seal messages to the collector's encryption key: the broker and its other clients cannot read them.
    encrypt: bool = False


class ThrottleConfig(Section, frozen=True):
    """When tasks pause to protect the machine: degrees Celsius, battery percentage while discharging."""

    max_temperature: Annotated[float, msgspec.Meta(gt=0, le=150)] = 80.0
    min_battery: Annotated[float, msgspec.Meta(ge=0, le=95)] = 20.0
    throttled: Literal["wait", "ignore"] = "wait"
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 5


class ModelsConfig(Section, frozen=True):
    """Limits of model processes. `memory` is added to what Python and the runtime take; None means half the machine's.

    `confinement`: "auto" confines where the machine can; "required" runs no model and decodes no file elsewhere; "off"
    runs models in the daemon's own process.
    """

    confinement: Literal["auto", "required", "off"] = "auto"
    memory: Size | None = None


class IntakeConfig(Section, frozen=True):
    tcp: str | None = None
    # What producers on TCP must know; made on the first start.
    token_file: str | None = None


class FieldConfig(Section, frozen=True):
    name: str
    unit: str = ""
    min: float | None = None
    max: float | None = None
    # Largest change from one row to the next.
    max_step: float | None = None
    type: Literal["f32", "f64", "i64", "category"] = "f32"
    optional: bool = False
    # Categories of a field of that type; further ones count as `(other)`.
    max_categories: Annotated[int, msgspec.Meta(ge=2, le=65_535)] = 1000


class StreamConfig(Section, frozen=True):
    """A stream. `load` fills the fields of image and sound sources."""

    fields: Annotated[list[FieldConfig], msgspec.Meta(min_length=1, max_length=MAX_FIELDS)] = msgspec.field(
        default_factory=list
    )
    source: SourceConfig = msgspec.field(default_factory=SocketSource)
    privacy: StreamPrivacy = msgspec.field(default_factory=StreamPrivacy)
    duplicates: Literal["reject", "accept"] = "reject"
    # Rows that are older than the stream's latest one by more than this are rejected, unless they come from files.
    allowed_lateness: Duration = Duration(60.0)

    @property
    def media_format(self) -> MediaFormat | None:
        """Format of the images or sounds that become rows; None for other sources."""
        return self.source.media_format

    @property
    def has_protected_fields(self) -> bool:
        """True if the values of a field may not leave as they are; then the journal names none, either."""
        return bool(self.privacy.protected_fields([field.name for field in self.fields]))

    @property
    def rejects_duplicates(self) -> bool:
        """True if a row with the time and values of an earlier one is rejected."""
        # The rows of an image share a time. A replay repeats no row, but its recordings may hold equal ones.
        return self.duplicates == "reject" and self.media_format is None and not isinstance(self.source, ReplaySource)


class PublishBelow(Section, frozen=True):
    below_score: float


class BinnedField(Section, frozen=True):
    """A numeric field in bins: below the first of `edges`, between them, and from the last one on."""

    field: str
    edges: Annotated[list[float], msgspec.Meta(min_length=1, max_length=15)]


class TaskConfig(Section, frozen=True):
    stream: str
    bundle: str
    schedule: str = "every 60 s"
    # Longest duration of a batch. A late batch is committed and counted, and the next ones are smaller.
    deadline: Duration | None = None
    publish: Literal["all", "changes", "summary"] | PublishBelow = "all"
    learn_windows: Annotated[int, msgspec.Meta(ge=20, le=10_000)] = 40
    learn_duration: Duration = Duration(0.0)
    learn_extension: Annotated[float, msgspec.Meta(ge=1, le=100)] = 4.0
    on_deviation: Literal["continue", "hold"] = "continue"  # with a learned reference that deviates
    seasonality: Literal["auto", "hour", "week", "none"] | None = None
    class_field: str | None = None  # category field with the classes of a model that has none; "" for none
    slices: Annotated[list[str | BinnedField], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=list)
    alerts: list[AlertRuleConfig] = msgspec.field(default_factory=list)


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


_STRANGERS = {
    "fleet": "is a section of fleet.toml, which `outstation fleet` reads; -c names a device's outstation.toml",
}
C = TypeVar("C", bound=Section)


def find(explicit: str | None) -> Path:
    """Return the config file: `explicit`, `$OUTSTATION_CONFIG`, `./outstation.toml`, then `/etc/outstation/`."""
    if explicit or os.environ.get("OUTSTATION_CONFIG"):
        return Path(explicit or os.environ["OUTSTATION_CONFIG"])
    here = Path("outstation.toml")
    return here if here.exists() else Path("/etc/outstation/outstation.toml")


def load(path: Path, schemes: Collection[str] = MQTT_SCHEMES) -> Config:
    """Load and check a device config; `[broker] url` has one of the `schemes`. Raises ConfigError."""
    config = toml_files.read(path, Config, decode_quantity, strangers=_STRANGERS)
    file = str(path)
    check_name(file, "device.id", config.device.id)
    check_name(file, "device.fleet", config.device.fleet)
    for group in config.device.groups:
        check_name(file, "device.groups", group)
    check_broker(file, config.broker, schemes=schemes)
    metered.check(file, config.broker)
    if config.updates is not None:
        config_updates.check(file, config.updates)
    if config.homeassistant is not None:
        homeassistant.check(file, config.homeassistant)
        _check_bridge(file, config, config.homeassistant)
    check_notify(file, config.notify)
    if config.samples is not None:
        config_samples.check(file, config.samples, config.tasks)
    if config.intake.tcp is not None:
        try:
            parse_loopback(config.intake.tcp)
        except ValueError as problem:
            raise ConfigError(file, "intake.tcp", str(problem)) from None
    if config.buffer.max_size < _MIN_STORE_BYTES:
        raise ConfigError(file, "buffer.max_size", f"{config.buffer.max_size} bytes are too few; use at least 1 MiB")
    for key in ("keep_readings", "keep_messages", "keep_results"):
        if not 0.0 <= getattr(config.buffer, key) <= _MAX_RETENTION_S:
            raise ConfigError(file, f"buffer.{key}", "must be between 0 s and 3650 d")
    config = msgspec.structs.replace(
        config, streams={name: _with_media_fields(file, name, stream) for name, stream in config.streams.items()}
    )
    for name, stream in config.streams.items():
        _check_stream(file, name, stream)
    for name, task in config.tasks.items():
        check_name(file, f"tasks.{name}", name)
        if task.stream not in config.streams:
            hint = did_you_mean(task.stream, config.streams)
            raise ConfigError(file, f"tasks.{name}.stream", f"unknown stream {task.stream!r}{hint}")
        if task.deadline is not None and task.deadline <= 0:
            raise ConfigError(file, f"tasks.{name}.deadline", "must be positive; omit it for no deadline")
        _check_slices(file, name, task, config.streams[task.stream])
        alert_rules.check(file, name, task.alerts)
        if task.class_field:
            check_class_field(file, f"tasks.{name}.class_field", task.class_field, config.streams[task.stream])
    return _with_absolute_paths(config, path.resolve().parent)


def read(path: Path, section: type[C], strangers: dict[str, str] | None = None) -> C:
    """Read a TOML file as `section`; see `toml_files.read`. Raises ConfigError."""
    return toml_files.read(path, section, decode_quantity, strangers=strangers)


def digest(config: Config) -> str:
    """Return `sha256:…` of the parsed config, without the broker's password and what only tells others of results."""
    broker = msgspec.structs.replace(config.broker, password=None)
    silent = {"updates": None, "homeassistant": None, "notify": NotifyConfig()}
    shown = msgspec.structs.replace(config, broker=broker, **silent)
    data = msgspec.json.encode(msgspec.to_builtins(shown, enc_hook=_encode_quantity, order="deterministic"))
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_name(file: str, key: str, name: str) -> None:
    """Check that `name` is valid as a topic level. Raises ConfigError."""
    if not is_name(name):
        raise ConfigError(file, key, f"{name!r} must be 1-64 of a-z 0-9 . _ - and start with a letter or digit")


def _with_media_fields(file: str, name: str, stream: StreamConfig) -> StreamConfig:
    """Return the stream with the fields of its image or sound source. Raises ConfigError."""
    key = f"streams.{name}"
    if stream.media_format is None:
        if not stream.fields:
            raise ConfigError(file, f"{key}.fields", "this key is required; add it")
        return stream
    if stream.fields:
        raise ConfigError(file, f"{key}.fields", "are defined by the source's image or sound; remove them")
    return msgspec.structs.replace(stream, fields=[FieldConfig(name=column) for column in stream.media_format.columns])


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


def _check_stream(file: str, name: str, stream: StreamConfig) -> None:
    check_name(file, f"streams.{name}", name)
    key = f"streams.{name}.fields"
    seen: set[str] = set()
    for column in stream.fields:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]{0,63}", column.name) or column.name in ("t", "stream", "columns"):
            raise ConfigError(
                file, key, f"{column.name!r} is not a valid field name: letters, digits, _ and . only; t is the time"
            )
        if column.name in seen:
            raise ConfigError(file, key, f"duplicate field {column.name!r}; remove one")
        seen.add(column.name)
        if column.min is not None and column.max is not None and column.min > column.max:
            raise ConfigError(file, key, f"field {column.name!r}: min {column.min:g} is above max {column.max:g}")
        if column.max_step is not None and not 0 < column.max_step < math.inf:
            raise ConfigError(file, key, f"field {column.name!r}: max_step must be above 0; omit it for no limit")
        if column.type == "category" and column.max_step is not None:
            raise ConfigError(file, key, f"field {column.name!r}: a category has no max_step; remove it")
        if not all(math.isfinite(limit) for limit in (column.min, column.max) if limit is not None):
            raise ConfigError(file, key, f"field {column.name!r}: min and max must be finite; omit an unused limit")
        if column.type == "category" and (column.min is not None or column.max is not None):
            raise ConfigError(file, key, f"field {column.name!r}: a category has no min and max; remove them")
        if column.optional and column.type == "i64":
            raise ConfigError(file, key, f"field {column.name!r}: type i64 cannot be optional; use f64 or f32")
    stream.source.check(file, f"streams.{name}.source", seen)
    stream.privacy.check(file, f"streams.{name}.privacy", {column.name: column.type for column in stream.fields})


def check_class_field(file: str, key: str, class_field: str, stream: StreamConfig) -> None:
    """Check that `class_field` is a category field of `stream`. Raises ConfigError."""
    known = {f.name for f in stream.fields if f.type == "category"}
    if class_field in known:
        return
    is_number = any(f.name == class_field for f in stream.fields)
    problem = f"{class_field!r} is a number" if is_number else f"the stream has no field {class_field!r}"
    raise ConfigError(file, key, f"{problem}: classes need a category field{did_you_mean(class_field, known)}")


def _check_slices(file: str, name: str, task: TaskConfig, stream: StreamConfig) -> None:
    key, kinds, seen = f"tasks.{name}.slices", {f.name: f.type for f in stream.fields}, set()
    for item in task.slices:
        field = item if isinstance(item, str) else item.field
        if field not in kinds:
            raise ConfigError(file, key, f"stream {task.stream!r} has no field {field!r}{did_you_mean(field, kinds)}")
        if field in seen:
            raise ConfigError(file, key, f"duplicate field {field!r}; remove one")
        seen.add(field)
        if isinstance(item, str) and kinds[field] != "category":
            raise ConfigError(file, key, f"{field!r} is a number; give bins: {{ field = {field!r}, edges = [0.0] }}")
        if not isinstance(item, str):
            if kinds[field] == "category":
                raise ConfigError(file, key, f"{field!r} is a category and takes no edges; write {field!r} alone")
            if not all(math.isfinite(edge) for edge in item.edges) or item.edges != sorted(set(item.edges)):
                raise ConfigError(file, key, f"edges of {field!r} must be finite and ascend")


def _encode_quantity(value: Any) -> Any:
    return int(value) if isinstance(value, Size) else float(value)


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
    updates = config.updates and config_updates.with_absolute_paths(config.updates, base)
    bridge = config.homeassistant and homeassistant.with_absolute_paths(config.homeassistant, base)
    return msgspec.structs.replace(
        config,
        device=device,
        broker=broker,
        intake=intake,
        updates=updates,
        homeassistant=bridge,
        notify=config.notify.with_absolute_paths(base),
        streams=streams,
        tasks=tasks,
    )
