"""Roll-out actions of an operator. Each is one transaction: the decision, the new state and the desired state.

An action that changes the desired state is given a counter that its key has never used. Publishing follows the
transaction; after a crash in between, the next process that publishes sends it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.fleet.database import rollouts
from outstation.fleet.database.interface import Connection
from outstation.fleet.rollout import decisions, desired_state, journal
from outstation.fleet.rollout.decisions import Event
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.plan import RolloutPlan
from outstation.fleet.rollout.promotion import StepVerdict
from outstation.foundation import clock
from outstation.foundation.errors import UsageError
from outstation.protocol.wire import topics
from outstation.protocol.wire.desired_state import DesiredBundle, rollout_bucket
from outstation.protocol.wire.jws import digest
from outstation.protocol.wire.keys import SigningKey

MAX_REASON_LENGTH = 500


class RolloutOperator(msgspec.Struct, frozen=True):
    """The signer of a decision. `role` is "operator", or "follow" for the controller that applies the plan's rules."""

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
    """Start a roll-out. `force_reason` says why an aborted bundle is tried again within its hold-off.

    Raises UsageError if the roll-out must not start.
    """
    topic = plan.desired_topic(operator.fleet)
    _require_new(db, plan, str(topic))
    _require_reachable(db, plan)
    if plan.deadline is not None and clock.parse_rfc3339(plan.deadline) <= operator.now_us:
        raise UsageError(f"roll-out {plan.name}: its deadline {plan.deadline} has passed; set a later one")
    if force_reason is None:
        _require_not_held(db, operator, plan)
    rollout = Rollout(plan.name, plan, str(topic), operator.timestamp, "running", 1)
    target = {"all": "all devices"}.get(plan.target, plan.target.replace(":", " "))
    summary = (
        f"{plan.task}: {plan.bundle} {plan.version} for {target} starts with {rollout.current_step.label}, "
        f"then {', '.join(step.label for step in plan.steps[1:]) or 'nothing'}."
    )
    if force_reason is not None:
        summary += f" It was aborted before; forced: {_normalize_reason(force_reason)}"
    evidence = {"plan": msgspec.to_builtins(plan), "force_reason": force_reason}
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
    """Advance to the next step, or finish after the last one. Raises UsageError if rules block it."""
    current = _require_unchanged(db, expected)
    if not current.is_open:
        raise UsageError(f"roll-out {current.name} is {current.state}; there is nothing to promote")
    if verdict.outcome not in ("promote", "finish") and force_reason is None:
        reason = "; ".join(verdict.blockers) or verdict.summary
        raise UsageError(
            f"roll-out {current.name} is not promoted from {current.current_step.label}: {reason}; "
            "--force REASON promotes it"
        )
    next_step = current.next_step
    target = next_step.label if next_step else "finished"
    summary = f"{current.current_step.label} → {target}: {verdict.summary}."
    if force_reason is not None:
        summary += f" Forced: {_normalize_reason(force_reason)} Blocked by: {'; '.join(verdict.blockers) or 'nothing'}."
    evidence = {**verdict.to_evidence(), "blockers": verdict.blockers, "force_reason": force_reason}
    if next_step is None:
        new = replace(current, state="finished")
        _record_decision(db, operator, new, "finished", summary, evidence)
        return new
    new = replace(current, state="running", step=current.step + 1)
    _record_decision(db, operator, new, "promoted", summary, evidence, counter, new.plan.desired_for_step(new.step))
    return new


def pause(db: Connection, operator: RolloutOperator, expected: Rollout) -> Rollout:
    """Stop promotions until `resume`. A step whose rules fail is still aborted."""
    current = _require_unchanged(db, expected)
    if current.state != "running":
        raise UsageError(f"roll-out {current.name} is {current.state}; only a running one can be paused")
    new = replace(current, state="paused")
    summary = f"Paused at {current.current_step.label}: devices stay as they are."
    _record_decision(db, operator, new, "paused", summary, {})
    return new


def resume(db: Connection, operator: RolloutOperator, expected: Rollout) -> Rollout:
    current = _require_unchanged(db, expected)
    if current.state != "paused":
        raise UsageError(f"roll-out {current.name} is {current.state}; only a paused one can be resumed")
    new = replace(current, state="running")
    _record_decision(db, operator, new, "resumed", f"Resumed at {current.current_step.label}.", {})
    return new


def abort(
    db: Connection,
    operator: RolloutOperator,
    counter: int,
    expected: Rollout,
    reason: str,
    verdict: StepVerdict | None = None,
) -> Rollout:
    """Return every device to the bundle it ran before."""
    current = _require_unchanged(db, expected)
    if not current.is_open:
        raise UsageError(f"roll-out {current.name} is {current.state}; to undo it, roll out the previous version")
    new = replace(current, state="aborted")
    label, text = current.current_step.label, _normalize_reason(reason)
    summary = f"Aborted at {label}, devices return to their previous bundle: {text}"
    evidence = {"reason": reason, **(verdict.to_evidence() if verdict else {})}
    _record_decision(db, operator, new, "aborted", summary, evidence, counter, current.plan.desired_after_abort())
    return new


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
    n, prev = journal.find_next_place(db, rollout.name)
    context: dict[str, Any] = {"by": operator.role}
    context |= {"state": rollout.state, "step": rollout.step, "topic": rollout.topic}
    if desired is not None and counter is not None:
        current, topic, task = journal.load_desired(db, rollout.topic), topics.parse(rollout.topic), rollout.plan.task
        message = desired_state.merge(current, topic, task, desired, counter, operator.timestamp, operator.key)
        rollouts.save_desired(db, (message.topic, message.counter, message.payload, message.jws))
        context |= {"counter": counter, "desired": digest(message.payload)}
    context |= evidence
    body = decisions.DecisionBody(1, rollout.name, n, prev, operator.timestamp, event, summary, context)
    rollouts.append_decision(db, decisions.sign(operator.key, body).to_row())
    journal.save(db, rollout)


def _require_unchanged(db: Connection, expected: Rollout) -> Rollout:
    """Return the current roll-out. Raises UsageError if it changed since `expected` was loaded."""
    current = journal.find(db, expected.name)
    if (current.state, current.step) != (expected.state, expected.step):
        raise UsageError(
            f"roll-out {current.name} has changed: it is {current.state} at step {current.step} now; "
            "look at its status and repeat the command"
        )
    return current


def _require_new(db: Connection, plan: RolloutPlan, topic: str) -> None:
    for other in journal.load_rollouts(db):
        if other.name == plan.name:
            raise UsageError(f"a roll-out {plan.name!r} exists, and devices remember its name; choose another name")
        if other.is_open and (other.plan.task, other.topic) == (plan.task, topic):
            raise UsageError(
                f"roll-out {other.name} of {plan.task} is {other.state} for the same devices; "
                f"finish it, or `outstation fleet rollout abort {other.name} REASON`"
            )


def _require_reachable(db: Connection, plan: RolloutPlan) -> None:
    """Raise UsageError if a step can never end. A group may get any number of devices."""
    kind, _, target = plan.target.partition(":")
    if kind != "group":
        enrolled = rollouts.list_active_devices(db)
        require_selection(plan, [device for device in enrolled if kind == "all" or device == target])


def require_selection(plan: RolloutPlan, members: Sequence[str]) -> None:
    """Raise UsageError if a step selects fewer of the target's devices than must report: it would wait for ever."""
    if not members:
        raise UsageError(f"roll-out {plan.name}: target {plan.target} matches no enrolled device")
    ranks = sorted(rollout_bucket(plan.name, device) for device in members)
    for number, step in enumerate(plan.steps, 1):
        selected = sum(plan.desired_for_step(number).includes_device(device) for device in members)
        needed = step.promote.min_devices
        if selected < needed:
            fix = f"lower min_devices to {len(ranks)} or less"
            if needed <= len(ranks):
                # The selection follows from the names, so a share of few devices can be none of them.
                fix = f"percent = {math.floor(100 * ranks[needed - 1]) + 1} selects {needed}"
            raise UsageError(
                f"roll-out {plan.name}, step {number} ({step.label}): selects {selected} of {len(ranks)} enrolled "
                f"devices, but {needed} must report, so it would wait for ever; {fix}"
            )


def _require_not_held(db: Connection, operator: RolloutOperator, plan: RolloutPlan) -> None:
    for other, when in journal.find_aborted(db, plan.task, plan.digest):
        until = clock.parse_rfc3339(when) + round(other.plan.device_rules.hold_off_hours * 3.6e9)
        if until > operator.now_us:
            raise UsageError(
                f"{plan.bundle} {plan.version} was aborted in roll-out {other.name} at {when}; its hold-off ends at "
                f"{clock.to_rfc3339(until)}; a fixed bundle has another digest, or use --force REASON"
            )


def _normalize_reason(reason: str) -> str:
    text = " ".join(reason.split())[:MAX_REASON_LENGTH]
    return text if text.endswith(".") else text + "."
