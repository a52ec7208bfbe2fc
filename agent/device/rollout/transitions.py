"""One step of a roll-out inside its commit: how the task stands, the audit message, the alert, and what runs now."""

from __future__ import annotations

from typing import Any

from agent.clock import Now
from agent.device.bundles import history, overrides, quarantine
from agent.device.bundles import rollout_state as standings
from agent.device.bundles.history import History, Ran
from agent.device.bundles.rollout_state import Held, Phase, Standing
from agent.device.rollout import saved_drift, shadow
from agent.device.rollout.state_machine import held_for
from agent.device.store.message_log import Author
from agent.device.store.transaction import Transaction
from agent.model.bundle.bundle import Bundle

EVENT = "rollout"
_MOST_SUMMARY = 1500
# An operator has to look at these.
_ALARMING: frozenset[Phase] = frozenset({"refused", "rolled back"})
_SAID: dict[Phase, str] = {
    "not chosen": "does not take part in",
    "fetching": "fetches and proves",
    "refused": "refused",
    "shadow": "has beside the bundle that runs",
    "probation": "runs, on probation with the one before beside it,",
    "settled": "settled on",
    "rolled back": "took back",
    "withdrawn": "left",
}


def write(tx: Transaction, author: Author, task: str, old: Standing | None, new: Standing, now: Now) -> Held | None:
    """Keep how `task` stands, and say so where there is something new to say; what is held from now on, if anything."""
    standings.keep_standing(tx, task, new)
    if old is None or old.phase != new.phase:
        # From here on another pair of bundles is compared, or none.
        tx.drop(task, shadow.STATE)
    if old is not None and old.said == new.said:
        return None
    at_s = tx.uptime_s(now)
    # Only a step into this phase holds, and not that it is late, or desired in another way.
    moved = old is None or (old.phase, old.reason, old.wanted.digest) != (new.phase, new.reason, new.wanted.digest)
    found = held_for(new, at_s) if moved else None
    if found is not None:
        standings.hold(tx, task, new.wanted.digest, found, at_s)
    summary = sentence(task, new)
    author.write(tx, "audit", None, {"event": EVENT, "summary": summary, "evidence": evidence(task, new)}, now)
    _alert(tx, author, task, old, new, summary, now)
    return found


def sentence(task: str, one: Standing) -> str:
    wanted = one.wanted
    which = f"{wanted.bundle} {wanted.version} (roll-out {wanted.rollout}, {wanted.strategy})"
    reason = f" for {one.reason}" if one.reason else ""
    late = f" It is late: the deadline was {wanted.deadline}." if one.late else ""
    why = f": {one.why}" if one.why else ""
    return f"{task} {_SAID[one.phase]} {which}{reason}{why}"[:_MOST_SUMMARY].rstrip(".") + f".{late}"


def evidence(task: str, one: Standing) -> dict[str, Any]:
    wanted = one.wanted
    named = {"rollout": wanted.rollout, "bundle": wanted.bundle, "version": wanted.version, "digest": wanted.digest}
    how = {"strategy": wanted.strategy, "phase": one.phase, "reason": one.reason, "numbers": one.numbers}
    return {"task": task, **named, **how, "late": one.late}


def _alert(
    tx: Transaction, author: Author, task: str, old: Standing | None, new: Standing, summary: str, now: Now
) -> None:
    """Open for as long as the bundle that is desired does not run, because of what was found."""
    was, is_now = old is not None and old.phase in _ALARMING, new.phase in _ALARMING
    if not was and not is_now:
        return
    body: dict[str, Any] = {
        "alert": "model",
        "subject": task,
        "state": "raised" if is_now else "cleared",
        "severity": "info" if not is_now else "critical" if new.phase == "rolled back" else "warning",
        "id": f"{task}/rollout",
        "summary": summary,
        "evidence": evidence(task, new),
    }
    author.write(tx, "alerts", task, body, now)


def begin_probation(
    tx: Transaction, author: Author, task: str, candidate: Bundle, past: History | None, now: Now
) -> None:
    saved_drift.lay_by(tx, task)
    history.record(tx, author, task, candidate, past, "roll-out", now)


def end_probation(
    tx: Transaction, author: Author, task: str, left: Standing, steady: Bundle | None, why: str, now: Now
) -> None:
    """What ran before runs again; where it is not known yet what that is, as at a start, `steady` is None."""
    saved_drift.take_up(tx, author, task, now)
    past = history.from_json(left.past.encode()) if left.past else None
    if steady is not None:
        history.record(tx, author, task, steady, History(_ran(left)), why, now)
    if past is None or steady is None or past.now.digest == steady.digest:
        history.restore(tx, task, past)
    else:
        history.restore(tx, task, History(history.ran(steady), past.now))


def settle(tx: Transaction, author: Author, task: str, one: Standing, configured: str, now: Now) -> None:
    """The bundle on probation stays, over restarts, until the config names another one."""
    saved_drift.give_up(tx, author, task, now)
    _override(tx, author, task, _ran(one), configured, one.wanted.rollout, now)


def go_back(
    tx: Transaction, author: Author, task: str, found: Bundle, past: History | None, configured: str, now: Now
) -> None:
    """A bundle that had settled gives way to the one before, over restarts."""
    history.record(tx, author, task, found, past, "roll-out called back", now)
    _override(tx, author, task, history.ran(found), configured, "", now)


def _override(tx: Transaction, author: Author, task: str, ran: Ran, configured: str, rollout: str, now: Now) -> None:
    overrides.keep_rollback(tx, task, history.rolled_back(ran, configured, rollout))
    if ran.digest in overrides.set_aside_in(tx, task):
        quarantine.end(tx, author, task, now)


def _ran(one: Standing) -> Ran:
    return Ran(one.wanted.bundle, one.wanted.version, one.wanted.digest)
