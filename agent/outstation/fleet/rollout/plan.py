"""Roll-out plan: the TOML file an operator writes, and the complete plan that is stored and signed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec

from outstation.foundation import clock
from outstation.foundation.config import toml_files
from outstation.foundation.config.toml_files import Section
from outstation.foundation.errors import ConfigError
from outstation.foundation.names import is_name
from outstation.protocol.wire import topics
from outstation.protocol.wire.desired_state import (
    CanaryRules,
    DesiredBundle,
    Digest,
    LimitsByOutput,
    Name,
    Share,
    StepStrategy,
    Strategy,
    Version,
)
from outstation.protocol.wire.times import Rfc3339Seconds

MAX_STEPS = 32
_STRATEGY_ORDER: tuple[StepStrategy, ...] = get_args(StepStrategy)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Limits on predictions. The other keys of a promotion say how much evidence is needed.
RULE_KEYS = ("min_agreement", "max_latency_ratio", "max_accuracy_drop", "max_error_growth")

Ratio = Annotated[float, msgspec.Meta(gt=0, le=1000)]
Growth = Annotated[float, msgspec.Meta(ge=0, le=1000)]
Percent = Annotated[float, msgspec.Meta(gt=0, le=100)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Hours = Annotated[float, msgspec.Meta(ge=0, le=8760)]


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Conditions for the end of a step. None disables a limit.

    `min_devices` must report `min_batches` each, and the step lasts at least `min_hours`. `min_agreement` bounds the
    lower end of its interval; `max_latency_ratio` (new time / old time), `max_accuracy_drop` and `max_error_growth`
    (as a share of the old error) bound the upper ends. They hold for each output of the models; `outputs` has other
    limits for some of the further ones. A larger share of failed devices aborts the roll-out.
    """

    min_devices: Count = 3
    min_batches: Count = 20
    min_hours: Hours = 1.0
    min_agreement: Share | None = None
    max_latency_ratio: Ratio | None = None
    max_accuracy_drop: Share | None = None
    max_error_growth: Growth | None = None
    max_failed_share: Share = 0.1
    outputs: LimitsByOutput = {}


class RolloutStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    strategy: StepStrategy
    percent: Percent
    promote: Promotion

    @property
    def label(self) -> str:
        return "all" if self.strategy == "all" else f"{self.strategy} {self.percent:g} %"


class RolloutPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A complete plan, each step with all of its rules, as stored in table rollouts.

    `target` is all, group:NAME or device:NAME. Devices judge the bundle by `device_rules`.
    """

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
        kind, _, name = self.target.partition(":")
        if kind == "group":
            return topics.Topic(fleet, topics.DEVICE_GROUP, "desired", name)
        return topics.Topic(fleet, topics.ALL_DEVICES if kind == "all" else name, "desired")

    def least_hours(self, batch_s: float) -> float:
        """Return how long the roll-out takes at least, with a batch each `batch_s` seconds.

        In the last step each device tries the bundle by its own rules.
        """
        rules: list[Promotion | CanaryRules] = [*(step.promote for step in self.steps), self.device_rules]
        *hours, last, on_device = (max(rule.min_hours, rule.min_batches * batch_s / 3600) for rule in rules)
        return sum(hours) + max(last, on_device)

    def desired_for_step(self, step: int) -> DesiredBundle:
        """Return the desired state at a step, counted from 1."""
        current = self.steps[step - 1]
        return self._build_desired(current.strategy, current.percent)

    def desired_after_abort(self) -> DesiredBundle:
        return self._build_desired("rollback", 100.0)

    def _build_desired(self, strategy: Strategy, percent: float) -> DesiredBundle:
        bundle = (self.name, self.bundle, self.version, self.digest)
        return DesiredBundle(*bundle, strategy, percent, self.deadline, self.device_rules)


class Deadline(str):
    """A UTC time with seconds precision, as in wire messages."""


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
    outputs: LimitsByOutput | None = None


class _StepSection(_PromotionSection, frozen=True, kw_only=True):
    strategy: StepStrategy
    percent: Percent = 100.0


class _PlanSections(Section, frozen=True):
    rollout: _RolloutSection
    steps: list[_StepSection]
    promote: _PromotionSection = _PromotionSection()
    device_rules: CanaryRules = CanaryRules()


class PlanFile:
    """A validated plan file: `name` and `task` of the roll-out, and an absolute `path` if it names the bundle's.

    Missing parts of the bundle are resolved by `bundles.resolve`.
    """

    def __init__(self, source: Path, content: _PlanSections) -> None:
        self.source, self._content = source, content
        section = content.rollout
        self.name, self.task = section.name, section.task
        self.bundle, self.version, self.digest = section.bundle, section.version, section.digest
        self.path = None if section.path is None else source.parent / section.path

    def to_plan(self, bundle: str, version: str, digest: str) -> RolloutPlan:
        content, section = self._content, self._content.rollout
        steps = [
            RolloutStep(step.strategy, step.percent, _merge_promotion(content.promote, step)) for step in content.steps
        ]
        deadline = None if section.deadline is None else str(section.deadline)
        target = (section.target, deadline, steps, content.device_rules)
        return RolloutPlan(section.name, section.task, bundle, version, digest, *target)

    def config_error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(str(self.source), key, problem)


def read(source: Path) -> PlanFile:
    """Read and validate a plan file. Raises ConfigError with file, key and fix."""
    content = toml_files.read(
        source, _PlanSections, hook=_decode_hook, missing="PLAN is a TOML file, see docs/guides/rollouts.md"
    )
    file = PlanFile(source, content)
    for key, problem in (*_check_rollout_section(content.rollout), *_check_steps(content)):
        raise file.config_error(key, problem)
    return file


def _merge_promotion(defaults: _PromotionSection, step: _PromotionSection) -> Promotion:
    values = {
        name: getattr(defaults, name) if (value := getattr(step, name)) is None else value
        for name in Promotion.__struct_fields__
    }
    return Promotion(**{name: value for name, value in values.items() if value is not None})


def _check_rollout_section(section: _RolloutSection) -> Iterator[tuple[str, str]]:
    """Yield (key, problem)."""
    for key in ("name", "task", "bundle"):
        value = getattr(section, key)
        if value is not None and not is_name(value):
            yield f"rollout.{key}", f"{value!r} must be 1-64 of a-z 0-9 . _ - , first a letter or digit"
    if section.path is None and section.bundle is None:
        yield "rollout.bundle", "is missing: give the bundle's name, or path to read it from a bundle"
    if section.path is None and section.version is None:
        yield "rollout.version", "is missing: give the bundle's version, or path to read it from a bundle"
    if section.version is not None and not 1 <= len(section.version) <= 64:
        yield "rollout.version", "must have 1 to 64 characters"
    if section.digest is not None and not _DIGEST.fullmatch(section.digest):
        yield "rollout.digest", "must be sha256: and 64 of 0-9 a-f, as `outstation model check` prints it"
    kind, colon, name = section.target.partition(":")
    if section.target != "all" and not (kind in ("group", "device") and colon and is_name(name)):
        yield "rollout.target", f"{section.target!r} is none of: all, group:NAME, device:NAME"


def _check_steps(content: _PlanSections) -> Iterator[tuple[str, str]]:
    """Yield (key, problem)."""
    steps = content.steps
    if not 1 <= len(steps) <= MAX_STEPS or steps[-1].strategy != "all":
        yield "steps", f'there must be 1 to {MAX_STEPS} [[steps]], the last one with strategy = "all"'
    for i, step in enumerate(steps):
        if step.strategy == "all" and step.percent != 100:
            yield f"steps[{i}].percent", "must be 100 with strategy all; for a part use strategy = canary"
        promotion = _merge_promotion(content.promote, step)
        if all(getattr(promotion, key) is None for key in RULE_KEYS):
            keys = ", ".join(RULE_KEYS)
            yield f"steps[{i}]", f"has no limit on predictions; give one of {keys} here or in [promote]"
        if i == 0:
            continue
        previous = steps[i - 1]
        if _STRATEGY_ORDER.index(step.strategy) < _STRATEGY_ORDER.index(previous.strategy):
            yield f"steps[{i}].strategy", f"{step.strategy} cannot come after {previous.strategy}"
        if step.strategy == previous.strategy and step.percent <= previous.percent:
            yield f"steps[{i}].percent", f"{step.percent:g} is no more than the previous step has"


def _decode_hook(kind: type, value: Any) -> Any:
    """Decode a Deadline. Raises ValueError, which msgspec reports with its key."""
    if kind is not Deadline:
        raise ValueError(f"expected {kind.__name__}")
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f'{value!r} is not a time; write one in UTC, as "2026-12-31T00:00:00Z"') from None
    return Deadline(clock.to_rfc3339(clock.parse_rfc3339(moment.astimezone(UTC).isoformat()))[:19] + "Z")
