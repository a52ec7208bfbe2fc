"""Sources of a stream's rows: one section for each `kind`, with its own checks.

The module of the same kind in `agent/outstation/device/intake/sources/` reads it; other packages can add kinds.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from outstation.foundation.config.plugins import PluginGroup
from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.foundation.media import ImageFormat, MediaFormat, SoundFormat
from outstation.protocol.transport.broker_config import BrokerConfig, check_broker

_MIN_INTERVAL_S = 0.01


class SourceSection(Section, frozen=True, tag_field="kind"):
    """Base of all sources."""

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def media_format(self) -> MediaFormat | None:
        """Format of images or sounds that the rows are made of, which then determines the stream's fields."""
        return None

    @property
    def reads_recordings(self) -> bool:
        """True if its rows may be older than the stream's latest one: those of one file come after those of another."""
        return False

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        """Raise ConfigError if a value is wrong; `fields` are those of the stream, empty for images and sounds."""

    def with_absolute_paths(self, base: Path) -> Self:
        """Return the section with its relative paths resolved from `base`."""
        return self


class SocketSource(SourceSection, frozen=True, tag="socket"):
    """Producers that connect to the intake."""


class FilesSource(SourceSection, frozen=True, tag="files"):
    """Watched folder of tables with the stream's fields, or of images or sounds, which determine the fields.

    ```toml
    [streams.meter]
    fields = [{ name = "power", unit = "W" }]
    source = { kind = "files", folder = "/srv/meter", poll_interval = "1 min" }
    ```

    Tables are CSV, JSON Lines or Parquet. [Images and sounds](bundles.md#images-and-sounds-on-a-device) have a page.
    """

    folder: str
    """Folder to watch; it contains neither this config nor `data_dir`."""
    poll_interval: Duration = Duration(2.0)
    """Interval of looking for new files."""
    image: ImageFormat | None = None
    """Conversion of images to rows."""
    sound: SoundFormat | None = None
    """Conversion of sounds to rows."""

    @property
    def media_format(self) -> MediaFormat | None:
        return self.image or self.sound

    @property
    def reads_recordings(self) -> bool:
        return True

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        _check_poll_interval(file, key, self.poll_interval)
        if self.image is not None and self.sound is not None:
            raise ConfigError(file, key, "has both image and sound; remove one")

    def with_absolute_paths(self, base: Path) -> Self:
        return msgspec.structs.replace(self, folder=str(base / self.folder))


class HostSource(SourceSection, frozen=True, tag="host"):
    """Metrics of this machine.

    ```toml
    [streams.host]
    fields = [{ name = "temperature" }, { name = "load1" }]
    source = { kind = "host", poll_interval = "1 min" }
    ```

    Fields by name: `temperature`, `cpu`, `load1`, `memory`, `disk`, `swap`, `uptime`.
    """

    poll_interval: Duration = Duration(10.0)
    """Time between rows."""

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        _check_poll_interval(file, key, self.poll_interval)


class ReplayFault(Section, frozen=True):
    """Fault that a replay injects into its recordings.

    ```toml
    [streams.watch]
    fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }]
    source = { kind = "replay", file = "exercise.npz", faults = [
      { kind = "gain", fields = ["ax"], from_row = 20000, amount = 1.5 },
    ] }
    ```
    """

    kind: Literal["gain", "offset", "stuck", "missing", "spikes", "saturate", "scale", "swap", "noise", "quantize"]
    """Kind of the fault; `swap` exchanges two fields."""
    fields: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Fields that it changes."""
    from_row: Annotated[int, msgspec.Meta(ge=1)]
    """First row that it changes."""
    amount: float | None = None
    """Factor (gain, scale), addend (offset), limit of magnitudes (saturate), standard deviation (noise), step size
    (quantize), or height of spikes, one in a hundred rows; each of these kinds needs one. Value (stuck), else 0."""

    def check(self, file: str, key: str) -> None:
        """Refuse a fault that changes nothing. Raises ConfigError."""
        if self.kind == "swap" and len(set(self.fields)) != 2:
            raise ConfigError(file, f"{key}.fields", f"swap needs two fields, not {len(set(self.fields))}")
        if self.kind in ("missing", "stuck", "swap"):
            return
        if self.kind in ("quantize", "saturate", "noise") and not (self.amount and self.amount > 0):
            raise ConfigError(file, f"{key}.amount", f"{self.kind} needs an amount above 0")
        if self.amount is None or self.amount == (1 if self.kind in ("gain", "scale") else 0):
            amount = "without amount" if self.amount is None else f"by {self.amount:g}"
            raise ConfigError(file, f"{key}.amount", f"{self.kind} {amount} changes nothing; give an amount")


class RecordingFilter(Section, frozen=True):
    """Scene: recordings that a replay plays from a row on.

    ```toml
    [streams.watch]
    fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }]
    source = { kind = "replay", file = "exercise.npz", scenes = [
      { column = "placement", value = "wrist" },
      { column = "placement", value = "ankle", from_row = 20000 },
    ] }
    ```
    """

    column: str
    """Column of the recordings."""
    value: str
    """Recordings with this value in the column are played."""
    from_row: Annotated[int, msgspec.Meta(ge=1)] = 1
    """First row of the scene; the next scene ends it."""


class ReplaySource(SourceSection, frozen=True, tag="replay"):
    """Replay of recordings.

    ```toml
    [streams.watch]
    fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }]
    source = { kind = "replay", file = "exercise.npz", subject = 3, speed = 10 }
    ```

    The file is `.npz`, see the [demo](../start/demo.md#replay).
    """

    file: str
    """Recordings."""
    subject: int | None = None
    """Replay this subject only."""
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Replay speed, as a multiple of the recorded one."""
    seed: int = 0
    """Seed of the order of recordings."""
    rows: int | None = None
    """Number of rows to replay."""
    faults: list[ReplayFault] = msgspec.field(default_factory=list)
    """Injected faults, each from a given row on."""
    scenes: list[RecordingFilter] = msgspec.field(default_factory=list)
    """Recordings to replay, in order of `from_row`, for recordings without times."""
    skip: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Rows to skip, for recordings with times."""

    @property
    def reads_recordings(self) -> bool:
        return True

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        begins = [scene.from_row for scene in self.scenes]
        if begins and (begins[0] != 1 or sorted(set(begins)) != begins):
            raise ConfigError(file, f"{key}.scenes", "from_row must be 1 for the first scene, and ascend")
        for i, fault in enumerate(self.faults):
            fault.check(file, f"{key}.faults[{i}]")
            for field_name in fault.fields:
                if field_name not in fields:
                    hint = did_you_mean(field_name, fields)
                    raise ConfigError(file, f"{key}.faults[{i}].fields", f"no field {field_name!r}{hint}")

    def with_absolute_paths(self, base: Path) -> Self:
        return msgspec.structs.replace(self, file=str(base / self.file))


class MqttSource(SourceSection, frozen=True, tag="mqtt"):
    """Subscription at a local broker.

    ```toml
    [streams.room]
    fields = [{ name = "temperature" }, { name = "humidity" }]
    source = { kind = "mqtt", topic = "zigbee2mqtt/room", paths = { humidity = "$.data.humidity" } }
    ```

    Each message holds JSON: one object or value is one row, an array of objects is one row each. The device confirms a
    message (QoS 1) after its rows are on disk; until then, and while the device is away, the broker keeps it. Messages
    without a row are counted, rejected and confirmed. A power cut between commit and confirmation can deliver a message
    twice: rows with their own times are then rejected as duplicates.

    A broker limits unconfirmed messages, Mosquitto to 20 (`max_inflight_messages`). At its limit the rows are committed
    at once, before `commit_every` has passed: 50 messages per second are 2.5 commits. A higher limit saves flash.
    """

    topic: str
    """Topic filter: `+` matches one level, `#` all that follow."""
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    """Keys as in [broker](#broker)."""
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    """Field → singular JSONPath (RFC 9535) of its value: `$.data.temp`, `$.values[0]`, `$` for a message that is a
    number; or a topic level, `topic[1]`. Other fields are members of the same name."""
    t: str | None = None
    """JSONPath of the time in epoch seconds; without it the arrival time is used."""
    session_expiry: Duration = Duration(7 * 86_400.0)
    """Time for which the broker keeps messages while the device is away."""

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        check_broker(file, self.broker, f"{key}.broker")
        levels = self.topic.split("/")
        misplaced = any(("#" in level or "+" in level) and level not in ("#", "+") for level in levels)
        if not self.topic or misplaced or "#" in levels[:-1]:
            problem = f"{self.topic!r} is no topic filter; + stands for one whole level, # for all levels at the end"
            raise ConfigError(file, f"{key}.topic", problem)

    def with_absolute_paths(self, base: Path) -> Self:
        return msgspec.structs.replace(self, broker=self.broker.with_absolute_paths(base))


class ExecSource(SourceSection, frozen=True, tag="exec"):
    """Program that prints rows.

    ```toml
    [streams.air]
    fields = [{ name = "pressure", unit = "hPa" }]
    source = { kind = "exec", command = ["python3", "bme280.py"] }
    ```

    Each line that it prints is a row: a JSON object, `{"temperature": 21.5}`, or CSV whose first line names the
    columns. `t` is optional, in epoch seconds or RFC 3339. [Programs for sensors](../guides/sensor-programs.md) has
    scripts for I²C, 1-Wire, Modbus and serial ports.

    A program that fails is started again after 1 s, then ever later, up to 60 s. `outstation status` counts restarts,
    silences and floods. What it writes to stderr goes to the journal: 20 lines a minute, 300 characters each. A line
    has at most 64 KiB. It ends with the daemon, together with the processes that it started; what it printed until then
    is stored. Lines for which there is no time are counted and logged. It cannot gain privilege: `sudo` does not work
    in it.
    """

    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    """Program and arguments, `["python3", "bme280.py"]`; no shell; it runs in the folder of this config."""
    format: Literal["json", "csv"] = "json"
    """Format of a line."""
    every: Duration | None = None
    """For a program that prints and ends: run it at this interval. Without it the program keeps running, and an end is
    a failure."""
    timeout: Duration = Duration(300.0)
    """Longest silence; then the program is killed and started again. `"0 s"`: no limit."""
    max_rate: Annotated[float, msgspec.Meta(gt=0, le=100_000)] = 1000.0
    """Lines a second; a program that prints more is held back at its pipe, and no line is lost meanwhile."""

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        if not self.command[0] or any("\0" in argument for argument in self.command):
            raise ConfigError(file, f"{key}.command", 'names no program; write it as ["python3", "sensor.py"]')
        if self.timeout < 0:
            raise ConfigError(file, f"{key}.timeout", 'must not be negative; "0 s" waits for ever')
        if self.every is not None and self.every < 1:
            raise ConfigError(file, f"{key}.every", "must be at least 1 s; a program that goes on needs no `every`")

    def with_absolute_paths(self, base: Path) -> Self:
        if "/" not in self.command[0]:
            return self
        return msgspec.structs.replace(self, command=[str(base / self.command[0]), *self.command[1:]])


# Producers fill a stream of kind "socket".
_MODULES = {kind: f"outstation.device.intake.sources.{kind}" for kind in ("exec", "files", "host", "mqtt", "replay")}
SOURCES = PluginGroup("outstation.sources", {**_MODULES, "socket": None}, SourceSection)
SourceConfig = SocketSource | FilesSource | HostSource | ReplaySource | MqttSource | ExecSource


def _check_poll_interval(file: str, key: str, interval: Duration) -> None:
    if interval < _MIN_INTERVAL_S:
        raise ConfigError(file, f"{key}.poll_interval", f"must be at least {_MIN_INTERVAL_S * 1000:g} ms")
