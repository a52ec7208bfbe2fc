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
from agent.wire.desired_state import CanaryRules, DesiredBundle, Digest, Name, Rfc3339Seconds, Share, Version

MAX_STEPS = 32
_STRATEGY_ORDER = ("shadow", "canary", "all")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# What is asked of the answers; the rest of a promotion is about how much was seen.
RULE_KEYS = ("agreement", "slower", "accuracy_drop", "error_growth")

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

    min_devices: Count = 3
    min_batches: Count = 20
    min_hours: Hours = 1.0
    min_agreement: Share | None = None
    max_latency_ratio: Ratio | None = None
    max_accuracy_drop: Share | None = None
    max_error_growth: Growth | None = None
    max_failed_share: Share = 0.1


class RolloutStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    strategy: Strategy
    percent: Percent
    promote: Promotion

    @property
    def label(self) -> str:
        return "all" if self.strategy == "all" else f"{self.strategy} {self.percent:g} %"


class RolloutPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole plan, each step with all of its rules; as it is kept in table rollouts."""

    name: Name
    task: Name
    bundle: Name
    version: Version
    digest: Digest
    target: str
    deadline: Rfc3339Seconds | None
    steps: Annotated[list[RolloutStep], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]
    device_rules: CanaryRules

    def desired_topic(self, fleet: str) -> topics.Topic:
        """Where it is desired."""
        kind, _, name = self.target.partition(":")
        if kind == "group":
            return topics.Topic(fleet, topics.DEVICE_GROUP, "desired", name)
        return topics.Topic(fleet, topics.ALL_DEVICES if kind == "all" else name, "desired")

    def desired_for_step(self, step: int) -> DesiredBundle:
        """What devices are told at a step, which counts from 1."""
        now = self.steps[step - 1]
        return self._build_desired(now.strategy, now.percent)

    def desired_after_abort(self) -> DesiredBundle:
        """What devices are told after an abort."""
        return self._build_desired("back", 100.0)

    def _build_desired(self, strategy: Literal["shadow", "canary", "all", "back"], percent: float) -> DesiredBundle:
        what = (self.name, self.bundle, self.version, self.digest)
        return DesiredBundle(*what, strategy, percent, self.deadline, self.device_rules)


class Deadline(str):
    """A moment in UTC, to the second, as the wire has it."""


class _RolloutSection(Section, frozen=True):
    name: str
    task: str
    bundle: str | None = None
    version: str | None = None
    digest: str | None = None
    path: str | None = None
    target: str = "all"
    deadline: Deadline | None = None


class _PromotionSection(Section, frozen=True):
    min_devices: Count | None = None
    min_batches: Count | None = None
    min_hours: Hours | None = None
    min_agreement: Share | None = None
    max_latency_ratio: Ratio | None = None
    max_accuracy_drop: Share | None = None
    max_error_growth: Growth | None = None
    max_failed_share: Share | None = None


class _StepSection(_PromotionSection, frozen=True, kw_only=True):
    strategy: Strategy
    percent: Percent = 100.0


class _PlanSections(Section, frozen=True):
    rollout: _RolloutSection
    steps: list[_StepSection]
    promote: _PromotionSection = _PromotionSection()
    device_rules: CanaryRules = CanaryRules()


class PlanFile:
    """A file that was read and checked. `path` is absolute; what it leaves out of the bundle is found elsewhere."""

    def __init__(self, source: Path, content: _PlanSections) -> None:
        self.source, self._content = source, content
        said = content.rollout
        self.bundle, self.version, self.digest = said.bundle, said.version, said.digest
        self.path = None if said.path is None else source.parent / said.path

    def to_plan(self, bundle: str, version: str, digest: str) -> RolloutPlan:
        """The plan, with the bundle it is about."""
        said, content = self._content.rollout, self._content
        steps = [
            RolloutStep(one.strategy, one.percent, _merge_promotion(content.promote, one)) for one in content.steps
        ]
        deadline = None if said.deadline is None else str(said.deadline)
        return RolloutPlan(said.name, said.task, bundle, version, digest, said.target, deadline, steps, content.device_rules)

    def config_error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(str(self.source), key, problem)


def read(source: Path) -> PlanFile:
    """Raises ConfigError, with file, key and fix."""
    content = toml_files.read(source, _PlanSections, _decode_hook)
    file = PlanFile(source, content)
    for key, problem in (*_check_rollout_section(content.rollout), *_check_steps(content)):
        raise file.config_error(key, problem)
    return file


def _merge_promotion(defaults: _PromotionSection, step: _PromotionSection) -> Promotion:
    said = {name: getattr(defaults, name) for name in Promotion.__struct_fields__}
    said |= {name: value for name in said if (value := getattr(step, name)) is not None}
    return Promotion(**{name: value for name, value in said.items() if value is not None})


def _check_rollout_section(section: _RolloutSection) -> Sequence[tuple[str, str]]:
    found = []
    name = "1-64 of a-z 0-9 . _ - , first a letter or digit"
    for key in ("name", "task", "bundle"):
        value = getattr(section, key)
        if value is not None and not is_name(value):
            found.append((f"rollout.{key}", f"{value!r} must be {name}"))
    if section.path is None and section.bundle is None:
        found.append(("rollout.bundle", "which bundle is it? give its name, or path to read it from a bundle"))
    if section.path is None and section.version is None:
        found.append(("rollout.version", "which version is it? give it, or path to read it from a bundle"))
    if section.version is not None and not 1 <= len(section.version) <= 64:
        found.append(("rollout.version", "must have 1 to 64 characters"))
    if section.digest is not None and not _DIGEST.fullmatch(section.digest):
        found.append(("rollout.digest", "must be sha256: and 64 of 0-9 a-f, as `outstation model check` prints it"))
    kind, colon, whom = section.target.partition(":")
    if section.target != "all" and not (kind in ("group", "device") and colon and is_name(whom)):
        found.append(("rollout.to", f"{section.target!r} is none of: all, group:NAME, device:NAME"))
    return found


def _check_steps(content: _PlanSections) -> Sequence[tuple[str, str]]:
    found, steps = [], content.steps
    if not 1 <= len(steps) <= MAX_STEPS or steps[-1].strategy != "all":
        found.append(("steps", f'there must be 1 to {MAX_STEPS} [[steps]], the last one with strategy = "all"'))
    for i, step in enumerate(steps):
        if step.strategy == "all" and step.percent != 100:
            found.append((f"steps[{i}].percent", "all is all; for a part use strategy = canary"))
        if not any(getattr(_merge_promotion(content.promote, step), name) is not None for name in RULE_KEYS):
            problem = f"asks nothing of the answers; give one of {', '.join(RULE_KEYS)} here or in [promote]"
            found.append((f"steps[{i}]", problem))
        if i == 0:
            continue
        before = steps[i - 1]
        if _STRATEGY_ORDER.index(step.strategy) < _STRATEGY_ORDER.index(before.strategy):
            found.append((f"steps[{i}].strategy", f"{step.strategy} cannot come after {before.strategy}"))
        if step.strategy == before.strategy and step.percent <= before.percent:
            found.append((f"steps[{i}].percent", f"{step.percent:g} is no more than the step before has"))
    return found


def _decode_hook(kind: type, value: Any) -> Any:
    """Raises ValueError, which msgspec puts at its key."""
    if kind is not Deadline:
        raise ValueError(f"expected {kind.__name__}")
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'{value!r} is no moment; write one in UTC, as "2026-12-31T00:00:00Z"') from None
    return Deadline(clock.to_rfc3339(clock.parse_rfc3339(moment.astimezone(UTC).isoformat()))[:19] + "Z")
