"""Sources of a stream's rows: one section for each `kind`, with its own checks.

The module of the same kind in `agent/device/intake/sources/` reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, Self

import msgspec

from agent.config.broker import BrokerConfig, check_broker
from agent.errors import ConfigError
from agent.media import ImageFormat, MediaFormat, SoundFormat
from agent.quantities import Duration
from agent.toml_files import Section, did_you_mean

_MIN_INTERVAL_S = 0.01


class SourceSection(Section, frozen=True):
    """Base of all sources."""

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


class SocketSource(SourceSection, frozen=True, tag_field="kind", tag="socket"):
    """Producers that connect to the intake."""


class FilesSource(SourceSection, frozen=True, tag_field="kind", tag="files"):
    """Watched folder of tables with the stream's fields, or of images or sounds, which determine the fields."""

    folder: str
    poll_interval: Duration = Duration(2.0)
    image: ImageFormat | None = None
    sound: SoundFormat | None = None

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


class HostSource(SourceSection, frozen=True, tag_field="kind", tag="host"):
    """Metrics of this machine."""

    poll_interval: Duration = Duration(10.0)

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        _check_poll_interval(file, key, self.poll_interval)


class ReplayFault(Section, frozen=True):
    """Fault that a replay injects into its recordings from row `from_row` on.

    `amount` is a factor (gain, scale), an addend (offset), the value (stuck), the limit of magnitudes (saturate), the
    standard deviation (noise), the step size (quantize), or the height of spikes, one in a hundred rows. swap exchanges
    two fields.
    """

    kind: Literal["gain", "offset", "stuck", "missing", "spikes", "saturate", "scale", "swap", "noise", "quantize"]
    fields: Annotated[list[str], msgspec.Meta(min_length=1)]
    from_row: Annotated[int, msgspec.Meta(ge=1)]
    amount: float = 0.0


class RecordingFilter(Section, frozen=True):
    """Scene: from row `from_row` on, a replay plays recordings whose `column` is `value`."""

    column: str
    value: str
    from_row: Annotated[int, msgspec.Meta(ge=1)] = 1


class ReplaySource(SourceSection, frozen=True, tag_field="kind", tag="replay"):
    """Replay of recordings; `skip` rows if they have times; `scenes`, in order of `from_row`, if they have none."""

    file: str
    subject: int | None = None
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    seed: int = 0
    rows: int | None = None
    faults: list[ReplayFault] = msgspec.field(default_factory=list)
    scenes: list[RecordingFilter] = msgspec.field(default_factory=list)
    skip: Annotated[int, msgspec.Meta(ge=0)] = 0

    @property
    def reads_recordings(self) -> bool:
        return True

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        begins = [scene.from_row for scene in self.scenes]
        if begins and (begins[0] != 1 or sorted(set(begins)) != begins):
            raise ConfigError(file, f"{key}.scenes", "from_row must be 1 for the first scene, and ascend")
        for fault in self.faults:
            if fault.kind == "swap" and len(set(fault.fields)) != 2:
                raise ConfigError(file, f"{key}.faults", f"swap needs two fields, not {len(set(fault.fields))}")
            if fault.kind in ("quantize", "saturate") and not fault.amount > 0:
                raise ConfigError(file, f"{key}.faults", f"{fault.kind} needs an amount above 0")
            for field_name in fault.fields:
                if field_name not in fields:
                    hint = did_you_mean(field_name, fields)
                    raise ConfigError(file, f"{key}.faults", f"no field {field_name!r}{hint}")

    def with_absolute_paths(self, base: Path) -> Self:
        return msgspec.structs.replace(self, file=str(base / self.file))


class MqttSource(SourceSection, frozen=True, tag_field="kind", tag="mqtt"):
    """MQTT subscription; `paths`: field → JSONPath of its value in a message, or `topic[N]`; `t`: that of its time.

    `session_expiry`: how long the broker holds messages for this device while it is away.
    """

    topic: str
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    t: str | None = None
    session_expiry: Duration = Duration(7 * 86_400.0)

    def check(self, file: str, key: str, fields: Collection[str]) -> None:
        check_broker(file, self.broker, f"{key}.broker")
        levels = self.topic.split("/")
        misplaced = any(("#" in level or "+" in level) and level not in ("#", "+") for level in levels)
        if not self.topic or misplaced or "#" in levels[:-1]:
            problem = f"{self.topic!r} is no topic filter; + stands for one whole level, # for all levels at the end"
            raise ConfigError(file, f"{key}.topic", problem)

    def with_absolute_paths(self, base: Path) -> Self:
        return msgspec.structs.replace(self, broker=self.broker.with_absolute_paths(base))


class ExecSource(SourceSection, frozen=True, tag_field="kind", tag="exec"):
    """Program that prints a row on each line; with `every`, one that ends and is run again at this interval.

    `timeout`: longest silence before the program is killed and started again; "0 s" for none. `max_rate`: lines a
    second; a program that prints more is held back.
    """

    command: Annotated[list[str], msgspec.Meta(min_length=1)]
    format: Literal["json", "csv"] = "json"
    every: Duration | None = None
    timeout: Duration = Duration(300.0)
    max_rate: Annotated[float, msgspec.Meta(gt=0, le=100_000)] = 1000.0

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


SourceConfig = SocketSource | FilesSource | HostSource | ReplaySource | MqttSource | ExecSource


def _check_poll_interval(file: str, key: str, interval: Duration) -> None:
    if interval < _MIN_INTERVAL_S:
        raise ConfigError(file, f"{key}.poll_interval", f"must be at least {_MIN_INTERVAL_S * 1000:g} ms")
