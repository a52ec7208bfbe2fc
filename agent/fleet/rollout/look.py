"""A roll-out as it stands: its devices, its tallies and what follows from them."""

from __future__ import annotations

import msgspec

from agent.fleet.database.interface import Connection
from agent.fleet.rollout import journal
from agent.fleet.rollout.devices import StepDevices, load_step_devices
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.promotion import StepVerdict, evaluate_step
from agent.fleet.rollout.tallies import RolloutTallies


class RolloutSnapshot(msgspec.Struct, frozen=True):
    """`began`: when the step it is at did."""

    rollout: Rollout
    devices: StepDevices
    tallies: RolloutTallies
    verdict: StepVerdict
    step_start: str


def load_snapshot(
    db: Connection, rollout: Rollout, now_us: int, tallies: RolloutTallies | None = None
) -> RolloutSnapshot:
    """Inside a snapshot; `tallies` of an earlier look are gone on with."""
    tallies = tallies or RolloutTallies(rollout)
    tallies.read_new(db)
    its, began = load_step_devices(db, rollout), journal.load_step_start(db, rollout.name)
    return RolloutSnapshot(rollout, its, tallies, evaluate_step(rollout, its, tallies, began, now_us), began)
