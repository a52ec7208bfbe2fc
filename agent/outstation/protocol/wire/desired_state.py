"""Desired state: the bundle that each task should run, and how devices get there. Shared by devices and the fleet.

Membership in a step depends on the roll-out and the device only. A device that was offline for weeks joins at the
current step, and a larger percentage always includes the devices of a smaller one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from outstation.protocol.wire.times import Rfc3339Seconds

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Version = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
# Devices reject a larger message unread.
MAX_DESIRED_BYTES = 65_536
# Roles of keys that may sign it, as in `outstation.protocol.wire.trust`.
DESIRED_STATE_ROLES = frozenset({"operator", "deployer"})

# Strategies of a plan's steps, in the only order in which they may follow each other.
StepStrategy = Literal["shadow", "canary", "all"]
Strategy = Literal["shadow", "canary", "all", "rollback"]
# State of a roll-out on one device. Only `canary` and `active` publish the new bundle's results.
Phase = Literal["not_selected", "downloading", "rejected", "shadow", "canary", "active", "rolled_back", "cancelled"]


class OutputLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits of one further output of the models. None means that of the first output.

    `ignore`: nothing about this output decides.
    """

    min_agreement: Share | None = None
    max_accuracy_drop: Share | None = None
    max_error_growth: Annotated[float, msgspec.Meta(ge=0)] | None = None
    ignore: bool = False


LimitsByOutput = Annotated[dict[Name, OutputLimits], msgspec.Meta(max_length=16)]


class CanaryRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Limits at which a device rolls a bundle back on its own. None disables a limit.

    A canary phase lasts for at least `min_batches` and `min_hours`. From `min_batches` on, limits are compared with
    95 % intervals: the bundle is rolled back if the whole interval violates a limit.
    """

    min_batches: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 20
    min_hours: Annotated[float, msgspec.Meta(ge=0, le=8760)] = 1.0
    # Share of windows for which both bundles give the same answer.
    min_agreement: Share | None = None
    # Inference time of a window, divided by that of the previous bundle.
    max_latency_ratio: Annotated[float, msgspec.Meta(gt=0)] | None = None
    # Inference time of one batch; a longer one counts as a hang.
    batch_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 30.0
    # Share of batches that fail.
    max_error_rate: Share = 0.0
    # Accuracy, estimated or from labels, below that of the previous bundle.
    max_accuracy_drop: Share | None = 0.05
    # Growth of the mean absolute error, as a share of the previous bundle's.
    max_error_growth: Annotated[float, msgspec.Meta(ge=0)] | None = 0.1
    # Roll back on an open drift alert of the bundle's predictions or scores.
    output_drift: bool = True
    # A bundle that was rolled back is not tried again for this long.
    hold_off_hours: Annotated[float, msgspec.Meta(ge=0, le=8760)] = 24.0
    # Limits of further outputs where they differ from those of the first output.
    outputs: LimitsByOutput = {}


class DesiredBundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The bundle that a roll-out brings to a task, and the current step of the roll-out.

    - shadow: the bundle runs next to the active one, and none of its results are published
    - canary: the bundle runs on the selected devices, with the previous bundle as its shadow
    - all: the same on every device
    - rollback: devices that run or try the bundle return to the previous one
    """

    rollout: Name
    bundle: Name
    version: Version
    digest: Digest
    strategy: Strategy
    # Share of the devices that the step selects.
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 100.0
    # Devices that are not done by then report that they are late.
    deadline: Rfc3339Seconds | None = None
    rules: CanaryRules = CanaryRules()

    def includes_device(self, device: str) -> bool:
        """Return True if the step selects `device`."""
        return rollout_bucket(self.rollout, device) * 100 < self.percent


def rollout_bucket(rollout: str, device: str) -> float:
    """Return the rank of `device` in [0, 1). It never changes for a roll-out, and differs between roll-outs."""
    return int.from_bytes(hashlib.sha256(f"{rollout}/{device}".encode()).digest()[:8]) / 2**64
