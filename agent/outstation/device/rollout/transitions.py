"""Transitions of a roll-out: the writes of one step, in its commit. State, audit message, alert and active bundle."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from outstation.device.bundles import history as bundle_history
from outstation.device.bundles import overrides, quarantine, rollout_state
from outstation.device.bundles.history import BundleHistory, BundleRef
from outstation.device.bundles.quarantine import CrashMarker
from outstation.device.bundles.rollout_state import HoldOff, Reason, RolloutState
from outstation.device.config import Config
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rollout import saved_drift
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import clock, decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.ml.model.bundle.bundle import Bundle
from outstation.protocol.alerts.kinds import BUNDLE_REJECTED, ROLLED_BACK

if TYPE_CHECKING:
    from outstation.protocol.wire.desired_state import Phase

log = logging.getLogger("outstation.updates")

EVENT = "rollout"
_MAX_SUMMARY_CHARS = 1500
# Phases that an operator has to look at.
_ALERT_PHASES: frozenset[Phase] = frozenset({"rejected", "rolled_back"})
_PHASE_VERBS: dict[Phase, str] = {
    "not_selected": "is not selected for",
    "downloading": "downloads and verifies",
    "rejected": "rejected",
    "shadow": "runs, as a shadow of the active bundle,",
    "canary": "runs, as the canary with the previous bundle as its shadow,",
    "active": "activated",
    "rolled_back": "rolled back",
    "cancelled": "cancelled",
}


def record(
    tx: Transaction, message_log: MessageLog, task: str, old: RolloutState | None, new: RolloutState, now: ClockReading
) -> HoldOff | None:
    """Save the state of `task` and report a change. Return the hold-off that begins with this step, if any."""
    rollout_state.save_state(tx, task, new)
    # Phases and hold-offs are measured from this uptime: after a loss of power it must not be in the future.
    tx.save_uptime(now)
    if old is None or old.phase != new.phase:
        # Another pair of bundles is compared from here on, or none.
        tx.delete_state(task, task_keys.SHADOW_STATE)
    if old is not None and old.audit_key == new.audit_key:
        return None
    uptime_s = tx.uptime_s(now)
    # A step into a phase begins a hold-off; being late, or being desired in another way, does not.
    has_moved = old is None or (
        (old.phase, old.reason, old.desired.digest) != (new.phase, new.reason, new.desired.digest)
    )
    from outstation.device.rollout.state_machine import compute_hold_off

    hold_off = compute_hold_off(new, uptime_s) if has_moved else None
    if hold_off is not None:
        rollout_state.add_hold_off(tx, task, new.desired.digest, hold_off, uptime_s)
    summary, evidence = summarize(task, new), build_evidence(task, new)
    message_log.append(tx, "audit", None, {"event": EVENT, "summary": summary, "evidence": evidence}, now)
    is_alert = new.phase in _ALERT_PHASES
    if is_alert or (old is not None and old.phase in _ALERT_PHASES):
        # Raised while the desired bundle does not run because of a fault.
        kind = ROLLED_BACK if new.phase == "rolled_back" else BUNDLE_REJECTED
        alert = (kind.raised if is_alert else kind.cleared)(summary, evidence, task=task)
        message_log.append(tx, "alerts", task, alert.to_body(task), now)
    return hold_off


def summarize(task: str, state: RolloutState) -> str:
    """Return a sentence about the state, for people."""
    desired = state.desired
    bundle = f"{desired.bundle} {desired.version} (roll-out {desired.rollout}, {desired.strategy})"
    reason = f" for {state.reason}" if state.reason else ""
    late = f" It is late: the deadline was {desired.deadline}." if state.late else ""
    detail = f": {state.detail}" if state.detail else ""
    text = f"{task} {_PHASE_VERBS[state.phase]} {bundle}{reason}{detail}"
    return text[:_MAX_SUMMARY_CHARS].rstrip(".") + f".{late}"


def build_evidence(task: str, state: RolloutState) -> dict[str, Any]:
    desired = state.desired
    return {
        "task": task,
        "rollout": desired.rollout,
        "bundle": desired.bundle,
        "version": desired.version,
        "digest": desired.digest,
        "strategy": desired.strategy,
        "phase": state.phase,
        "reason": state.reason,
        "numbers": state.numbers,
        "late": state.late,
    }


def make_rolled_back(old: RolloutState, reason: Reason, detail: str, since: str, uptime_s: float) -> RolloutState:
    """Return the state after a rollback that the state machine did not decide."""
    return replace(
        old,
        phase="rolled_back",
        reason=reason,
        detail=detail,
        numbers={},
        late=False,
        previous_history="",
        since=since,
        since_s=uptime_s,
    )


def begin_canary(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    candidate: LoadedTask,
    history: BundleHistory | None,
    now: ClockReading,
) -> None:
    """Make the candidate active, set the drift state of the previous bundle aside, and let the candidate inherit it."""
    if candidate.drift is None:
        saved_drift.save(tx, task)
    else:
        saved_drift.begin(tx, message_log, task, candidate.drift.to_restored(), now)
    bundle_history.record_activation(tx, message_log, task, candidate.bundle, history, "roll-out", now)


def end_canary(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    canary_state: RolloutState,
    incumbent: Bundle | None,
    reason: str,
    now: ClockReading,
) -> None:
    """Return to the previous bundle. `incumbent` is None at a start, before the bundle is loaded."""
    saved_drift.restore(tx, message_log, task, now)
    stored = canary_state.previous_history
    past = decoders.from_json(stored, BundleHistory) if stored else None
    if incumbent is not None:
        canary_history = BundleHistory(_to_bundle_ref(canary_state))
        bundle_history.record_activation(tx, message_log, task, incumbent, canary_history, reason, now)
    if past is None or incumbent is None or past.current.digest == incumbent.digest:
        bundle_history.restore(tx, task, past)
    else:
        bundle_history.restore(tx, task, BundleHistory(bundle_history.bundle_ref(incumbent), past.current))


def promote_canary(
    tx: Transaction, message_log: MessageLog, task: str, state: RolloutState, configured: str, now: ClockReading
) -> None:
    """Keep the canary active over restarts, until the config names another bundle."""
    saved_drift.discard(tx, message_log, task, now)
    _write_override(tx, message_log, task, _to_bundle_ref(state), configured, state.desired.rollout, now)


def revert_to_previous(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    bundle: Bundle,
    history: BundleHistory | None,
    configured: str,
    now: ClockReading,
) -> None:
    """Replace a bundle that was active for good by the previous one, over restarts."""
    bundle_history.record_activation(tx, message_log, task, bundle, history, "roll-out aborted", now)
    _write_override(tx, message_log, task, bundle_history.bundle_ref(bundle), configured, "", now)


def roll_back_after_crash(
    conf: Config, store: Store, message_log: MessageLog, marker: CrashMarker, now: ClockReading
) -> bool:
    """At a start, roll back a canary that ended the previous process; return True if one did.

    A canary runs in a process of its own. It is loaded into the daemon only for its promotion, before that is
    committed. One crash there is enough; other bundles are quarantined after the second.
    """
    previous = marker.previous
    if previous is None or previous.task not in conf.tasks:
        return False
    old = rollout_state.load_state(store, previous.task)
    if old is None or old.phase != "canary" or old.desired.digest != previous.digest:
        return False
    detail = "the daemon ended while it loaded this bundle for its promotion"
    uptime_s = store.uptime_s(now)
    new = make_rolled_back(old, "crash", detail, clock.to_rfc3339(now.wall_us), uptime_s)
    log.error("task %s: %s", previous.task, detail)
    try:
        with store.transaction(vital=True) as tx:
            record(tx, message_log, previous.task, old, new, now)
            end_canary(tx, message_log, previous.task, old, None, new.phase, now)
    except StorageFull as full:
        log.error("task %s: %s; the crash of its bundle is not recorded", previous.task, full)
        return False
    marker.clear()
    return True


def _write_override(
    tx: Transaction,
    message_log: MessageLog,
    task: str,
    bundle_ref: BundleRef,
    configured: str,
    rollout: str,
    now: ClockReading,
) -> None:
    overrides.save_bundle_override(tx, task, bundle_history.make_override(bundle_ref, configured, rollout))
    if bundle_ref.digest in overrides.load_quarantined(tx, task):
        quarantine.release(tx, message_log, task, now)


def _to_bundle_ref(state: RolloutState) -> BundleRef:
    return BundleRef(state.desired.bundle, state.desired.version, state.desired.digest)
