"""A roll-out as `fleet rollout status --json` tells it."""

from __future__ import annotations

from typing import Any

from agent import clock
from agent.fleet.database.interface import Connection
from agent.fleet.rollout import journal
from agent.fleet.rollout.devices import NOT_HEARD_OF, Member
from agent.fleet.rollout.look import Look


def document(db: Connection, seen: Look, now_us: int) -> dict[str, Any]:
    """Inside the snapshot that `seen` is of."""
    rollout, plan, its, verdict = seen.rollout, seen.rollout.plan, seen.members, seen.verdict
    what = {name: getattr(plan, name) for name in ("task", "bundle", "version", "digest", "to", "deadline")}
    late = plan.deadline is not None and rollout.open and clock.epoch_us(plan.deadline) < now_us
    decided = [
        {"n": n, "time": time, "event": event, "summary": summary}
        for _, n, time, event, summary, *_ in journal.decided(db, rollout.name)
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
        "began": seen.began,
        "chosen": len(its.chosen),
        "others": len(its.others),
        "phases": its.phases(),
        "devices": [_device(one) for one in its.chosen],
        "not_heard_of": [one.device for one in its.chosen if one.phase == NOT_HEARD_OF],
        "failed": [one.device for one in its.failed],
        "refused": [one.device for one in its.chosen if one.phase in ("refused", "rolled back")],
        "reporting": verdict.reporting,
        "needed": verdict.needed,
        "findings": [finding.document() for finding in verdict.findings],
        "waits": verdict.waits if rollout.open else [],
        "answer": verdict.answer if rollout.open else None,
        "unbelievable": [
            {"device": name, "messages": one.unbelievable, "why": one.why}
            for name, one in sorted(seen.tallies.devices.items())
            if one.unbelievable
        ],
        "decisions": decided,
    }


def _device(one: Member) -> dict[str, Any]:
    names = ("device", "phase", "reason", "summary", "since", "last_seen")
    return {name: getattr(one, name) for name in names}
