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
    """Name of the device, and its folder.

    ```toml
    [device]
    id = "pi-07"
    fleet = "acme"
    groups = ["roof", "south"]
    ```
    """

    id: str
    """Device id: a-z 0-9 - _ . , 1 to 64 characters; it is a level of every topic."""
    fleet: str
    """Fleet name, same characters."""
    data_dir: str = "/var/lib/outstation"
    """Folder of the store, the intake socket and installed bundles; on a local disk. If it is moved away, the daemon
    stops with exit code 3 and leaves a note `<data_dir>.moved` beside it, or `<data_dir>.moved/note` if that is a
    folder, as under the shipped unit. It starts again when the folder is back or the note is deleted. If the note
    cannot be written, the message says so."""
    groups: Annotated[list[str], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=list)
    """Groups this device belongs to; a group's desired state applies, and the first listed group wins."""


class CollectorConfig(Section, frozen=True):
    """Keys of the collector, and whose confirmation deletes a message.

    ```toml
    [collector]
    delivery = "broker"                 # a device without a fleet
    ```
    """

    key: str = ""
    """The collector's public key; only acknowledgements signed with it count."""
    encryption_key: str = ""
    """The collectors' public X25519 key, for `[privacy] encrypt` and `[samples]`; the fleet's trust document may name a
    newer one."""
    delivery: Literal["collector", "broker"] = "collector"
    """Delete a message once the collector has acknowledged it; `"broker"`: once the broker has."""


class OperatorsConfig(Section, frozen=True):
    """Keys of people by role.

    ```toml
    [operators]
    keys = ["B6pMmUwGkLtISEqevNHqOIXPij3Pb8HgNhgs7UHL5S8"]
    wipe_delay = "24 h"
    ```

    The fleet's trust document replaces `keys`, `deployers`, `reporters` and `[collector] key` (see
    [updates](../guides/updates.md)).
    """

    keys: list[str] = msgspec.field(default_factory=list)
    """Public keys of operators: they may sign all commands, desired state and bundles."""
    deployers: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign desired state, and the commands `rollback` and `report`."""
    reporters: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign the command `report`."""
    wipe_delay: Duration = Duration(3600.0)
    """A `wipe` that one operator's key confirms happens this much later; `"0 s"`: at once."""


class PublishersConfig(Section, frozen=True):
    """Keys that sign bundles.

    ```toml
    [publishers]
    keys = ["iELJoGOcScueykDd42222LBDL-IQOdcDBCZb5PXw2Tw"]
    ```
    """

    keys: list[str] = msgspec.field(default_factory=list)
    """Public keys that may sign bundles, besides the operators' and the built-in one."""


class BufferConfig(Section, frozen=True):
    """Limits of the store.

    ```toml
    [buffer]
    max_size = "8 GiB"
    commit_every = "10 s"               # a third of the flash wear of a 1 Hz sensor
    ```
    """

    max_size: Size = Size(2**30)
    """Limit of the store's size, never exceeded."""
    commit_every: Duration = Duration(1.0)
    """Longest time a producer waits for its acknowledgement; 128 KiB of rows are committed at once."""
    keep_readings: Duration = Duration(24 * 3600.0)
    """Retention of readings after all tasks have consumed them; shorter when space runs out."""
    keep_messages: Duration = Duration(48 * 3600.0)
    """Retention of acknowledged messages, in case the collector is restored from a backup; shorter when space runs
    out."""
    keep_results: Duration = Duration(7 * 86_400.0)
    """Retention of predictions for labels that arrive later."""
    when_full: Literal["evict", "refuse"] = "evict"
    """Delete the least important data and declare it; `"refuse"`: reject new readings."""
    journal: bool = True
    """Acknowledge commits of a few rows from a file of 64 KiB, written in place: a quarter of the flash wear of such
    commits. `false`: the database has each row at once, for a program that reads `outstation.db` itself."""


class PrivacyConfig(Section, frozen=True):
    """Limits of what leaves the device.

    ```toml
    [privacy]
    min_count = 20
    encrypt = true
    ```

    See [concepts/privacy.md](../concepts/privacy.md).

    What `encrypt = true` costs: nobody but the collectors, `outstation fleet watch` and the sender of a command can
    read what this device sends, also what is retained (`state`, `keys`). A sealed message has 58 bytes more inside and
    176 bytes of properties less. Sealing takes 109 µs of an x86 core, signing 44 µs. The journal, `[collector]
    delivery` and resending do not change. Messages stay in the clear in the device's store, and in the collector's
    database.
    """

    min_count: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    """Least number of readings that any number in a message rests on; a bundle can demand more, never less; `1`: no
    limit."""
    values_in_logs: bool = False
    """Name the value of a rejected reading in its reason, and so in journals."""
    encrypt: bool = False
    """Seal every message to the collectors' `[collector] encryption_key`: the broker and its other clients see topic,
    size and time only."""


class ThrottleConfig(Section, frozen=True):
    """Limits at which tasks slow down, then pause, to protect the machine.

    ```toml
    [throttle]
    slow_temperature = 60.0             # in a closed case without a fan
    max_temperature = 70.0
    min_battery = 40.0
    duty_cycle = 0.1
    ```
    """

    max_temperature: Annotated[float, msgspec.Meta(gt=0, le=150)] = 80.0
    """°C above which tasks pause."""
    min_battery: Annotated[float, msgspec.Meta(ge=0, le=95)] = 20.0
    """Battery percentage below which tasks pause while it discharges."""
    slow_temperature: Annotated[float, msgspec.Meta(gt=0, le=150)] = 75.0
    """°C above which tasks slow down; from `max_temperature` on they pause anyway."""
    slow_battery: Annotated[float, msgspec.Meta(ge=0, le=95)] = 30.0
    """Battery percentage below which tasks slow down while it discharges."""
    duty_cycle: Annotated[float, msgspec.Meta(ge=0.01, le=1)] = 0.25
    """Share of the time in which slowed tasks run: 0.25 rests three seconds after each second of work."""
    throttled: Literal["wait", "ignore"] = "wait"
    """Pause tasks while the firmware throttles the processor; or `"ignore"`."""
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 5
    """Niceness of the inference thread relative to intake and uplink, 0 to 19; the installed service has `Nice=5` and
    cannot change it."""


class ModelsConfig(Section, frozen=True):
    """Limits of model processes.

    ```toml
    [models]
    confinement = "required"
    memory = "200 MiB"
    ```

    A task's model runs in a process of its own, which tasks of the same bundle share. That process computes and
    answers; it has no files, network, keys or environment.
    """

    confinement: Literal["auto", "required", "off"] = "auto"
    """Confine model processes where the machine can (Linux seccomp and libseccomp2); `"required"`: run no model and
    decode no file elsewhere; `"off"`: run models in the daemon's own process."""
    memory: Size | None = None
    """Memory of a model process beyond what Python and the runtime take, half of the machine's unless given; a bundle's
    own limit counts if it is lower."""


class IntakeConfig(Section, frozen=True):
    """Further ways for producers to reach the intake.

    ```toml
    [intake]
    tcp = "127.0.0.1:7071"              # for a container without access to the socket
    ```
    """

    tcp: str | None = None
    """`"127.0.0.1:7071"`: also accept the socket protocol on this loopback address, from producers with the token."""
    token_file: str | None = None
    """File with the token of TCP producers, at least 32 characters, readable by its owner only;
    `<data_dir>/intake.token` unless given; the first start makes it."""


class FieldConfig(Section, frozen=True):
    """Field of a row.

    ```toml
    [streams.room]
    fields = [
      { name = "temperature", unit = "°C", min = -20, max = 60, max_step = 5 },
      { name = "state", type = "category", optional = true, max_categories = 20 },
    ]
    ```
    """

    name: str
    """Field name."""
    unit: str = ""
    """Unit, shown in alerts; lets drift detection recognise a changed unit."""
    min: float | None = None
    """Rows with a smaller value are rejected."""
    max: float | None = None
    """Rows with a larger value are rejected."""
    max_step: float | None = None
    """Largest change from one row to the next (step test); a row that jumps is rejected."""
    type: Literal["f32", "f64", "i64", "category"] = "f32"
    """Type of its values; a `category` is text."""
    optional: bool = False
    """The value may be missing."""
    max_categories: Annotated[int, msgspec.Meta(ge=2, le=65_535)] = 1000
    """Categories of a `category` field; further texts are stored as `(other)` and counted."""


class StreamConfig(Section, frozen=True):
    """Stream of rows: its fields and its source.

    ```toml
    [streams.room]
    fields = [
      { name = "temperature", unit = "°C", min = -20, max = 60, max_step = 5 },
      { name = "state", type = "category", optional = true },
    ]
    source = { kind = "mqtt", topic = "zigbee2mqtt/room", paths = { state = "$.occupancy" } }
    ```
    """

    fields: Annotated[list[FieldConfig], msgspec.Meta(min_length=1, max_length=MAX_FIELDS)] = msgspec.field(
        default_factory=list
    )
    """Fields of a row, in order, at least one; image and sound sources define their own."""
    source: SourceConfig = msgspec.field(default_factory=SocketSource)
    """Where rows come from: a table whose `kind` chooses one of the sources below; a socket unless given."""
    privacy: StreamPrivacy = msgspec.field(default_factory=StreamPrivacy)
    """What leaves of its fields, see [streams.NAME.privacy](#streamsnameprivacy)."""
    duplicates: Literal["reject", "accept"] = "reject"
    """What happens to [rows and files that come again](intake.md#rows-that-come-again-late-or-jump); `"accept"` for
    sources that repeat rows on purpose."""
    allowed_lateness: Duration = Duration(60.0)
    """Rows older than the stream's latest row by more than this are rejected; rows of files and replays may be
    older."""

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
    """Limit of the score below which predictions are sent.

    ```toml
    [tasks.exercise]
    stream = "watch"
    bundle = "exercise"
    publish = { below_score = 0.6 }
    ```
    """

    below_score: float
    """Predictions with a lower score are sent."""


class BinnedField(Section, frozen=True):
    """Numeric field in bins.

    ```toml
    [tasks.exercise]
    stream = "watch"
    bundle = "exercise"
    slices = [{ field = "ax", edges = [-1, 0, 1] }]
    ```
    """

    field: str
    """Name of the field."""
    edges: Annotated[list[float], msgspec.Meta(min_length=1, max_length=15)]
    """Limits between bins: below the first one, between them, and from the last one on."""


class JoinedStreamConfig(Section, frozen=True):
    """Stream that a further input of a task's bundle is joined from, by time.

    ```toml
    [tasks.exercise.inputs.motion]
    stream = "watch"
    wait = "30 s"
    ```
    """

    stream: str
    """Stream with the input's fields."""
    wait: Duration = Duration(10.0)
    """How long a window waits for the stream's next row: only then is it certain that no earlier row still comes. Rows
    that come later are left out."""


class TaskConfig(Section, frozen=True):
    """Task: a bundle that runs over a stream.

    ```toml
    [tasks.exercise]
    stream = "watch"
    bundle = "exercise"
    schedule = "when 500 rows"
    deadline = "2 s"
    publish = "changes"
    slices = [{ field = "ax", edges = [-1, 0, 1] }]
    ```
    """

    stream: str
    """Stream to consume; each row is used once."""
    bundle: str
    """Name in the bundle store, or a path."""
    schedule: str = "every 60 s"
    """When batches run: an interval, a cron expression, or `"when 500 rows"`, several joined by `or`; each with time
    zone, dates and jitter as the guide "schedules" explains. Where so many rows come more than ten times a second, a
    run waits for four drift windows, or 100 ms after the last run."""
    deadline: Duration | None = None
    """Longest duration of a batch: a late batch is counted, and the next ones are smaller."""
    publish: Literal["all", "changes", "summary"] | PublishBelow = "all"
    """Predictions to send: all, only `"changes"`, none (`"summary"`), or those with a score below a limit: `{
    below_score = 0.6 }`."""
    learn_windows: Annotated[int, msgspec.Meta(ge=20, le=10_000)] = 40
    """Drift windows from which the site's reference is learned."""
    learn_duration: Duration = Duration(0.0)
    """Least time those windows must span."""
    learn_extension: Annotated[float, msgspec.Meta(ge=1, le=100)] = 4.0
    """Up to how many times as long learning goes on where windows are so much like their neighbours, for weather or
    long modes, that they tell too little of what is usual; 1: not at all."""
    on_deviation: Literal["continue", "hold"] = "continue"
    """A learned reference that deviates is used, with an alert; `"hold"`: drift is not tested until somebody accepts
    it."""
    seasonality: Literal["auto", "hour", "week", "none"] | None = None
    """Daily cycle of the site's reference: `"hour"` follows the hour, `"week"` rest days too, `"none"` neither,
    `"auto"` what the data support; without it the bundle decides."""
    class_field: str | None = None
    """Category field that provides classes for a model without them; `""` for none."""
    slices: Annotated[list[str | BinnedField], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=list)
    """Category fields, or binned ones `{ field = "ax", edges = [0, 1] }`, for metrics by slice."""
    inputs: Annotated[dict[str, JoinedStreamConfig], msgspec.Meta(max_length=8)] = msgspec.field(default_factory=dict)
    """Streams of the bundle's further inputs, see [tasks.NAME.inputs.NAME](#tasksnameinputsname); without an entry the
    task's own stream."""
    alerts: list[AlertRuleConfig] = msgspec.field(default_factory=list)
    """Rules for alerts on what the model says, see [tasks.NAME.alerts](#tasksnamealerts)."""


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
        for joined, source in task.inputs.items():
            key = f"tasks.{name}.inputs.{joined}"
            if source.stream not in config.streams:
                hint = did_you_mean(source.stream, config.streams)
                raise ConfigError(file, f"{key}.stream", f"unknown stream {source.stream!r}{hint}")
            if not 0.0 <= source.wait <= _MAX_RETENTION_S:
                raise ConfigError(file, f"{key}.wait", "must be between 0 s and 3650 d")
            limits, own = config.streams[source.stream].privacy.limits, config.streams[task.stream].privacy.limits
            if limits not in (own, StreamPrivacy().limits):
                # Messages of a task follow the rules of its own stream.
                raise ConfigError(
                    file,
                    f"{key}.stream",
                    f"{source.stream!r} limits what leaves the device, and the task's stream {task.stream!r} does not "
                    f"alike; give [streams.{task.stream}.privacy] the same messages, min_count and min_results",
                )
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
    # The same device in another folder gives the same results.
    device = msgspec.structs.replace(config.device, data_dir="")
    shown = msgspec.structs.replace(config, broker=broker, device=device, **silent)
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
