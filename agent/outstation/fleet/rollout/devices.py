"""Devices of a roll-out: which ones it is for, and the phase that each one reported.

Only devices with a valid key count, so a revoked device is no evidence. Group membership is in the devices' own config,
so of a group only the devices that report on the roll-out are known.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout.journal import Rollout

NOT_REPORTED = "not_reported"
# Reasons that are no failure of the bundle: it is for other devices, an operator decided so, or the device will retry.
_NON_FAILURE_REASONS = frozenset({"incompatible", "operator", "aborted", "download_failed", "hold_off"})
_TRANSIENT_REASONS = frozenset({"download_failed", "hold_off"})
_FAILED_PHASES = frozenset({"rejected", "rolled_back"})


class RolloutDevice(msgspec.Struct, frozen=True):
    """A device that the roll-out is for. `phase` is its last report, or NOT_REPORTED."""

    device: str
    last_seen: str | None
    phase: str
    reason: str = ""
    summary: str = ""
    since: str | None = None
    strategy: str | None = None

    @property
    def has_failed(self) -> bool:
        """True if it rejected the bundle or rolled it back for a fault of the bundle."""
        return self.phase in _FAILED_PHASES and self.reason not in _NON_FAILURE_REASONS

    @property
    def is_done(self) -> bool:
        """True if the device will not change its phase by itself."""
        is_final = self.phase in ("active", "rejected", "rolled_back", "cancelled")
        return is_final and not (self.phase == "rejected" and self.reason in _TRANSIENT_REASONS)

    @property
    def is_incompatible(self) -> bool:
        return self.phase == "rejected" and self.reason == "incompatible"


class StepDevices(msgspec.Struct, frozen=True):
    """Devices of one step: `selected` ones, those of them that are `joining` with it, and `unselected` ones."""

    selected: list[RolloutDevice] = msgspec.field(default_factory=list)
    joining: frozenset[str] = frozenset()
    unselected: list[RolloutDevice] = msgspec.field(default_factory=list)

    @property
    def responding(self) -> list[RolloutDevice]:
        """Selected devices that reported a phase, without incompatible ones."""
        return [device for device in self.selected if device.phase != NOT_REPORTED and not device.is_incompatible]

    @property
    def failed(self) -> list[RolloutDevice]:
        return [device for device in self.selected if device.has_failed]

    def count_phases(self) -> dict[str, int]:
        return dict(sorted(Counter(device.phase for device in self.selected).items()))


def load_step_devices(db: Connection, rollout: Rollout) -> StepDevices:
    plan = rollout.plan
    known = [
        RolloutDevice(device, last_seen, phase or NOT_REPORTED, reason or "", summary or "", since, strategy)
        for device, last_seen, phase, reason, summary, since, strategy in rollouts.load_devices(
            db, rollout.name, plan.task, plan.digest
        )
    ]
    kind, _, target = plan.target.partition(":")
    if kind == "group":
        targeted = [device for device in known if device.phase != NOT_REPORTED]
    else:
        targeted = [device for device in known if kind == "all" or device.device == target]
    desired = plan.desired_for_step(rollout.step)
    selected = [device for device in targeted if desired.includes_device(device.device)]
    # Devices of the previous step had the bundle already, unless in another role.
    previous, is_shadow = rollout.step - 1, rollout.current_step.strategy == "shadow"
    is_same_role = previous >= 1 and (plan.steps[previous - 1].strategy == "shadow") == is_shadow
    before = plan.desired_for_step(previous) if is_same_role else None
    joining = frozenset(
        device.device for device in selected if before is None or not before.includes_device(device.device)
    )
    unselected = [device for device in targeted if not desired.includes_device(device.device)]
    return StepDevices(selected, joining, unselected)
