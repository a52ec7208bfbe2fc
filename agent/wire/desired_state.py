"""Desired state: which bundle a task should run, and how devices come to it. What both ends must agree on.

Who a step is for follows from the roll-out and the device alone, so that a device that was away for weeks joins at the
step it finds, and a greater share always holds the devices of a smaller one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Version = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Rfc3339Seconds = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")]
# A desired message is looked at up to this size, no more.
MAX_DESIRED_BYTES = 65_536


class CanaryRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """When a device takes a bundle back by itself, while it is on probation; None: not asked.

    `batches` and `hours` are the least that probation takes. Judged are intervals, from `batches` on: a bundle goes
    back where the whole interval is on the bad side, and stays where it is not.
    """

    batches: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 20
    hours: Annotated[float, msgspec.Meta(ge=0, le=8760)] = 1.0
    # Share of windows whose answer is that of the bundle before.
    agreement: Share | None = None
    # Time in the model a window, as a multiple of the bundle before.
    slower: Annotated[float, msgspec.Meta(gt=0)] | None = None
    # Seconds that one batch may take in the model; more is taken for a hang.
    batch_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 30.0
    # Share of batches that may fail.
    errors: Share = 0.0
    # Accuracy, estimated or by labels, below that of the bundle before.
    accuracy_drop: Share | None = 0.05
    # The same of the absolute error of values, as a share of the bundle before's.
    error_growth: Annotated[float, msgspec.Meta(ge=0)] | None = 0.1
    # Whether an open drift alert of the bundle's answers or scores is a reason.
    output_drift: bool = True
    # So long a bundle that was taken back is not tried again, whatever is desired.
    hold_hours: Annotated[float, msgspec.Meta(ge=0, le=8760)] = 24.0


class DesiredBundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The bundle a task should come to by a roll-out, and the step this is at.

    shadow: answers beside the one that runs, publishes none of its results. canary: runs on these devices, on
    probation, the bundle before beside it. all: the same on every device. back: who runs it or tries it leaves it, for
    what ran before. `percent` of the devices take part.
    """

    rollout: Name
    bundle: Name
    version: Version
    digest: Digest
    strategy: Literal["shadow", "canary", "all", "back"]
    percent: Annotated[float, msgspec.Meta(ge=0, le=100)] = 100.0
    # When devices should have got there; later, they say that they are late.
    deadline: Rfc3339Seconds | None = None
    rules: CanaryRules = CanaryRules()

    def includes_device(self, device: str) -> bool:
        """Whether the step is for `device`."""
        return rollout_bucket(self.rollout, device) * 100 < self.percent


def rollout_bucket(rollout: str, device: str) -> float:
    """Where `device` stands among all, in [0, 1): the same for ever, in another order for each roll-out."""
    return int.from_bytes(hashlib.sha256(f"{rollout}/{device}".encode()).digest()[:8]) / 2**64
