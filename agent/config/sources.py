"""Sources of a stream: socket, files, host, replay, MQTT."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.config.broker import BrokerConfig, check_broker
from agent.config.section import Section
from agent.errors import ConfigError
from agent.media import ImageFormat, MediaFormat, SoundFormat
from agent.quantities import Duration
from agent.toml_files import did_you_mean

_MIN_INTERVAL_S = 0.01


class SocketSource(Section, frozen=True, tag_field="kind", tag="socket"):
    pass


class FilesSource(Section, frozen=True, tag_field="kind", tag="files"):
    """Watched folder of tables, or of images or sounds, which define the stream's fields."""

    folder: str
    poll_interval: Duration = Duration(2.0)
    image: ImageFormat | None = None
    sound: SoundFormat | None = None

    @property
    def media_format(self) -> MediaFormat | None:
        return self.image or self.sound


class HostSource(Section, frozen=True, tag_field="kind", tag="host"):
    poll_interval: Duration = Duration(10.0)


class ReplayFault(Section, frozen=True):
    """Fault injected into a replay from row `from_row` on.

    `amount` is the factor (gain, scale), the summand (offset), the value (stuck), the limit of magnitudes (saturate), the
    standard deviation (noise), the step (quantize), or the height of spikes, one in a hundred rows. swap exchanges two
    fields.
    """

    kind: Literal["gain", "offset", "stuck", "missing", "spikes", "saturate", "scale", "swap", "noise", "quantize"]
    fields: Annotated[list[str], msgspec.Meta(min_length=1)]
    from_row: Annotated[int, msgspec.Meta(ge=1)]
    amount: float = 0.0


class RecordingFilter(Section, frozen=True):
    """From row `from_row` on, replay the recordings whose `column` is `value`."""

    column: str
    value: str
    from_row: Annotated[int, msgspec.Meta(ge=1)] = 1


class ReplaySource(Section, frozen=True, tag_field="kind", tag="replay"):
    """Replay of recordings. `skip` applies to recordings with times, `scenes` (in order of rows) to those without."""

    file: str
    subject: int | None = None
    speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    seed: int = 0
    rows: int | None = None
    faults: list[ReplayFault] = msgspec.field(default_factory=list)
    scenes: list[RecordingFilter] = msgspec.field(default_factory=list)
    skip: Annotated[int, msgspec.Meta(ge=0)] = 0


class MqttSource(Section, frozen=True, tag_field="kind", tag="mqtt"):
    """MQTT subscription. `paths`: field → JSONPath of its value, or `topic[N]`; `t`: JSONPath of the time, epoch seconds.

    `session_expiry`: how long the broker keeps messages while the device is away.
    """

    topic: str
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    paths: dict[str, str] = msgspec.field(default_factory=dict)
    t: str | None = None
    session_expiry: Duration = Duration(7 * 86_400.0)


SourceConfig = SocketSource | FilesSource | HostSource | ReplaySource | MqttSource


def check(file: str, key: str, source: SourceConfig, fields: Collection[str]) -> None:
    """Check a source; `fields` are those of its stream. Raises ConfigError."""
    if isinstance(source, FilesSource | HostSource) and source.poll_interval < _MIN_INTERVAL_S:
        raise ConfigError(file, f"{key}.poll_interval", f"must be at least {_MIN_INTERVAL_S * 1000:g} ms")
    if isinstance(source, MqttSource):
        check_broker(file, source.broker, f"{key}.broker")
    if isinstance(source, ReplaySource):
        begins = [scene.from_row for scene in source.scenes]
        if begins and (begins[0] != 1 or sorted(set(begins)) != begins):
            raise ConfigError(file, f"{key}.scenes", "from_row must start at 1 and ascend")
        for fault in source.faults:
            if fault.kind == "swap" and len(set(fault.fields)) != 2:
                raise ConfigError(file, f"{key}.faults", f"swap needs two fields, not {len(set(fault.fields))}")
            if fault.kind in ("quantize", "saturate") and not fault.amount > 0:
                raise ConfigError(file, f"{key}.faults", f"{fault.kind} needs an amount above 0")
            for field_name in fault.fields:
                if field_name not in fields:
                    hint = did_you_mean(field_name, fields)
                    raise ConfigError(file, f"{key}.faults", f"no field {field_name!r}{hint}")


def with_absolute_paths(source: SourceConfig, base: Path) -> SourceConfig:
    """Return the source with its file paths resolved against `base`."""
    if isinstance(source, FilesSource):
        return msgspec.structs.replace(source, folder=str(base / source.folder))
    if isinstance(source, ReplaySource):
        return msgspec.structs.replace(source, file=str(base / source.file))
    if isinstance(source, MqttSource):
        return msgspec.structs.replace(source, broker=source.broker.with_absolute_paths(base))
    return source
