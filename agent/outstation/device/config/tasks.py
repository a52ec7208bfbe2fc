"""Section [tasks.NAME]: the bundle that runs over a stream, its schedule, its slices and its further inputs."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from outstation.device.config import alert_rules
from outstation.device.config.alert_rules import AlertRuleConfig
from outstation.device.config.device import MAX_RETENTION_S
from outstation.device.config.streams import NO_STREAM, StreamConfig, check_class_field
from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.foundation.names import check_name

NO_TASK = "the config has no task; add a section [tasks.NAME], see docs/reference/config.md"


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

    Messages about the task obey the privacy rules of this stream and of the task's own: the strictest holds.

    ```toml
    [tasks.exercise.inputs.motion]
    stream = "watch"
    wait = "30 s"
    ```
    """

    stream: str
    """Stream with the input's fields."""
    wait: Duration = Duration(10.0)
    """Time for which a window waits for the stream's next row: only then is it certain that no earlier row still comes.
    Rows that come later are left out."""


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
    zone, dates and jitter as the guide "schedules" explains. Where that number of rows comes more than ten times a
    second, a run waits for four drift windows, or 100 ms after the last run."""
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
    """The longest time of learning, as a multiple of the usual time, where windows resemble their neighbours too much,
    for weather or long modes, to show the usual range; 1: no extension."""
    on_deviation: Literal["continue", "hold"] = "continue"
    """A learned reference that deviates is used, with an alert; `"hold"`: drift is not tested until a person accepts
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


def check_task(file: str, name: str, task: TaskConfig, streams: Mapping[str, StreamConfig]) -> None:
    """Check section [tasks.NAME] against the `streams` of its file. Raises ConfigError."""
    check_name(file, f"tasks.{name}", name)
    stream = _find_stream(file, f"tasks.{name}.stream", task.stream, streams)
    if task.deadline is not None and task.deadline <= 0:
        raise ConfigError(file, f"tasks.{name}.deadline", "must be positive; omit it for no deadline")
    _check_inputs(file, name, task, streams)
    _check_slices(file, name, task, stream)
    alert_rules.check(file, name, task.alerts)
    if task.class_field:
        check_class_field(file, f"tasks.{name}.class_field", task.class_field, stream)


def _find_stream(file: str, key: str, name: str, streams: Mapping[str, StreamConfig]) -> StreamConfig:
    if name not in streams:
        raise ConfigError(file, key, f"unknown stream {name!r}{did_you_mean(name, streams, NO_STREAM)}")
    return streams[name]


def _check_inputs(file: str, name: str, task: TaskConfig, streams: Mapping[str, StreamConfig]) -> None:
    for joined, source in task.inputs.items():
        key = f"tasks.{name}.inputs.{joined}"
        _find_stream(file, f"{key}.stream", source.stream, streams)
        if not 0.0 <= source.wait <= MAX_RETENTION_S:
            raise ConfigError(file, f"{key}.wait", "must be between 0 s and 3650 d")


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
            if item.edges != sorted(set(item.edges)):
                raise ConfigError(file, key, f"edges of {field!r} must ascend")
