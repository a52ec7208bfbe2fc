"""Roll-outs, decisions and desired state in the fleet database; every function needs a transaction or snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout import decisions
from outstation.fleet.rollout.desired_state import DesiredMessage
from outstation.fleet.rollout.plan import RolloutPlan, RolloutStep
from outstation.foundation import decoders
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import StorageError, UsageError

OPEN_STATES = ("running", "paused")


class Rollout(msgspec.Struct, frozen=True):
    """A row of table rollouts. `step` counts from 1."""

    name: str
    plan: RolloutPlan
    topic: str
    started: str
    state: str
    step: int

    @property
    def current_step(self) -> RolloutStep:
        return self.plan.steps[self.step - 1]

    @property
    def next_step(self) -> RolloutStep | None:
        return self.plan.steps[self.step] if self.step < len(self.plan.steps) else None

    @property
    def is_open(self) -> bool:
        return self.state in OPEN_STATES


def load_rollouts(db: Connection, *, only_open: bool = False) -> list[Rollout]:
    """Load roll-outs, oldest first."""
    loaded = [_rollout_from_row(row) for row in rollouts.load_rollouts(db)]
    return [rollout for rollout in loaded if rollout.is_open or not only_open]


def find(db: Connection, name: str) -> Rollout:
    row = rollouts.find_rollout(db, name)
    if row is None:
        known = [str(started) for started, *_ in rollouts.load_rollouts(db)]
        raise UsageError(f"there is no roll-out {name!r}{did_you_mean(name, known, 'none was started yet')}")
    return _rollout_from_row(row)


def save(db: Connection, rollout: Rollout) -> None:
    plan = rollout.plan
    bundle = (plan.task, plan.bundle, plan.version, plan.digest, rollout.topic, rollout.started)
    row = (rollout.name, *bundle, rollout.state, rollout.step, msgspec.json.encode(plan).decode())
    rollouts.save_rollout(db, row)


def find_next_place(db: Connection, rollout: str) -> tuple[int, str]:
    """Return number and `prev` of a roll-out's next decision."""
    return decisions.KIND.find_next_place(rollouts.load_last_decision(db, rollout))


def load_step_start(db: Connection, rollout: str) -> str:
    """Load the RFC 3339 time at which the current step began."""
    start = rollouts.load_step_start(db, rollout)
    if start is None:
        raise StorageError(f"table decisions: the start of roll-out {rollout} is missing; restore the database")
    return start


def find_aborted(db: Connection, task: str, bundle_digest: str) -> list[tuple[Rollout, str]]:
    """Find the aborted roll-outs of a bundle, each with the time of its abort."""
    return [(find(db, name), when) for name, when in rollouts.load_aborted(db, task, bundle_digest)]


def load_desired(db: Connection, topic: str) -> DesiredMessage | None:
    rows = rollouts.load_desired(db, topic)
    return DesiredMessage(*rows[0]) if rows else None


def load_all_desired(db: Connection) -> Sequence[DesiredMessage]:
    return [DesiredMessage(*row) for row in rollouts.load_desired(db)]


def _rollout_from_row(row: Sequence[Any]) -> Rollout:
    name, _task, _bundle, _version, _digest, topic, started, state, step, text = row
    try:
        plan = decoders.from_json(text, RolloutPlan)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise StorageError(f"table rollouts: plan of {name!r} was altered ({error}); restore the database") from None
    if type(step) is not int or not 1 <= step <= len(plan.steps):
        raise StorageError(f"table rollouts: {name!r} has no step {step!r}; restore the database")
    return Rollout(name, plan, topic, started, state, step)
