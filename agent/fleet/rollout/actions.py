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
from agent.fleet.rollout import decisions, journal
from agent.fleet.rollout import desired_state as wishes
from agent.fleet.rollout.decisions import Event
from agent.fleet.rollout.devices import enrolled
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.plan import Plan
from agent.fleet.rollout.promotion import Verdict
from agent.wire import topics
from agent.wire.desired_state import Wanted
from agent.wire.keys import SigningKey
from agent.wire.messages import digest

MOST_WORDS = 500


class Operator(msgspec.Struct, frozen=True):
    """Who decides, now. `by`: "operator" or "follow", which acts by the plan's rules alone."""

    key: SigningKey
    fleet: str
    now_us: int
    by: str = "operator"

    @property
    def now(self) -> str:
        return clock.rfc3339(self.now_us)


def start(db: Connection, operator: Operator, counter: int, plan: Plan, forced: str | None = None) -> Rollout:
    """Raises UsageError where it must not begin; `forced` says why a bundle that was aborted is tried again."""
    topic = plan.topic(operator.fleet)
    _require_new(db, plan, str(topic))
    _require_reachable(db, plan)
    if plan.deadline is not None and clock.epoch_us(plan.deadline) <= operator.now_us:
        raise UsageError(f"roll-out {plan.name}: its deadline {plan.deadline} is over; set a later one")
    if forced is None:
        _require_not_held(db, operator, plan)
    rollout = Rollout(plan.name, plan, str(topic), operator.now, "running", 1)
    whom = {"all": "all devices"}.get(plan.to, plan.to.replace(":", " "))
    summary = (
        f"{plan.task}: {plan.bundle} {plan.version} for {whom} begins with {rollout.now.words}, "
        f"then {', '.join(step.words for step in plan.steps[1:]) or 'nothing'}."
    )
    if forced is not None:
        summary += f" Although it was aborted before: {_words(forced)}"
    evidence = {"plan": msgspec.to_builtins(plan), "forced": forced}
    _decide(db, operator, rollout, "started", summary, evidence, counter, plan.wanted(1))
    return rollout


def promote(
    db: Connection, operator: Operator, counter: int, seen: Rollout, verdict: Verdict, forced: str | None = None
) -> Rollout:
    """To the following step, or to its end from the last one. Raises UsageError where findings are open."""
    now = _unchanged(db, seen)
    if not now.open:
        raise UsageError(f"roll-out {now.name} is {now.state}; there is nothing to promote")
    if verdict.answer not in ("promote", "finish") and forced is None:
        why = "; ".join(verdict.waits) or verdict.summary
        raise UsageError(f"roll-out {now.name} is not promoted from {now.now.words}: {why}; --force REASON does so")
    following = now.following
    there = following.words if following else "finished"
    summary = f"{now.now.words} → {there}: {verdict.summary}."
    if forced is not None:
        summary += f" Promoted by hand: {_words(forced)} It waited for: {'; '.join(verdict.waits) or 'nothing'}."
    evidence = {**verdict.evidence(), "waits": verdict.waits, "forced": forced}
    if following is None:
        done = replace(now, state="finished")
        _decide(db, operator, done, "finished", summary, evidence)
        return done
    done = replace(now, state="running", step=now.step + 1)
    _decide(db, operator, done, "promoted", summary, evidence, counter, now.plan.wanted(done.step))
    return done


def pause(db: Connection, operator: Operator, seen: Rollout) -> Rollout:
    """Nothing is promoted until it is resumed; what is bad is still aborted."""
    now = _unchanged(db, seen)
    if now.state != "running":
        raise UsageError(f"roll-out {now.name} is {now.state}; only a running one can be paused")
    done = replace(now, state="paused")
    _decide(db, operator, done, "paused", f"Paused at {now.now.words}: devices stay as they are.", {})
    return done


def resume(db: Connection, operator: Operator, seen: Rollout) -> Rollout:
    now = _unchanged(db, seen)
    if now.state != "paused":
        raise UsageError(f"roll-out {now.name} is {now.state}; only a paused one can be resumed")
    done = replace(now, state="running")
    _decide(db, operator, done, "resumed", f"Resumed at {now.now.words}.", {})
    return done


def abort(
    db: Connection, operator: Operator, counter: int, seen: Rollout, reason: str, verdict: Verdict | None = None
) -> Rollout:
    """Every device goes back to what it ran before."""
    now = _unchanged(db, seen)
    if not now.open:
        raise UsageError(f"roll-out {now.name} is {now.state}; to go back from it, roll out the version before")
    done = replace(now, state="aborted")
    summary = f"Aborted at {now.now.words}, devices go back to what they ran before: {_words(reason)}"
    evidence: Mapping[str, Any] = {"reason": reason, **(verdict.evidence() if verdict else {})}
    _decide(db, operator, done, "aborted", summary, evidence, counter, now.plan.back())
    return done


def _decide(
    db: Connection,
    operator: Operator,
    rollout: Rollout,
    event: Event,
    summary: str,
    evidence: Mapping[str, Any],
    counter: int | None = None,
    wanted: Wanted | None = None,
) -> None:
    n, prev = journal.last(db, rollout.name)
    how: dict[str, Any] = {"by": operator.by, "state": rollout.state, "step": rollout.step, "topic": rollout.topic}
    if wanted is not None and counter is not None:
        topic = topics.parse(rollout.topic)
        current = journal.desired(db, rollout.topic)
        told = wishes.merged(current, topic, rollout.plan.task, wanted, counter, operator.now, operator.key)
        journal.put_desired(db, told)
        how |= {"counter": counter, "desired": digest(told.payload)}
    body = decisions.Body(1, rollout.name, n + 1, prev, operator.now, event, summary, {**how, **evidence})
    journal.append(db, decisions.make(operator.key, body))
    journal.put(db, rollout)


def _unchanged(db: Connection, seen: Rollout) -> Rollout:
    """The roll-out as it is now. Raises UsageError where it is not the one that was judged."""
    now = journal.find(db, seen.name)
    if (now.state, now.step) != (seen.state, seen.step):
        raise UsageError(f"roll-out {now.name} is {now.state} at step {now.step} meanwhile; look again and repeat it")
    return now


def _require_new(db: Connection, plan: Plan, topic: str) -> None:
    for other in journal.rollouts(db):
        if other.name == plan.name:
            raise UsageError(f"there was a roll-out {plan.name!r} already, which devices remember; choose another name")
        if other.open and (other.plan.task, other.topic) == (plan.task, topic):
            raise UsageError(
                f"roll-out {other.name} of {plan.task} is {other.state} for the same devices; "
                f"finish it, or `outstation fleet rollout abort {other.name} REASON`"
            )


def _require_reachable(db: Connection, plan: Plan) -> None:
    """Each step must choose as many devices as it asks for, else it would wait for ever."""
    kind, _, whom = plan.to.partition(":")
    if kind == "group":
        return
    known = [one for one in enrolled(db) if kind == "all" or one == whom]
    if not known:
        raise UsageError(f"roll-out {plan.name}: no device that it is for is enrolled: {plan.to}")
    for i, step in enumerate(plan.steps):
        chosen = sum(plan.wanted(i + 1).chosen(device) for device in known)
        if chosen < step.promote.devices:
            raise UsageError(
                f"roll-out {plan.name}, step {i + 1} ({step.words}): chooses {chosen} of {len(known)} enrolled "
                f"devices, but asks for {step.promote.devices} that report, so it would wait for ever; raise percent "
                "or lower devices"
            )


def _require_not_held(db: Connection, operator: Operator, plan: Plan) -> None:
    for other, when in journal.ended(db, plan.task, plan.digest):
        until = clock.epoch_us(when) + round(other.plan.device.hold_hours * 3.6e9)
        if until > operator.now_us:
            raise UsageError(
                f"{plan.bundle} {plan.version} was aborted in roll-out {other.name} at {when} and is held until "
                f"{clock.rfc3339(until)}; a mended bundle has another digest, or --force REASON"
            )


def _words(reason: str) -> str:
    text = " ".join(reason.split())[:MOST_WORDS]
    return text if text.endswith(".") else text + "."
