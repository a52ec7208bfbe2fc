"""How a roll-out in a simulated fleet ended: who runs what and why, what was decided, and whose results count."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

# The last word of each device on the roll-out.
_LATEST_PHASE_SQL = """
    SELECT device, phase, reason, summary, strategy FROM (
        SELECT *, row_number() OVER (PARTITION BY device ORDER BY time DESC, seq DESC) AS nth
        FROM rollout_devices WHERE rollout = ?) WHERE nth = 1"""
# Which bundles' results each device published, and up to which message.
_SERVED_SQL = """
    SELECT device, json_extract(CAST(payload AS TEXT), '$.model.version'),
           json_extract(CAST(payload AS TEXT), '$.model.digest'), count(*), max(seq)
    FROM messages WHERE kind = 'results' AND topic LIKE '%/results/' || ? GROUP BY 1, 2, 3 ORDER BY 5"""
_ROLLOUT_SQL = "SELECT rollout, task, bundle, version, digest, state, step, plan FROM rollouts WHERE rollout = ?"
_DECISIONS_SQL = "SELECT n, time, event, summary FROM decisions WHERE rollout = ? ORDER BY n"
_PHASES_SQL = "SELECT device, phase, reason FROM rollout_devices WHERE rollout = ? ORDER BY time, seq"


class RolloutOutcome(msgspec.Struct, frozen=True):
    """`rollout` as the report has it; `devices`: what each adds to its entry there."""

    rollout: dict[str, Any]
    devices: dict[str, dict[str, Any]]


def read_outcome(database: Path, rollout: str) -> RolloutOutcome:
    with _open_read_only(database) as db:
        name, task, bundle, version, digest, state, step, plan = db.execute(_ROLLOUT_SQL, [rollout]).fetchone()
        served = db.execute(_SERVED_SQL, [task]).fetchall()
        decided = [
            dict(zip(("n", "time", "event", "summary"), row, strict=True)) for row in db.execute(_DECISIONS_SQL, [name])
        ]
        steps = json.loads(plan)["steps"]
        document = {
            "name": name,
            "bundle": bundle,
            "version": version,
            "digest": digest,
            "state": state,
            "step": step,
            "steps": len(steps),
            "strategy": steps[step - 1]["strategy"],
            "decisions": decided,
            # Of every device: messages with results of the new bundle.
            "served": sum(count for _, _, which, count, _ in served if which == digest),
        }
        return RolloutOutcome(document, _device_entries(db, name, served))


def read_status(database: Path, rollout: str) -> tuple[str, dict[str, str]]:
    """The roll-out's state, and the phase of each device that said one."""
    with _open_read_only(database) as db:
        state = db.execute("SELECT state FROM rollouts WHERE rollout = ?", [rollout]).fetchone()
        said = {device: phase for device, phase, *_ in db.execute(_LATEST_PHASE_SQL, [rollout])}
        return (state[0] if state else ""), said


def _device_entries(db: sqlite3.Connection, rollout: str, served: list[Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    # In the order of the messages: what a device served last is what it runs.
    for device, version, digest, count, _ in served:
        one = found.setdefault(device, {"served": {}})
        one["runs"] = {"version": version, "digest": digest}
        one["served"][version] = count
    for device, phase, reason, summary, strategy in db.execute(_LATEST_PHASE_SQL, [rollout]):
        told = {"phase": phase, "reason": reason, "why": summary, "strategy": strategy}
        found.setdefault(device, {"served": {}}).update(told)
    for device, phase, _ in db.execute(_PHASES_SQL, [rollout]):
        found[device].setdefault("phases", []).append(phase)
    return found


@contextlib.contextmanager
def _open_read_only(database: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=30)) as db:
        yield db
