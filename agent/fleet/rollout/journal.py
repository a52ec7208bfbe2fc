"""Roll-outs, decisions and desired state in the fleet database. Call every function inside a transaction or snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.errors import StorageError, UsageError
from agent.fleet.database.interface import Connection
from agent.fleet.rollout.decisions import SignedDecision
from agent.fleet.rollout.desired_state import DesiredMessage
from agent.fleet.rollout.plan import RolloutPlan, RolloutStep
from agent.toml_files import did_you_mean
from agent.wire.messages import digest

OPEN_STATES = ("running", "paused")
_COLUMNS = "rollout, task, bundle, version, digest, topic, started, state, step, plan"
_UPSERT_ROLLOUT = f"""
    INSERT INTO rollouts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rollout) DO UPDATE SET
        task = excluded.task, bundle = excluded.bundle, version = excluded.version, digest = excluded.digest,
        topic = excluded.topic, started = excluded.started, state = excluded.state, step = excluded.step,
        plan = excluded.plan"""
_UPSERT_DESIRED = """
    INSERT INTO desired VALUES (?, ?, ?, ?) ON CONFLICT (topic) DO UPDATE SET
        counter = excluded.counter, payload = excluded.payload, jws = excluded.jws"""


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
    rows = db.execute(f"SELECT {_COLUMNS} FROM rollouts ORDER BY started, rollout")
    rollouts = [_rollout_from_row(row) for row in rows]
    return [rollout for rollout in rollouts if rollout.is_open or not only_open]


def find(db: Connection, name: str) -> Rollout:
    """Load the roll-out `name`. Raises UsageError if there is none."""
    row = db.execute(f"SELECT {_COLUMNS} FROM rollouts WHERE rollout = ?", (name,)).fetchone()
    if row is None:
        known = [rollout for (rollout,) in db.execute("SELECT rollout FROM rollouts")]
        raise UsageError(f"there is no roll-out {name!r}{did_you_mean(name, known)}")
    return _rollout_from_row(row)


def save(db: Connection, rollout: Rollout) -> None:
    """Insert or replace a roll-out."""
    plan = rollout.plan
    bundle = (plan.task, plan.bundle, plan.version, plan.digest, rollout.topic, rollout.started)
    row = (rollout.name, *bundle, rollout.state, rollout.step, msgspec.json.encode(plan).decode())
    db.execute(_UPSERT_ROLLOUT, row)


def append(db: Connection, decision: SignedDecision) -> None:
    db.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", decision.to_row())


def load_decision_rows(db: Connection, rollout: str) -> list[tuple[Any, ...]]:
    """Load the rows of table decisions of one roll-out, in order."""
    return db.execute("SELECT * FROM decisions WHERE rollout = ? ORDER BY n", (rollout,)).fetchall()


def load_chain_head(db: Connection, rollout: str) -> tuple[int, str]:
    """Load the number of the newest decision and the digest of its payload; 0 and "" before the first."""
    sql = "SELECT n, payload FROM decisions WHERE rollout = ? ORDER BY n DESC LIMIT 1"
    row = db.execute(sql, (rollout,)).fetchone()
    return (int(row[0]), digest(row[1])) if row else (0, "")


def load_step_start(db: Connection, rollout: str) -> str:
    """Load the RFC 3339 time at which the current step began."""
    sql = "SELECT time FROM decisions WHERE rollout = ? AND event IN ('started', 'promoted') ORDER BY n DESC LIMIT 1"
    row = db.execute(sql, (rollout,)).fetchone()
    if row is None:
        raise StorageError(f"table decisions: the start of roll-out {rollout} is missing; restore the database")
    return str(row[0])


def find_aborted(db: Connection, task: str, bundle_digest: str) -> list[tuple[Rollout, str]]:
    """Find the aborted roll-outs of a bundle, each with the time of its abort."""
    sql = """
        SELECT rollout, max(decisions.time) FROM rollouts JOIN decisions USING (rollout)
        WHERE task = ? AND digest = ? AND state = 'aborted' AND event = 'aborted' GROUP BY rollout"""
    return [(find(db, name), when) for name, when in db.execute(sql, (task, bundle_digest)).fetchall()]


def load_desired(db: Connection, topic: str) -> DesiredMessage | None:
    row = db.execute("SELECT topic, counter, payload, jws FROM desired WHERE topic = ?", (topic,)).fetchone()
    return DesiredMessage(*row) if row else None


def load_all_desired(db: Connection) -> Sequence[DesiredMessage]:
    return [
        DesiredMessage(*row) for row in db.execute("SELECT topic, counter, payload, jws FROM desired ORDER BY topic")
    ]


def save_desired(db: Connection, row: DesiredMessage) -> None:
    db.execute(_UPSERT_DESIRED, (row.topic, row.counter, row.payload, row.jws))


def _rollout_from_row(row: Sequence[Any]) -> Rollout:
    name, _task, _bundle, _version, _digest, topic, started, state, step, text = row
    try:
        plan = msgspec.json.decode(text, type=RolloutPlan)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise StorageError(
            f"table rollouts: the plan of {name!r} was altered ({error}); restore the database"
        ) from None
    if type(step) is not int or not 1 <= step <= len(plan.steps):
        raise StorageError(f"table rollouts: {name!r} has no step {step!r}; restore the database")
    return Rollout(name, plan, topic, started, state, step)
