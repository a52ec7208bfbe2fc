"""The devices of a roll-out: who it is for, and how far each one says that it came.

Only devices that may sign now count: what a stolen device says is no evidence. Whom a group has is in the configs of
its devices, so of a group only those are known that say something of the roll-out.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from agent.fleet.database import rollouts
from agent.fleet.database.interface import Connection
from agent.fleet.rollout.journal import Rollout

NOT_REPORTED = "not heard of"
# Reasons that are no failure of the bundle: it is for other devices, somebody decided so, or it is tried again.
_NON_FAILURE_REASONS = frozenset({"unfit", "operator", "aborted", "fetch", "held"})
_TRANSIENT_REASONS = frozenset({"fetch", "held"})
_FAILED_PHASES = frozenset({"refused", "rolled back"})


class RolloutDevice(msgspec.Struct, frozen=True):
    """A device that the roll-out is for. `phase`: what it said last, `not heard of` before it said anything."""

    device: str
    last_seen: str | None
    phase: str
    reason: str = ""
    summary: str = ""
    since: str | None = None
    strategy: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it refused the bundle, or took it back."""
        return self.phase in _FAILED_PHASES and self.reason not in _NON_FAILURE_REASONS

    @property
    def has_finished(self) -> bool:
        """Whether it came to an end, whichever."""
        ended = self.phase in ("settled", "refused", "rolled back", "withdrawn")
        return ended and not (self.phase == "refused" and self.reason in _TRANSIENT_REASONS)

    @property
    def is_unfit(self) -> bool:
        """Whether it says that the bundle is not for it."""
        return self.phase == "refused" and self.reason == "unfit"


class StepDevices(msgspec.Struct, frozen=True):
    """Of one step: `chosen` devices, those of them that `join` with it, and the `others`."""

    selected: list[RolloutDevice] = msgspec.field(default_factory=list)
    joining: frozenset[str] = frozenset()
    unselected: list[RolloutDevice] = msgspec.field(default_factory=list)

    @property
    def responding(self) -> list[RolloutDevice]:
        """Chosen devices that said something and are not left out."""
        return [one for one in self.selected if one.phase != NOT_REPORTED and not one.is_unfit]

    @property
    def failed(self) -> list[RolloutDevice]:
        return [one for one in self.selected if one.has_failed]

    def count_phases(self) -> dict[str, int]:
        """How many of the chosen are in each phase."""
        found: dict[str, int] = {}
        for one in self.selected:
            found[one.phase] = found.get(one.phase, 0) + 1
        return dict(sorted(found.items()))


def load_step_devices(db: Connection, rollout: Rollout) -> StepDevices:
    """Of the step that the roll-out is at."""
    plan = rollout.plan
    known = [
        RolloutDevice(device, seen, phase or NOT_REPORTED, reason or "", summary or "", since, strategy)
        for device, seen, phase, reason, summary, since, strategy in rollouts.load_devices(
            db, rollout.name, plan.task, plan.digest
        )
    ]
    kind, _, whom = plan.to.partition(":")
    meant = [one for one in known if _is_targeted(one, kind, whom)]
    wanted = plan.desired_for_step(rollout.step)
    chosen = [one for one in meant if wanted.includes_device(one.device)]
    there = _previous_selection(rollout)
    joining = frozenset(one.device for one in chosen if not there(one.device))
    return StepDevices(chosen, joining, [one for one in meant if not wanted.includes_device(one.device)])


def _is_targeted(device: RolloutDevice, kind: str, target_name: str) -> bool:
    if kind == "group":
        return device.phase != NOT_REPORTED
    return kind == "all" or device.device == target_name


def _previous_selection(rollout: Rollout) -> Callable[[str], bool]:
    """Whether a device was in this already at the step before: beside the old bundle, or instead of it."""
    steps = rollout.plan.steps
    here, before = rollout.step, rollout.step - 1
    if before < 1 or (steps[before - 1].strategy == "shadow") != (steps[here - 1].strategy == "shadow"):
        return lambda _: False
    return rollout.plan.desired_for_step(before).includes_device
