"""The plan of a roll-out, as its file says it and as it is kept: what, for whom, in which steps, by which rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from agent import clock, toml_files
from agent.config import Section
from agent.errors import ConfigError
from agent.names import is_name
from agent.wire import topics
from agent.wire.desired_state import Digest, Moment, Name, Rules, Share, Version, Wanted

MAX_STEPS = 32
_ORDER = ("shadow", "canary", "all")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What is asked of the answers; the rest of a promotion is about how much was seen.
ASKED = ("agreement", "slower", "accuracy_drop", "error_growth")

Strategy = Literal["shadow", "canary", "all"]
Ratio = Annotated[float, msgspec.Meta(gt=0, le=1000)]
Growth = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Percent = Annotated[float, msgspec.Meta(gt=0, le=100)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Hours = Annotated[float, msgspec.Meta(ge=0, le=8760)]


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a step is over. None: not asked.

    `devices` that report, with so many `batches` each, so many `hours` after the step began. Of the intervals:
    `agreement` is the least lower end, `slower` (time, as a multiple of the other's), `accuracy_drop` and
    `error_growth` (as a share of the other's) the greatest upper ends. Above a share of `failed` devices: abort.
    """

    devices: Count = 3
    batches: Count = 20
    hours: Hours = 1.0
    agreement: Share | None = None
    slower: Ratio | None = None
    accuracy_drop: Share | None = None
    error_growth: Growth | None = None
    failed: Share = 0.1


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    strategy: Strategy
    percent: Percent
    promote: Promotion

    @property
    def words(self) -> str:
        return "all" if self.strategy == "all" else f"{self.strategy} {self.percent:g} %"


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole plan, each step with all of its rules; as it is kept in table rollouts."""

    name: Name
    task: Name
    bundle: Name
    version: Version
    digest: Digest
    to: str
    deadline: Moment | None
    steps: Annotated[list[Step], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]
    device: Rules

    def topic(self, fleet: str) -> topics.Topic:
        """Where it is desired."""
        kind, _, name = self.to.partition(":")
        if kind == "group":
            return topics.Topic(fleet, topics.GROUP, "desired", name)
        return topics.Topic(fleet, topics.ALL if kind == "all" else name, "desired")

    def wanted(self, step: int) -> Wanted:
        """What devices are told at a step, which counts from 1."""
        now = self.steps[step - 1]
        return self._wanted(now.strategy, now.percent)

    def back(self) -> Wanted:
        """What devices are told after an abort."""
        return self._wanted("back", 100.0)

    def _wanted(self, strategy: Literal["shadow", "canary", "all", "back"], percent: float) -> Wanted:
        what = (self.name, self.bundle, self.version, self.digest)
        return Wanted(*what, strategy, percent, self.deadline, self.device)


class Deadline(str):
    """A moment in UTC, to the second, as the wire has it."""


class _Subject(Section, frozen=True):
    name: str
    task: str
    bundle: str | None = None
    version: str | None = None
    digest: str | None = None
    path: str | None = None
    to: str = "all"
    deadline: Deadline | None = None


class _Asked(Section, frozen=True):
    devices: Count | None = None
    batches: Count | None = None
    hours: Hours | None = None
    agreement: Share | None = None
    slower: Ratio | None = None
    accuracy_drop: Share | None = None
    error_growth: Growth | None = None
    failed: Share | None = None


class _Step(_Asked, frozen=True, kw_only=True):
    strategy: Strategy
    percent: Percent = 100.0


class _File(Section, frozen=True):
    rollout: _Subject
    steps: list[_Step]
    promote: _Asked = _Asked()
    device: Rules = Rules()


class File:
    """A file that was read and checked. `path` is absolute; what it leaves out of the bundle is found elsewhere."""

    def __init__(self, source: Path, content: _File) -> None:
        self.source, self._content = source, content
        said = content.rollout
        self.bundle, self.version, self.digest = said.bundle, said.version, said.digest
        self.path = None if said.path is None else source.parent / said.path

    def plan(self, bundle: str, version: str, digest: str) -> Plan:
        """The plan, with the bundle it is about."""
        said, content = self._content.rollout, self._content
        steps = [Step(one.strategy, one.percent, _promotion(content.promote, one)) for one in content.steps]
        deadline = None if said.deadline is None else str(said.deadline)
        return Plan(said.name, said.task, bundle, version, digest, said.to, deadline, steps, content.device)

    def wrong(self, key: str, problem: str) -> ConfigError:
        return ConfigError(str(self.source), key, problem)


def read(source: Path) -> File:
    """Raises ConfigError, with file, key and fix."""
    content = toml_files.read(source, _File, _hook)
    file = File(source, content)
    for key, problem in (*_of_subject(content.rollout), *_of_steps(content)):
        raise file.wrong(key, problem)
    return file


def _promotion(common: _Asked, own: _Asked) -> Promotion:
    said = {name: getattr(common, name) for name in Promotion.__struct_fields__}
    said |= {name: value for name in said if (value := getattr(own, name)) is not None}
    return Promotion(**{name: value for name, value in said.items() if value is not None})


def _of_subject(said: _Subject) -> Sequence[tuple[str, str]]:
    found = []
    name = "1-64 of a-z 0-9 . _ - , first a letter or digit"
    for key in ("name", "task", "bundle"):
        value = getattr(said, key)
        if value is not None and not is_name(value):
            found.append((f"rollout.{key}", f"{value!r} must be {name}"))
    if said.path is None and said.bundle is None:
        found.append(("rollout.bundle", "which bundle is it? give its name, or path to read it from a bundle"))
    if said.path is None and said.version is None:
        found.append(("rollout.version", "which version is it? give it, or path to read it from a bundle"))
    if said.version is not None and not 1 <= len(said.version) <= 64:
        found.append(("rollout.version", "must have 1 to 64 characters"))
    if said.digest is not None and not _DIGEST.fullmatch(said.digest):
        found.append(("rollout.digest", "must be sha256: and 64 of 0-9 a-f, as `outstation model check` prints it"))
    kind, colon, whom = said.to.partition(":")
    if said.to != "all" and not (kind in ("group", "device") and colon and is_name(whom)):
        found.append(("rollout.to", f"{said.to!r} is none of: all, group:NAME, device:NAME"))
    return found


def _of_steps(content: _File) -> Sequence[tuple[str, str]]:
    found, steps = [], content.steps
    if not 1 <= len(steps) <= MAX_STEPS or steps[-1].strategy != "all":
        found.append(("steps", f'there must be 1 to {MAX_STEPS} [[steps]], the last one with strategy = "all"'))
    for i, step in enumerate(steps):
        if step.strategy == "all" and step.percent != 100:
            found.append((f"steps[{i}].percent", "all is all; for a part use strategy = canary"))
        if not any(getattr(_promotion(content.promote, step), name) is not None for name in ASKED):
            problem = f"asks nothing of the answers; give one of {', '.join(ASKED)} here or in [promote]"
            found.append((f"steps[{i}]", problem))
        if i == 0:
            continue
        before = steps[i - 1]
        if _ORDER.index(step.strategy) < _ORDER.index(before.strategy):
            found.append((f"steps[{i}].strategy", f"{step.strategy} cannot come after {before.strategy}"))
        if step.strategy == before.strategy and step.percent <= before.percent:
            found.append((f"steps[{i}].percent", f"{step.percent:g} is no more than the step before has"))
    return found


def _hook(kind: type, value: Any) -> Any:
    """Raises ValueError, which msgspec puts at its key."""
    if kind is not Deadline:
        raise ValueError(f"expected {kind.__name__}")
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'{value!r} is no moment; write one in UTC, as "2026-12-31T00:00:00Z"') from None
    return Deadline(clock.rfc3339(clock.epoch_us(moment.astimezone(UTC).isoformat()))[:19] + "Z")
