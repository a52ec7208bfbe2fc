"""Scenario of a simulated fleet in TOML: groups of devices, events at some of them, roll-outs, and late labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from outstation.device import config
from outstation.device.config.sources import ReplayFault
from outstation.device.config.streams import NO_STREAM
from outstation.device.config.tasks import NO_TASK
from outstation.device.store.clock_segments import STEP_US
from outstation.fleet.incidents.conditions import UNSEEN_LIMIT_S, silence_limit_s
from outstation.fleet.incidents.monitor import POLL_INTERVAL_S
from outstation.fleet.rollout import plan as plans
from outstation.foundation import clock
from outstation.foundation.config.quantities import Duration
from outstation.foundation.config.toml_files import Section, did_you_mean
from outstation.foundation.errors import ConfigError
from outstation.foundation.names import is_name
from outstation.foundation.text import format_span
from outstation.protocol.alerts.kinds import KINDS
from outstation.workbench.testing.simulation.lossy_link import LinkConditions, Share

MAX_DEVICES = 10_000
# Alerts that name what an event of a sensor may be found by.
_SENSOR_ALERTS = ("drift", "fault")


def _is_silence_due(lasted_s: float, health_interval_s: float, *, is_seen: bool) -> bool:
    """Return True if the collector must have noticed that nothing arrives from a device, seen before or never."""
    limit_s = silence_limit_s(health_interval_s) if is_seen else UNSEEN_LIMIT_S
    return lasted_s > limit_s + POLL_INTERVAL_S


class Event(Section, frozen=True):
    """Something that happens to devices from `at` on, for `lasts`; None: to the end.

    `devices` are names or patterns, such as `hall-*`; without them all devices of `group`, or of the fleet. `expect`:
    kinds of alerts of which one must be raised; an empty list: none may be. None: `default_expect`, if they are due.
    """

    at: Duration
    lasts: Duration | None = None
    devices: Annotated[list[str], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=list)
    group: str = ""
    expect: list[str] | None = None
    default_expect: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def end_s(self) -> float:
        return float("inf") if self.lasts is None else self.at + self.lasts

    @property
    def expected_alerts(self) -> Sequence[str]:
        return self.default_expect if self.expect is None else self.expect

    def is_alert_due(self, lasted_s: float, health_interval_s: float, *, is_seen: bool = True) -> bool:
        """Return True if the default alerts must come of an event that lasted so long.

        `health_interval_s`: seconds between the health messages of a device; `is_seen`: it sent some before the event.
        """
        return True

    def check(self, file: str, key: str, fields: dict[str, list[str]]) -> None:
        """Check what the types of the keys cannot; `fields` by stream. Raises ConfigError."""

    @property
    def subjects(self) -> Sequence[str]:
        """Subjects of alerts that name this event; empty: any."""
        return ()


class SensorFault(Event, frozen=True, kw_only=True):
    """Event of a sensor: `fields` of a `stream`; `over`: the time in which it grows to its `amount`."""

    fields: Annotated[list[str], msgspec.Meta(min_length=1)]
    stream: str = ""
    amount: float = 0.0
    over: Duration = Duration(0.0)
    default_expect: ClassVar[tuple[str, ...]] = _SENSOR_ALERTS

    @property
    def subjects(self) -> Sequence[str]:
        return self.fields

    @property
    def fault(self) -> ReplayFault:
        kind: Any = self.kind
        return ReplayFault(kind=kind, fields=self.fields, from_row=1, amount=self.amount)

    def check(self, file: str, key: str, fields: dict[str, list[str]]) -> None:
        if self.stream and self.stream not in fields:
            raise ConfigError(
                file, f"{key}.stream", f"no stream {self.stream!r}{did_you_mean(self.stream, fields, NO_STREAM)}"
            )
        known = [name for stream, names in fields.items() if self.stream in ("", stream) for name in names]
        for name in self.fields:
            if name not in known:
                raise ConfigError(file, f"{key}.fields", f"no field {name!r}{did_you_mean(name, known)}")
        self.fault.check(file, key)


class Gain(SensorFault, frozen=True, kw_only=True, tag_field="kind", tag="gain"):
    """Readings times `amount`."""

    amount: float = 1.0
    # Again, since reports list keys in the order of their definition.
    over: Duration = Duration(0.0)


class Offset(SensorFault, frozen=True, tag_field="kind", tag="offset"):
    """Readings plus `amount`."""


class Stuck(SensorFault, frozen=True, tag_field="kind", tag="stuck"):
    """Readings that are always `amount`."""


class Missing(SensorFault, frozen=True, tag_field="kind", tag="missing"):
    """Readings without a value; the fields must be optional."""

    def check_optional(
        self, file: str, key: str, fields: Mapping[str, Collection[str]], optional: Mapping[str, Collection[str]]
    ) -> None:
        """Raise ConfigError for a field that a stream of this event has and requires; both mappings are by stream."""
        for stream in [self.stream] if self.stream else fields:
            for name in self.fields:
                if name in fields[stream] and name not in optional.get(stream, ()):
                    remedy = f'[streams.{stream}] fields = [{{ name = "{name}", optional = true }}, …]'
                    problem = f"{stream}.{name} is not optional, so rows without it are rejected; set {remedy}"
                    raise ConfigError(file, key, problem)


class Spikes(SensorFault, frozen=True, tag_field="kind", tag="spikes"):
    """One reading in a hundred is higher by `amount`."""


class Saturate(SensorFault, frozen=True, tag_field="kind", tag="saturate"):
    """Readings cut off at ± `amount`."""


class Noise(SensorFault, frozen=True, tag_field="kind", tag="noise"):
    """Readings plus noise with the standard deviation `amount`."""


class Quantize(SensorFault, frozen=True, tag_field="kind", tag="quantize"):
    """Readings rounded to steps of `amount`."""


class Swap(SensorFault, frozen=True, tag_field="kind", tag="swap"):
    """Two fields exchanged."""


class Silence(Event, frozen=True, tag_field="kind", tag="silence"):
    """A sensor that sends no rows; `stream`: one of them, or all."""

    stream: str = ""

    def check(self, file: str, key: str, fields: dict[str, list[str]]) -> None:
        if self.stream and self.stream not in fields:
            raise ConfigError(
                file, f"{key}.stream", f"no stream {self.stream!r}{did_you_mean(self.stream, fields, NO_STREAM)}"
            )


class Outage(Event, frozen=True, tag_field="kind", tag="outage"):
    """A device without a network."""

    default_expect: ClassVar[tuple[str, ...]] = ("connection",)

    def is_alert_due(self, lasted_s: float, health_interval_s: float, *, is_seen: bool = True) -> bool:
        return _is_silence_due(lasted_s, health_interval_s, is_seen=is_seen)


class BadNetwork(Event, frozen=True, tag_field="kind", tag="network"):
    """A network that loses, repeats and delays messages and breaks connections, each with a probability."""

    loss: Share = 0.0
    duplication: Share = 0.0
    disconnect: Share = 0.0
    delay: Duration = Duration(0.0)

    @property
    def conditions(self) -> LinkConditions:
        return LinkConditions(self.loss, self.duplication, float(self.delay), disconnect=self.disconnect)


class CollectorOutage(Event, frozen=True, tag_field="kind", tag="collector-outage"):
    """A collector without a network."""


class SkewedClock(Event, frozen=True, tag_field="kind", tag="clock"):
    """A wall clock that is `ahead` or `behind`; `synced`: a time service confirms it all the same."""

    ahead: Duration = Duration(0.0)
    behind: Duration = Duration(0.0)
    synced: bool = True
    default_expect: ClassVar[tuple[str, ...]] = ("clock",)

    @property
    def offset_us(self) -> int:
        return round((self.ahead - self.behind) * 1e6)

    def check(self, file: str, key: str, fields: dict[str, list[str]]) -> None:
        if bool(self.ahead) == bool(self.behind):
            raise ConfigError(file, key, "a clock is either ahead or behind: give one of them, above 0")

    def is_alert_due(self, lasted_s: float, health_interval_s: float, *, is_seen: bool = True) -> bool:
        # A smaller step is none, and a longer one is noticed by the next turn of the daemon.
        return abs(self.offset_us) >= STEP_US and lasted_s > health_interval_s


class PowerCut(Event, frozen=True, tag_field="kind", tag="power-cut"):
    """A device that loses its power: its daemon is killed, and starts again when the power is back."""


class FullDisk(Event, frozen=True, tag_field="kind", tag="full-disk"):
    """A disk without free bytes: the device cannot write a message about it, either, before it has evicted data."""

    default_expect: ClassVar[tuple[str, ...]] = ("storage", "connection")

    def is_alert_due(self, lasted_s: float, health_interval_s: float, *, is_seen: bool = True) -> bool:
        return _is_silence_due(lasted_s, health_interval_s, is_seen=is_seen)


class WrongLabels(Event, frozen=True, kw_only=True, tag_field="kind", tag="wrong-labels"):
    """Labels of a `task` of which the share `share` names another class: the input means something else now."""

    task: str
    share: Share = 1.0
    default_expect: ClassVar[tuple[str, ...]] = ("quality",)


class Rollout(Event, frozen=True, kw_only=True, tag_field="kind", tag="rollout"):
    """Roll-out of the bundle that the file `plan` names by its path; `ends`: the outcome that is expected.

    The plan's target selects the devices, so `load` sets `devices` and `group`, and makes `plan` absolute.
    """

    plan: str
    ends: Literal["completed", "held", "rolled-back"] = "completed"
    task: str = ""


AnyEvent = (
    Gain | Offset | Stuck | Missing | Spikes | Saturate | Noise | Quantize | Swap | Silence | Outage | BadNetwork
    | CollectorOutage | SkewedClock | PowerCut | FullDisk | WrongLabels | Rollout
)  # fmt: skip


class Group(Section, frozen=True):
    """Group of `devices`; each starts at a moment within `start_within`, which the seed selects."""

    devices: Annotated[int, msgspec.Meta(ge=1, le=MAX_DEVICES)]
    start_within: Duration = Duration(0.0)


class LateLabels(Section, frozen=True):
    """Labels of a task, from a `column` of the recording, each `every` rows, `delay` after the row."""

    column: str = "label"
    delay: Duration = Duration(0.0)
    every: Annotated[int, msgspec.Meta(ge=1)] = 100


class Budget(Section, frozen=True):
    """Most false alarms: alerts that no event explains."""

    false_alarms: Annotated[int, msgspec.Meta(ge=0)] = 0


class Scenario(Section, frozen=True, kw_only=True):
    """A scenario: `duration` of simulated time from `start` on, then up to `drain` until everything is delivered.

    `grace`: time after the end of an event in which an alert still belongs to it.
    """

    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    start: str = "2026-06-01T06:00:00Z"
    duration: Duration
    drain: Duration = Duration(600.0)
    grace: Duration = Duration(1800.0)
    groups: dict[str, Group] = msgspec.field(default_factory=lambda: {"sim": Group(devices=4)})
    network: LinkConditions = LinkConditions()
    events: list[AnyEvent] = msgspec.field(default_factory=list)
    labels: dict[str, LateLabels] = msgspec.field(default_factory=dict)
    budget: Budget = Budget()

    @property
    def start_us(self) -> int:
        return clock.parse_rfc3339(self.start)

    @property
    def stop_s(self) -> float:
        """Latest time of the run, in seconds since 1970."""
        return self.start_us / 1e6 + self.duration + self.drain

    def device_names(self) -> dict[str, str]:
        """Return the group of each device, by its name."""
        names: dict[str, str] = {}
        for group, settings in self.groups.items():
            digits = max(2, len(str(settings.devices)))
            names |= {f"{group}-{n:0{digits}}": group for n in range(1, settings.devices + 1)}
        return names

    def select(self, event: Event, names: dict[str, str]) -> list[str]:
        """Return the devices of an event, in order."""
        if isinstance(event, CollectorOutage):
            return []
        return [
            name
            for name, group in names.items()
            if event.group in ("", group)
            and (not event.devices or any(fnmatchcase(name, pattern) for pattern in event.devices))
        ]


def load(
    file: Path,
    fields: dict[str, list[str]],
    tasks: Mapping[str, float],
    devices: int | None = None,
    groups: Sequence[str] = (),
    optional: Mapping[str, Collection[str]] | None = None,
) -> Scenario:
    """Read a scenario; `fields` by stream, `groups` of the config. Raises ConfigError.

    `tasks`: least seconds between two batches by name, 0 if unknown.

    `devices` replaces the number of devices of the only group. `optional`: by stream, if known.
    """
    read = config.read(file, Scenario)
    if devices is not None:
        if len(read.groups) != 1:
            problem = f"{len(read.groups)} groups, so {devices} devices may belong to any; give each its own number"
            raise ConfigError(str(file), "groups", problem)
        if not 1 <= devices <= MAX_DEVICES:
            raise ConfigError(str(file), "groups", f"{devices} devices; must be from 1 to {MAX_DEVICES}")
        [(name, group)] = read.groups.items()
        read = msgspec.structs.replace(read, groups={name: msgspec.structs.replace(group, devices=devices)})
    events = [
        _resolve_rollout(read, file, f"events[{i}]", event, tasks, groups) if isinstance(event, Rollout) else event
        for i, event in enumerate(read.events)
    ]
    read = msgspec.structs.replace(read, events=events)
    check(read, str(file), fields, tasks)
    for i, event in enumerate(read.events):
        if isinstance(event, Missing) and optional is not None:
            event.check_optional(str(file), f"events[{i}].fields", fields, optional)
    return read


def _resolve_rollout(
    scenario: Scenario, file: Path, key: str, event: Rollout, tasks: Mapping[str, float], groups: Sequence[str]
) -> Rollout:
    """Return a roll-out with its task and the devices that its plan selects. Raises ConfigError."""
    if event.devices or event.group or event.lasts is not None or event.task:
        problem = "has devices, group, lasts or task; the target of its plan selects the devices, its rules end it"
        raise ConfigError(str(file), key, problem)
    plan = plans.read((file.parent / event.plan).resolve())
    if plan.path is None or not plan.path.exists():
        problem = "is missing or names no file: devices of a simulation get the bundle from there"
        raise plan.config_error("rollout.path", problem)
    # Name, task, target and limits; the bundle is resolved when the roll-out starts.
    draft = plan.to_plan(plan.bundle or "", plan.version or "", plan.digest or "")
    limits = {f"steps[{i}]": step.promote.max_latency_ratio for i, step in enumerate(draft.steps)}
    limits["device_rules"] = draft.device_rules.max_latency_ratio
    if limited := [name for name, ratio in limits.items() if ratio is not None]:
        problem = "a simulation measures no inference time: it would be this machine's, not the device's; leave it out"
        raise plan.config_error(f"{limited[0]}.max_latency_ratio", problem)
    if draft.task not in tasks:
        problem = f"no task {draft.task!r} in the config of the devices{did_you_mean(draft.task, tasks, NO_TASK)}"
        raise plan.config_error("rollout.task", problem)
    kind, _, name = draft.target.partition(":")
    known = {"all": [""], "group": [*scenario.groups, *groups], "device": [*scenario.device_names()]}[kind]
    if name not in known:
        problem = f"no {kind} {name!r} in the scenario{did_you_mean(name, known)}"
        raise plan.config_error("rollout.target", problem)
    least_s, left_s = 3600 * draft.least_hours(tasks[draft.task]), scenario.duration - event.at
    if event.ends == "completed" and least_s >= left_s > 0:
        problem = (
            f"the roll-out takes at least {format_span(least_s)} by min_hours and min_batches of {plan.source.name}, "
            f'and {format_span(left_s)} are left; raise `duration`, lower these rules, or write ends = "held"'
        )
        raise ConfigError(str(file), f"{key}.at", problem)
    # Every device is in the groups of the config.
    group = name if kind == "group" and name not in groups else ""
    devices = [name] if kind == "device" else []
    return msgspec.structs.replace(event, plan=str(plan.source), devices=devices, group=group, task=draft.task)


def check(scenario: Scenario, file: str, fields: dict[str, list[str]], tasks: Collection[str]) -> None:
    """Check a scenario against streams and tasks. Raises ConfigError."""
    try:
        start_us = scenario.start_us
    except ValueError as problem:
        raise ConfigError(file, "start", f'{problem}; write "2026-06-01T06:00:00Z"') from None
    if start_us < clock.BUILD_FLOOR_US:
        floor = clock.to_rfc3339(clock.BUILD_FLOOR_US)
        raise ConfigError(file, "start", f"before {floor}, when this program was built: no device would believe it")
    if scenario.stop_s > clock.MAX_TIME_S:
        fix = "start it earlier, or shorten `duration`"
        raise ConfigError(file, "start", f"the run would end after 2100, and devices reject such times; {fix}")
    if scenario.duration <= 0:
        raise ConfigError(file, "duration", 'must be above 0, such as "2 h"')
    for name in scenario.groups:
        if not is_name(name):
            raise ConfigError(file, f"groups.{name}", "must be 1-60 of a-z 0-9 . _ - , first a letter or digit")
    names = scenario.device_names()
    if len(names) > MAX_DEVICES:
        raise ConfigError(file, "groups", f"{len(names)} devices; at most {MAX_DEVICES} run in one simulation")
    for i, event in enumerate(scenario.events):
        _check_event(scenario, file, f"events[{i}]", event, names)
        event.check(file, f"events[{i}]", fields)
        if isinstance(event, WrongLabels) and event.task not in scenario.labels:
            raise ConfigError(file, f"events[{i}].task", f"no [labels.{event.task}] in this scenario")
    plan_files = [event.plan for event in scenario.events if isinstance(event, Rollout)]
    if len(set(plan_files)) < len(plan_files):
        raise ConfigError(file, "events", "two roll-outs have the same plan; each needs a name of its own")
    for task in scenario.labels:
        if task not in tasks:
            raise ConfigError(
                file, f"labels.{task}", f"no task {task!r} in the config{did_you_mean(task, tasks, NO_TASK)}"
            )


def _check_event(scenario: Scenario, file: str, key: str, event: AnyEvent, names: dict[str, str]) -> None:
    if event.group and event.group not in scenario.groups:
        raise ConfigError(file, f"{key}.group", f"no group {event.group!r}{did_you_mean(event.group, scenario.groups)}")
    for pattern in event.devices:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = next(iter(names))
            raise ConfigError(file, f"{key}.devices", f"no device {pattern!r}; the first one is {known!r}")
    alerts = {kind.alert for kind in KINDS}
    for alert in event.expect or ():
        if alert not in alerts:
            raise ConfigError(file, f"{key}.expect", f"no kind of alert is {alert!r}{did_you_mean(alert, alerts)}")
    if event.at >= scenario.duration:
        raise ConfigError(file, f"{key}.at", f"after the end of the scenario, duration = {scenario.duration:g} s")
    if isinstance(event, SkewedClock):
        latest_s = min(scenario.start_us / 1e6 + event.end_s, scenario.stop_s) + event.ahead
        if latest_s > clock.MAX_TIME_S:
            problem = "the clock would show a time after 2100, and devices reject such times; take less"
            raise ConfigError(file, f"{key}.ahead", problem)
    if not isinstance(event, CollectorOutage) and not scenario.select(event, names):
        raise ConfigError(file, f"{key}.devices", f"none of them is in group {event.group!r}")
