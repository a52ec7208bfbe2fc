"""Roll-out status: devices, tallies and verdict at one moment, and the document of `fleet rollout status --json`."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import asdict

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout import journal
from outstation.fleet.rollout.devices import NOT_REPORTED, StepDevices, load_step_devices
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.promotion import StepVerdict, evaluate_step
from outstation.fleet.rollout.tallies import RolloutTallies
from outstation.foundation import clock

_DEVICE_MEMBERS = ("device", "phase", "reason", "summary", "since", "last_seen")


class RolloutSnapshot(msgspec.Struct, frozen=True):
    """State of a roll-out. `step_start` is the RFC 3339 time at which the current step began."""

    rollout: Rollout
    devices: StepDevices
    tallies: RolloutTallies
    verdict: StepVerdict
    step_start: str


def load_snapshot(
    db: Connection, rollout: Rollout, now_us: int, tallies: RolloutTallies | None = None
) -> RolloutSnapshot:
    """Load the state of `rollout` inside a database snapshot. `tallies` of an earlier load are updated in place."""
    tallies = tallies or RolloutTallies(rollout)
    tallies.read_new(db)
    devices, step_start = load_step_devices(db, rollout), journal.load_step_start(db, rollout.name)
    verdict = evaluate_step(rollout, devices, tallies, step_start, now_us)
    return RolloutSnapshot(rollout, devices, tallies, verdict, step_start)


def build_status(db: Connection, snapshot: RolloutSnapshot, now_us: int) -> dict[str, Any]:
    """Build the status document, inside the database snapshot that `snapshot` was loaded in."""
    rollout, plan, verdict = snapshot.rollout, snapshot.rollout.plan, snapshot.verdict
    selected = snapshot.devices.selected
    is_late = plan.deadline is not None and rollout.is_open and clock.parse_rfc3339(plan.deadline) < now_us
    return {
        "rollout": rollout.name,
        **{name: getattr(plan, name) for name in ("task", "bundle", "version", "digest", "target", "deadline")},
        "topic": rollout.topic,
        "state": rollout.state,
        "started": rollout.started,
        "late": is_late,
        "step": rollout.step,
        "steps": [{"strategy": step.strategy, "percent": step.percent} for step in plan.steps],
        "step_started": snapshot.step_start,
        "selected": len(selected),
        "unselected": len(snapshot.devices.unselected),
        "phases": snapshot.devices.count_phases(),
        "devices": [{name: getattr(device, name) for name in _DEVICE_MEMBERS} for device in selected],
        "not_reported": [device.device for device in selected if device.phase == NOT_REPORTED],
        "failed": [device.device for device in snapshot.devices.failed],
        "rejected": [device.device for device in selected if device.phase in ("rejected", "rolled_back")],
        "reporting": verdict.reporting,
        "needed": verdict.needed,
        "rules": [asdict(result) for result in verdict.rule_results],
        "blockers": verdict.blockers if rollout.is_open else [],
        "outcome": verdict.outcome if rollout.is_open else None,
        "implausible": [
            {"device": name, "messages": tallies.implausible_count, "reason": tallies.implausible_reason}
            for name, tallies in sorted(snapshot.tallies.devices.items())
            if tallies.implausible_count
        ],
        "decisions": [
            {"n": n, "time": time, "event": event, "summary": summary}
            for _, n, time, event, summary, *_ in rollouts.load_decisions(db, rollout.name)
        ],
    }
