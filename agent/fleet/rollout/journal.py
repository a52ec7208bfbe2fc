"""Roll-outs, decisions and desired state in the database; each function inside a transaction or snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from agent.errors import StorageError, UsageError
from agent.fleet.database.interface import Connection
from agent.fleet.rollout.decisions import Decision
from agent.fleet.rollout.desired_state import Published
from agent.fleet.rollout.plan import Plan, Step
from agent.toml_files import suggestion
from agent.wire.messages import digest

OPEN = ("running", "paused")
_COLUMNS = "rollout, task, bundle, version, digest, topic, started, state, step, plan"
_PUT = f"""
    INSERT INTO rollouts ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rollout) DO UPDATE SET
        task = excluded.task, bundle = excluded.bundle, version = excluded.version, digest = excluded.digest,
        topic = excluded.topic, started = excluded.started, state = excluded.state, step = excluded.step,
        plan = excluded.plan"""
_PUT_DESIRED = """
    INSERT INTO desired VALUES (?, ?, ?, ?) ON CONFLICT (topic) DO UPDATE SET
        counter = excluded.counter, payload = excluded.payload, jws = excluded.jws"""


class Rollout(msgspec.Struct, frozen=True):
    """A row of table rollouts. `step` counts from 1."""

    name: str
    plan: Plan
    topic: str
    started: str
    state: str
    step: int

    @property
    def now(self) -> Step:
        return self.plan.steps[self.step - 1]

    @property
    def following(self) -> Step | None:
        return self.plan.steps[self.step] if self.step < len(self.plan.steps) else None

    @property
    def open(self) -> bool:
        return self.state in OPEN


def rollouts(db: Connection, *, only_open: bool = False) -> list[Rollout]:
    """Oldest first."""
    found = [_rollout(row) for row in db.execute(f"SELECT {_COLUMNS} FROM rollouts ORDER BY started, rollout")]
    return [one for one in found if one.open or not only_open]


def find(db: Connection, name: str) -> Rollout:
    """Raises UsageError."""
    row = db.execute(f"SELECT {_COLUMNS} FROM rollouts WHERE rollout = ?", (name,)).fetchone()
    if row is None:
        known = [one for (one,) in db.execute("SELECT rollout FROM rollouts")]
        raise UsageError(f"there is no roll-out {name!r}{suggestion(name, known)}")
    return _rollout(row)


def put(db: Connection, rollout: Rollout) -> None:
    """Add it, or replace what is there of that name."""
    plan = rollout.plan
    what = (plan.task, plan.bundle, plan.version, plan.digest, rollout.topic, rollout.started)
    row = (rollout.name, *what, rollout.state, rollout.step, msgspec.json.encode(plan).decode())
    db.execute(_PUT, row)


def append(db: Connection, decision: Decision) -> None:
    db.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", decision.row())


def decided(db: Connection, rollout: str) -> list[tuple[Any, ...]]:
    """The rows of table decisions of one roll-out, in order."""
    return db.execute("SELECT * FROM decisions WHERE rollout = ? ORDER BY n", (rollout,)).fetchall()


def last(db: Connection, rollout: str) -> tuple[int, str]:
    """The number of the newest decision and the digest of its payload; 0 and "" before the first."""
    sql = "SELECT n, payload FROM decisions WHERE rollout = ? ORDER BY n DESC LIMIT 1"
    row = db.execute(sql, (rollout,)).fetchone()
    return (int(row[0]), digest(row[1])) if row else (0, "")


def began(db: Connection, rollout: str) -> str:
    """When the step it is at began."""
    sql = "SELECT time FROM decisions WHERE rollout = ? AND event IN ('started', 'promoted') ORDER BY n DESC LIMIT 1"
    row = db.execute(sql, (rollout,)).fetchone()
    if row is None:
        raise StorageError(f"table decisions: nothing says when roll-out {rollout} was started; restore the database")
    return str(row[0])


def ended(db: Connection, task: str, digest_of: str) -> list[tuple[Rollout, str]]:
    """Roll-outs of a bundle that were aborted, and when."""
    sql = """
        SELECT rollout, max(decisions.time) FROM rollouts JOIN decisions USING (rollout)
        WHERE task = ? AND digest = ? AND state = 'aborted' AND event = 'aborted' GROUP BY rollout"""
    return [(find(db, name), when) for name, when in db.execute(sql, (task, digest_of)).fetchall()]


def desired(db: Connection, topic: str) -> Published | None:
    row = db.execute("SELECT topic, counter, payload, jws FROM desired WHERE topic = ?", (topic,)).fetchone()
    return Published(*row) if row else None


def all_desired(db: Connection) -> Sequence[Published]:
    return [Published(*row) for row in db.execute("SELECT topic, counter, payload, jws FROM desired ORDER BY topic")]


def put_desired(db: Connection, row: Published) -> None:
    db.execute(_PUT_DESIRED, (row.topic, row.counter, row.payload, row.jws))


def _rollout(row: Sequence[Any]) -> Rollout:
    name, _task, _bundle, _version, _digest, topic, started, state, step, text = row
    try:
        plan = msgspec.json.decode(text, type=Plan)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise StorageError(
            f"table rollouts: the plan of {name!r} was altered ({error}); restore the database"
        ) from None
    if type(step) is not int or not 1 <= step <= len(plan.steps):
        raise StorageError(f"table rollouts: {name!r} has no step {step!r}; restore the database")
    return Rollout(name, plan, topic, started, state, step)
