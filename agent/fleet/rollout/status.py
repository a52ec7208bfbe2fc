"""A roll-out as `fleet rollout status --json` tells it."""

from __future__ import annotations

from typing import Any

from agent import clock
from agent.fleet.database.interface import Connection
from agent.fleet.rollout import journal
from agent.fleet.rollout.devices import NOT_REPORTED, RolloutDevice
from agent.fleet.rollout.look import RolloutSnapshot


def build_status(db: Connection, snapshot: RolloutSnapshot, now_us: int) -> dict[str, Any]:
    """Inside the snapshot that `seen` is of."""
    rollout, plan, its, verdict = snapshot.rollout, snapshot.rollout.plan, snapshot.devices, snapshot.verdict
    what = {name: getattr(plan, name) for name in ("task", "bundle", "version", "digest", "to", "deadline")}
    late = plan.deadline is not None and rollout.is_open and clock.parse_rfc3339(plan.deadline) < now_us
    decided = [
        {"n": n, "time": time, "event": event, "summary": summary}
        for _, n, time, event, summary, *_ in journal.load_decision_rows(db, rollout.name)
    ]
    return {
        "rollout": rollout.name,
        **what,
        "topic": rollout.topic,
        "state": rollout.state,
        "started": rollout.started,
        "late": late,
        "step": rollout.step,
        "steps": [{"strategy": step.strategy, "percent": step.percent} for step in plan.steps],
        "began": snapshot.step_start,
        "chosen": len(its.selected),
        "others": len(its.unselected),
        "phases": its.count_phases(),
        "devices": [_device_to_dict(one) for one in its.selected],
        "not_heard_of": [one.device for one in its.selected if one.phase == NOT_REPORTED],
        "failed": [one.device for one in its.failed],
        "refused": [one.device for one in its.selected if one.phase in ("refused", "rolled back")],
        "reporting": verdict.reporting,
        "needed": verdict.needed,
        "findings": [finding.to_dict() for finding in verdict.rule_results],
        "waits": verdict.blockers if rollout.is_open else [],
        "answer": verdict.outcome if rollout.is_open else None,
        "unbelievable": [
            {"device": name, "messages": one.implausible_count, "why": one.implausible_reason}
            for name, one in sorted(snapshot.tallies.devices.items())
            if one.implausible_count
        ],
        "decisions": decided,
    }


def _device_to_dict(device: RolloutDevice) -> dict[str, Any]:
    names = ("device", "phase", "reason", "summary", "since", "last_seen")
    return {name: getattr(device, name) for name in names}
