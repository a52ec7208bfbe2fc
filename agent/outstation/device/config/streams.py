"""Section [streams.NAME]: fields of its rows, their source, and what may leave of them."""

import re
from typing import Annotated, Literal

import msgspec

from outstation.device.config.sources import ReplaySource, SocketSource, SourceConfig
from outstation.device.config.stream_privacy import StreamPrivacy
from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.foundation.media import MediaFormat
from outstation.foundation.names import check_name
from outstation.protocol.alerts.alert import OUTPUT_PREFIX

# Limit for fields listed by hand; image and sound sources define their own.
MAX_FIELDS = 256
NO_STREAM = "the config has no stream; add a section [streams.NAME], see docs/reference/config.md"


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
    """Where rows come from: a table whose `kind` chooses one of the sources below, or one of
    [another package](../guides/plugins.md); a socket unless given."""
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


def with_media_fields(file: str, name: str, stream: StreamConfig) -> StreamConfig:
    """Return the stream with the fields of its image or sound source. Raises ConfigError."""
    key = f"streams.{name}"
    if stream.media_format is None:
        if not stream.fields:
            raise ConfigError(file, f"{key}.fields", "this key is required; add it")
        return stream
    if stream.fields:
        raise ConfigError(file, f"{key}.fields", "are defined by the source's image or sound; remove them")
    return msgspec.structs.replace(stream, fields=[FieldConfig(name=column) for column in stream.media_format.columns])


def check_stream(file: str, name: str, stream: StreamConfig) -> None:
    """Check section [streams.NAME]. Raises ConfigError."""
    check_name(file, f"streams.{name}", name)
    key = f"streams.{name}.fields"
    seen: set[str] = set()
    for column in stream.fields:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]{0,63}", column.name) or column.name in ("t", "stream", "columns"):
            raise ConfigError(
                file, key, f"{column.name!r} is not a valid field name: letters, digits, _ and . only; t is the time"
            )
        if column.name.startswith(OUTPUT_PREFIX):
            problem = f"alerts about outputs of models have names that begin with {OUTPUT_PREFIX!r}; rename it"
            raise ConfigError(file, key, f"field {column.name!r}: {problem}")
        if column.name in seen:
            raise ConfigError(file, key, f"duplicate field {column.name!r}; remove one")
        seen.add(column.name)
        if column.min is not None and column.max is not None and column.min > column.max:
            raise ConfigError(file, key, f"field {column.name!r}: min {column.min:g} is above max {column.max:g}")
        if column.max_step is not None and column.max_step <= 0:
            raise ConfigError(file, key, f"field {column.name!r}: max_step must be above 0; omit it for no limit")
        if column.type == "category" and column.max_step is not None:
            raise ConfigError(file, key, f"field {column.name!r}: a category has no max_step; remove it")
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
