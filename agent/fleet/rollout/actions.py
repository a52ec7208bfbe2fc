"""What can be decided about a roll-out. Each act is one transaction: decision, state and desired state, or nothing.

An act that changes what is desired is given a counter that its key never used. What was decided is published after the
transaction; a crash in between is mended by whoever publishes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from agent import clock
from agent.errors import UsageError
from agent.fleet.database.interface import Connection
from agent.fleet.database.rollouts import list_active_devices
from agent.fleet.rollout import decisions, journal
from agent.fleet.rollout import desired_state as wishes
from agent.fleet.rollout.decisions import Event
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.plan import RolloutPlan
from agent.fleet.rollout.promotion import StepVerdict
from agent.wire import topics
from agent.wire.desired_state import DesiredBundle
from agent.wire.keys import SigningKey
from agent.wire.messages import digest

MAX_REASON_LENGTH = 500


class RolloutOperator(msgspec.Struct, frozen=True):
    """Who decides, now. `by`: "operator" or "follow", which acts by the plan's rules alone."""

    key: SigningKey
    fleet: str
    now_us: int
    role: str = "operator"

    @property
    def timestamp(self) -> str:
        return clock.to_rfc3339(self.now_us)


def start(
    db: Connection, operator: RolloutOperator, counter: int, plan: RolloutPlan, force_reason: str | None = None
) -> Rollout:
    """Raises UsageError where it must not begin; `forced` says why a bundle that was aborted is tried again."""
    topic = plan.desired_topic(operator.fleet)
    _require_new(db, plan, str(topic))
    _require_reachable(db, plan)
    if plan.deadline is not None and clock.parse_rfc3339(plan.deadline) <= operator.now_us:
        raise UsageError(f"roll-out {plan.name}: its deadline {plan.deadline} is over; set a later one")
    if force_reason is None:
        _require_not_held(db, operator, plan)
    rollout = Rollout(plan.name, plan, str(topic), operator.timestamp, "running", 1)
    whom = {"all": "all devices"}.get(plan.to, plan.to.replace(":", " "))
    summary = (
        f"{plan.task}: {plan.bundle} {plan.version} for {whom} begins with {rollout.current_step.label}, "
        f"then {', '.join(step.label for step in plan.steps[1:]) or 'nothing'}."
    )
    if force_reason is not None:
        summary += f" Although it was aborted before: {_normalize_reason(force_reason)}"
    evidence = {"plan": msgspec.to_builtins(plan), "forced": force_reason}
    _record_decision(db, operator, rollout, "started", summary, evidence, counter, plan.desired_for_step(1))
    return rollout


def promote(
    db: Connection,
    operator: RolloutOperator,
    counter: int,
    expected: Rollout,
    verdict: StepVerdict,
    force_reason: str | None = None,
) -> Rollout:
    """To the following step, or to its end from the last one. Raises UsageError where findings are open."""
    now = _require_unchanged(db, expected)
    if not now.is_open:
        raise UsageError(f"roll-out {now.name} is {now.state}; there is nothing to promote")
    if verdict.outcome not in ("promote", "finish") and force_reason is None:
        why = "; ".join(verdict.blockers) or verdict.summary
        raise UsageError(
            f"roll-out {now.name} is not promoted from {now.current_step.label}: {why}; --force REASON does so"
        )
    following = now.next_step
    there = following.label if following else "finished"
    summary = f"{now.current_step.label} → {there}: {verdict.summary}."
    if force_reason is not None:
        summary += f" Promoted by hand: {_normalize_reason(force_reason)} It waited for: {'; '.join(verdict.blockers) or 'nothing'}."
    evidence = {**verdict.to_evidence(), "waits": verdict.blockers, "forced": force_reason}
    if following is None:
        done = replace(now, state="finished")
        _record_decision(db, operator, done, "finished", summary, evidence)
        return done
    done = replace(now, state="running", step=now.step + 1)
    _record_decision(db, operator, done, "promoted", summary, evidence, counter, now.plan.desired_for_step(done.step))
    return done


def pause(db: Connection, operator: RolloutOperator, expected: Rollout) -> Rollout:
    """Nothing is promoted until it is resumed; what is bad is still aborted."""
    now = _require_unchanged(db, expected)
    if now.state != "running":
        raise UsageError(f"roll-out {now.name} is {now.state}; only a running one can be paused")
    done = replace(now, state="paused")
    _record_decision(db, operator, done, "paused", f"Paused at {now.current_step.label}: devices stay as they are.", {})
    return done


def resume(db: Connection, operator: RolloutOperator, expected: Rollout) -> Rollout:
    now = _require_unchanged(db, expected)
    if now.state != "paused":
        raise UsageError(f"roll-out {now.name} is {now.state}; only a paused one can be resumed")
    done = replace(now, state="running")
    _record_decision(db, operator, done, "resumed", f"Resumed at {now.current_step.label}.", {})
    return done


def abort(
    db: Connection,
    operator: RolloutOperator,
    counter: int,
    expected: Rollout,
    reason: str,
    verdict: StepVerdict | None = None,
) -> Rollout:
    """Every device goes back to what it ran before."""
    now = _require_unchanged(db, expected)
    if not now.is_open:
        raise UsageError(f"roll-out {now.name} is {now.state}; to go back from it, roll out the version before")
    done = replace(now, state="aborted")
    summary = (
        f"Aborted at {now.current_step.label}, devices go back to what they ran before: {_normalize_reason(reason)}"
    )
    evidence: Mapping[str, Any] = {"reason": reason, **(verdict.to_evidence() if verdict else {})}
    _record_decision(db, operator, done, "aborted", summary, evidence, counter, now.plan.desired_after_abort())
    return done


def _record_decision(
    db: Connection,
    operator: RolloutOperator,
    rollout: Rollout,
    event: Event,
    summary: str,
    evidence: Mapping[str, Any],
    counter: int | None = None,
    desired: DesiredBundle | None = None,
) -> None:
    n, prev = journal.load_chain_head(db, rollout.name)
    how: dict[str, Any] = {"by": operator.role, "state": rollout.state, "step": rollout.step, "topic": rollout.topic}
    if desired is not None and counter is not None:
        topic = topics.parse(rollout.topic)
        current = journal.load_desired(db, rollout.topic)
        told = wishes.merge(current, topic, rollout.plan.task, desired, counter, operator.timestamp, operator.key)
        journal.save_desired(db, told)
        how |= {"counter": counter, "desired": digest(told.payload)}
    body = decisions.DecisionBody(1, rollout.name, n + 1, prev, operator.timestamp, event, summary, {**how, **evidence})
    journal.append(db, decisions.sign(operator.key, body))
    journal.save(db, rollout)


def _require_unchanged(db: Connection, expected: Rollout) -> Rollout:
    """The roll-out as it is now. Raises UsageError where it is not the one that was judged."""
    now = journal.find(db, expected.name)
    if (now.state, now.step) != (expected.state, expected.step):
        raise UsageError(f"roll-out {now.name} is {now.state} at step {now.step} meanwhile; look again and repeat it")
    return now


def _require_new(db: Connection, plan: RolloutPlan, topic: str) -> None:
    for other in journal.load_rollouts(db):
        if other.name == plan.name:
            raise UsageError(f"there was a roll-out {plan.name!r} already, which devices remember; choose another name")
        if other.is_open and (other.plan.task, other.topic) == (plan.task, topic):
            raise UsageError(
                f"roll-out {other.name} of {plan.task} is {other.state} for the same devices; "
                f"finish it, or `outstation fleet rollout abort {other.name} REASON`"
            )


def _require_reachable(db: Connection, plan: RolloutPlan) -> None:
    """Each step must choose as many devices as it asks for, else it would wait for ever."""
    kind, _, whom = plan.to.partition(":")
    if kind == "group":
        return
    known = [one for one in list_active_devices(db) if kind == "all" or one == whom]
    if not known:
        raise UsageError(f"roll-out {plan.name}: no device that it is for is enrolled: {plan.to}")
    for i, step in enumerate(plan.steps):
        chosen = sum(plan.desired_for_step(i + 1).includes_device(device) for device in known)
        if chosen < step.promote.devices:
            raise UsageError(
                f"roll-out {plan.name}, step {i + 1} ({step.label}): chooses {chosen} of {len(known)} enrolled "
                f"devices, but asks for {step.promote.devices} that report, so it would wait for ever; raise percent "
                "or lower devices"
            )


def _require_not_held(db: Connection, operator: RolloutOperator, plan: RolloutPlan) -> None:
    for other, when in journal.find_aborted(db, plan.task, plan.digest):
        until = clock.parse_rfc3339(when) + round(other.plan.device.hold_hours * 3.6e9)
        if until > operator.now_us:
            raise UsageError(
                f"{plan.bundle} {plan.version} was aborted in roll-out {other.name} at {when} and is held until "
                f"{clock.to_rfc3339(until)}; a mended bundle has another digest, or --force REASON"
            )


def _normalize_reason(reason: str) -> str:
    text = " ".join(reason.split())[:MAX_REASON_LENGTH]
    return text if text.endswith(".") else text + "."
