"""One step of a roll-out inside its commit: how the task stands, the audit message, the alert, and what runs now."""

from __future__ import annotations

from typing import Any

from agent.alerts import BUNDLE_REJECTED, ROLLED_BACK
from agent.clock import ClockReading
from agent.device.bundles import history as bundle_history
from agent.device.bundles import overrides, quarantine
from agent.device.bundles import rollout_state as standings
from agent.device.bundles.history import BundleHistory, BundleRef
from agent.device.bundles.rollout_state import HoldOff, Phase, RolloutState
from agent.device.rollout import saved_drift
from agent.device.rollout.state_machine import compute_hold_off
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.transaction import Transaction
from agent.model.bundle.bundle import Bundle

EVENT = "rollout"
_MAX_SUMMARY_CHARS = 1500
# An operator has to look at these.
_ALERT_PHASES: frozenset[Phase] = frozenset({"refused", "rolled back"})
_PHASE_VERBS: dict[Phase, str] = {
    "not chosen": "does not take part in",
    "fetching": "fetches and proves",
    "refused": "refused",
    "shadow": "has beside the bundle that runs",
    "probation": "runs, on probation with the one before beside it,",
    "settled": "settled on",
    "rolled back": "took back",
    "withdrawn": "left",
}


def record(
    tx: Transaction, author: MessageLog, task: str, old: RolloutState | None, new: RolloutState, now: ClockReading
) -> HoldOff | None:
    """Keep how `task` stands, and say so where there is something new to say; what is held from now on, if anything."""
    standings.save_state(tx, task, new)
    if old is None or old.phase != new.phase:
        # From here on another pair of bundles is compared, or none.
        tx.delete_state(task, task_keys.SHADOW_STATE)
    if old is not None and old.audit_key == new.audit_key:
        return None
    at_s = tx.uptime_s(now)
    # Only a step into this phase holds, and not that it is late, or desired in another way.
    moved = old is None or (old.phase, old.reason, old.desired.digest) != (new.phase, new.reason, new.desired.digest)
    found = compute_hold_off(new, at_s) if moved else None
    if found is not None:
        standings.add_hold_off(tx, task, new.desired.digest, found, at_s)
    summary = summarize(task, new)
    author.append(tx, "audit", None, {"event": EVENT, "summary": summary, "evidence": build_evidence(task, new)}, now)
    _write_alert(tx, author, task, old, new, summary, now)
    return found


def summarize(task: str, state: RolloutState) -> str:
    wanted = state.desired
    which = f"{wanted.bundle} {wanted.version} (roll-out {wanted.rollout}, {wanted.strategy})"
    reason = f" for {state.reason}" if state.reason else ""
    late = f" It is late: the deadline was {wanted.deadline}." if state.late else ""
    why = f": {state.detail}" if state.detail else ""
    return f"{task} {_PHASE_VERBS[state.phase]} {which}{reason}{why}"[:_MAX_SUMMARY_CHARS].rstrip(".") + f".{late}"


def build_evidence(task: str, state: RolloutState) -> dict[str, Any]:
    wanted = state.desired
    named = {"rollout": wanted.rollout, "bundle": wanted.bundle, "version": wanted.version, "digest": wanted.digest}
    how = {"strategy": wanted.strategy, "phase": state.phase, "reason": state.reason, "numbers": state.numbers}
    return {"task": task, **named, **how, "late": state.late}


def _write_alert(
    tx: Transaction,
    author: MessageLog,
    task: str,
    old: RolloutState | None,
    new: RolloutState,
    summary: str,
    now: ClockReading,
) -> None:
    """Open for as long as the bundle that is desired does not run, because of what was found."""
    was, is_now = old is not None and old.phase in _ALERT_PHASES, new.phase in _ALERT_PHASES
    if not was and not is_now:
        return
    kind = ROLLED_BACK if new.phase == "rolled back" else BUNDLE_REJECTED
    alert = (kind.raised if is_now else kind.cleared)(summary, build_evidence(task, new), task=task)
    author.append(tx, "alerts", task, alert.to_body(task), now)


def begin_canary(
    tx: Transaction, author: MessageLog, task: str, candidate: Bundle, history: BundleHistory | None, now: ClockReading
) -> None:
    saved_drift.save(tx, task)
    bundle_history.record_activation(tx, author, task, candidate, history, "roll-out", now)


def end_canary(
    tx: Transaction,
    author: MessageLog,
    task: str,
    canary_state: RolloutState,
    incumbent: Bundle | None,
    why: str,
    now: ClockReading,
) -> None:
    """What ran before runs again; where it is not known yet what that is, as at a start, `steady` is None."""
    saved_drift.restore(tx, author, task, now)
    past = bundle_history.from_json(canary_state.previous_history.encode()) if canary_state.previous_history else None
    if incumbent is not None:
        bundle_history.record_activation(
            tx, author, task, incumbent, BundleHistory(_to_bundle_ref(canary_state)), why, now
        )
    if past is None or incumbent is None or past.current.digest == incumbent.digest:
        bundle_history.restore(tx, task, past)
    else:
        bundle_history.restore(tx, task, BundleHistory(bundle_history.bundle_ref(incumbent), past.current))


def promote_canary(
    tx: Transaction, author: MessageLog, task: str, state: RolloutState, configured: str, now: ClockReading
) -> None:
    """The bundle on probation stays, over restarts, until the config names another one."""
    saved_drift.discard(tx, author, task, now)
    _write_override(tx, author, task, _to_bundle_ref(state), configured, state.desired.rollout, now)


def revert_to_previous(
    tx: Transaction,
    author: MessageLog,
    task: str,
    bundle: Bundle,
    history: BundleHistory | None,
    configured: str,
    now: ClockReading,
) -> None:
    """A bundle that had settled gives way to the one before, over restarts."""
    bundle_history.record_activation(tx, author, task, bundle, history, "roll-out called back", now)
    _write_override(tx, author, task, bundle_history.bundle_ref(bundle), configured, "", now)


def _write_override(
    tx: Transaction,
    author: MessageLog,
    task: str,
    bundle_ref: BundleRef,
    configured: str,
    rollout: str,
    now: ClockReading,
) -> None:
    overrides.save_bundle_override(tx, task, bundle_history.make_override(bundle_ref, configured, rollout))
    if bundle_ref.digest in overrides.load_quarantined_in_tx(tx, task):
        quarantine.release(tx, author, task, now)


def _to_bundle_ref(state: RolloutState) -> BundleRef:
    return BundleRef(state.desired.bundle, state.desired.version, state.desired.digest)
