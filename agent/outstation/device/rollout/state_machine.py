"""Roll-out state machine of a task: from its state and the facts to its next state, one step at a time. Pure.

Rules:
- a bundle that the task does not run is obtained and verified (`downloading`). Then it runs as a `shadow` of the active
  bundle, or as the `canary` with the previous bundle as its shadow, until it is `active`
- a failure ends that: `rejected` if none of its results was published, else `rolled_back`. The bundle is then held off
  for a while, whichever roll-out desires it
- strategy `rollback`, a change of the device's config, or another roll-out that selects the device cancel it
  (`cancelled`). A roll-out that does not select the device changes nothing. A roll-out that is no longer desired only
  ends downloads and shadows
- no step leads to itself: the same facts once more change nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from outstation.device.bundles.rollout_state import HoldOff, Reason, RolloutState
from outstation.protocol.wire.desired_state import DesiredBundle, Phase

# Lower bound whatever the rules say: a bundle that fails again and again would interrupt the task each time.
_MIN_HOLD_OFF_S = 600.0
_IN_PROGRESS_PHASES: frozenset[Phase] = frozenset({"downloading", "shadow", "canary"})
_RUNNING_PHASES: frozenset[Phase] = frozenset({"canary", "active"})
# Reasons that are no evidence against the bundle: it is tried again, and not held off.
_TRANSIENT_REASONS: frozenset[Reason] = frozenset(
    {"download_failed", "signature", "incompatible", "hold_off", "aborted", ""}
)


class BundleAssessment(msgspec.Struct, frozen=True):
    """Result of a check of a bundle; `reason` is empty if it passed."""

    reason: Reason
    detail: str
    numbers: Mapping[str, Any] = msgspec.field(default_factory=dict)


class RolloutFacts(msgspec.Struct, frozen=True):
    """Everything but the state that a decision depends on.

    `running_digest` is the bundle that the task runs, or would run without the canary. `readiness` says if the bundle
    of `select_target_digest` is present and verified; None while unknown. `failure` is evidence against the running
    candidate, `completion` says that it ran long enough. `fallback_digest` is a bundle that could run instead,
    `quarantine_reason` why an active bundle was quarantined. `is_deadline_passed` is None while the clock is unsynced.
    """

    device: str
    desired: DesiredBundle | None
    running_digest: str
    configured_digest: str
    timestamp: str
    uptime_s: float
    hold_off: HoldOff | None = None
    readiness: BundleAssessment | None = None
    failure: BundleAssessment | None = None
    completion: BundleAssessment | None = None
    fallback_digest: str = ""
    quarantine_reason: str = ""
    is_deadline_passed: bool | None = None


def select_target_digest(old: RolloutState | None, facts: RolloutFacts) -> str:
    """Return the digest of the bundle that the next step needs on this device; "" if none."""
    if old is None or (facts.desired is None and old.phase != "canary"):
        return ""
    if old.phase in _IN_PROGRESS_PHASES:
        return old.desired.digest
    desired = facts.desired
    if desired is None:
        return ""
    if desired.strategy == "rollback":
        return facts.fallback_digest if _is_leaving(facts) else ""
    is_waiting = (
        old.phase == "rejected"
        and facts.hold_off is None
        and desired.includes_device(facts.device)
        and old.reason != "hold_off"
    )
    return desired.digest if is_waiting and _is_same_rollout(old, desired) else ""


def decide_next_state(old: RolloutState | None, facts: RolloutFacts) -> RolloutState | None:
    """Return the next state; `old` itself if nothing changes."""
    new = _transition(old, facts)
    if new is None:
        return None
    is_unfinished = new.phase in _IN_PROGRESS_PHASES and (new.phase, new.desired.strategy) != ("shadow", "shadow")
    late = new.late if facts.is_deadline_passed is None else facts.is_deadline_passed
    new = replace(
        new,
        late=late and is_unfinished and new.desired.strategy != "rollback",
        since=facts.timestamp,
        since_s=facts.uptime_s,
        configured_digest=new.configured_digest or facts.configured_digest,
    )
    if old is None:
        return new
    if new.audit_key == old.audit_key:
        # Nothing to report; only the percentage, the deadline or the rules may have changed.
        unreported = replace(new, since=old.since, since_s=old.since_s, configured_digest=old.configured_digest)
        return old if new.desired == old.desired else unreported
    if new.phase == old.phase and _is_same_rollout(old, new.desired):
        return replace(new, since=old.since, since_s=old.since_s)
    return new


def _transition(old: RolloutState | None, facts: RolloutFacts) -> RolloutState | None:
    desired = facts.desired
    if desired is None:
        if old is None:
            return None
        if old.phase in _RUNNING_PHASES:
            return _continue_running(old, facts)
        return old if old.phase == "cancelled" else _make_state(old.desired, "cancelled", "", "it is no longer desired")
    if desired.strategy == "rollback":
        return _roll_back(old, desired, facts)
    if old is None or not _is_same_rollout(old, desired):
        if old is not None and old.phase == "canary":
            if not desired.includes_device(facts.device):
                return _continue_running(old, facts)
            return _make_state(old.desired, "cancelled", "", f"roll-out {desired.rollout} is desired instead")
        return _start_rollout(desired, facts)
    return _continue_rollout(replace(old, desired=desired), facts)


def _continue_rollout(old: RolloutState, facts: RolloutFacts) -> RolloutState:
    desired = old.desired
    is_selected = desired.includes_device(facts.device)
    match old.phase:
        case "not_selected":
            return _start_rollout(desired, facts)
        case "downloading":
            if not is_selected or facts.running_digest == desired.digest or facts.hold_off is not None:
                return _start_rollout(desired, facts)
            return old if facts.readiness is None else _apply_readiness(old, facts.readiness)
        case "rejected":
            return _retry_rejected(old, facts, is_selected=is_selected)
        case "shadow":
            if not is_selected or facts.running_digest == desired.digest:
                return _start_rollout(desired, facts)
            if (failure := _find_failure(facts)) is not None:
                return _make_state(desired, "rejected", failure.reason, failure.detail, failure.numbers)
            if desired.strategy == "shadow":
                return old
            return _apply_readiness(old, BundleAssessment("", "its time as a shadow is over"))
        case "canary" | "active":
            return _continue_running(old, facts)
        case "rolled_back":
            return old if facts.hold_off is not None or not is_selected else _start_rollout(desired, facts)
        case "cancelled":
            is_final = (
                old.is_locally_changed
                and old.configured_digest == facts.configured_digest
                and facts.running_digest != desired.digest
            )
            return old if is_final else _start_rollout(desired, facts)


def _retry_rejected(old: RolloutState, facts: RolloutFacts, *, is_selected: bool) -> RolloutState:
    if old.reason == "hold_off":
        return old if facts.hold_off is not None else _start_rollout(old.desired, facts)
    if facts.running_digest == old.desired.digest:
        return _start_rollout(old.desired, facts)
    if facts.hold_off is not None:
        return old
    if is_selected and facts.readiness is not None and not facts.readiness.reason:
        return _apply_readiness(old, facts.readiness)
    return old if old.reason in _TRANSIENT_REASONS else _start_rollout(old.desired, facts)


def _continue_running(old: RolloutState, facts: RolloutFacts) -> RolloutState:
    """Continue with a running bundle, which need not be desired any more."""
    desired = old.desired
    if old.phase == "canary":
        if (failure := _find_failure(facts)) is not None:
            return _make_state(desired, "rolled_back", failure.reason, failure.detail, failure.numbers)
        if facts.running_digest == desired.digest:
            return _make_state(desired, "active", "", "the config names it")
        before, now = old.configured_digest, facts.configured_digest
        if "" not in (before, now) and before != now:
            return _cancel_for_local_config(desired)
        if facts.desired is not None and facts.desired.strategy == "shadow" and _is_same_rollout(old, facts.desired):
            return _make_state(desired, "shadow", "", "the roll-out returned to strategy shadow")
        if facts.completion is None:
            return old
        return _make_state(desired, "active", "", facts.completion.detail, facts.completion.numbers)
    if old.phase == "active" and facts.running_digest != desired.digest:
        if facts.quarantine_reason:
            return _make_state(desired, "rolled_back", "crash", facts.quarantine_reason)
        return _cancel_for_local_config(desired)
    return old


def _start_rollout(desired: DesiredBundle, facts: RolloutFacts) -> RolloutState:
    if not desired.includes_device(facts.device):
        detail = f"the step selects {desired.percent:g} % of the devices, and not this one"
        return _make_state(desired, "not_selected", "", detail)
    if facts.running_digest == desired.digest:
        return _make_state(desired, "active", "", "it runs already")
    if facts.hold_off is not None:
        hours = max(0.0, facts.hold_off.until_s - facts.uptime_s) / 3600
        detail = f"its hold-off lasts for another {hours:.1f} h of uptime: {facts.hold_off.detail}"
        return _make_state(desired, "rejected", "hold_off", detail, {"hours": round(hours, 2)})
    return _make_state(desired, "downloading", "", "")


def _apply_readiness(old: RolloutState, readiness: BundleAssessment) -> RolloutState:
    phase: Phase = "shadow" if old.desired.strategy == "shadow" else "canary"
    if readiness.reason:
        phase = "rejected"
    return _make_state(old.desired, phase, readiness.reason, readiness.detail, readiness.numbers)


def _roll_back(old: RolloutState | None, desired: DesiredBundle, facts: RolloutFacts) -> RolloutState:
    """Leave a bundle that this device runs or tries."""
    detail = f"roll-out {desired.rollout} was aborted"
    is_same_bundle = old is not None and old.desired.digest == desired.digest
    if old is not None and is_same_bundle and old.phase in _IN_PROGRESS_PHASES:
        return _make_state(desired, "cancelled", "aborted", detail)
    if old is not None and old.phase == "canary":
        return _continue_running(old, facts)
    if not _is_leaving(facts):
        if old is not None and is_same_bundle and old.phase in ("rejected", "rolled_back", "cancelled"):
            return replace(old, desired=desired)
        return _make_state(desired, "cancelled", "aborted", f"{detail}; this device does not run it")
    if not facts.fallback_digest:
        detail += ", but no copy of a previous bundle is on this device; it keeps running"
        return _make_state(desired, "rejected", "incompatible", detail)
    if facts.readiness is None:
        return _make_state(desired, "active", "", f"{detail}; it runs until the previous bundle is verified again")
    if facts.readiness.reason:
        detail += f", but the previous bundle does not run: {facts.readiness.detail}"
        return _make_state(desired, "rejected", facts.readiness.reason, detail)
    return _make_state(desired, "cancelled", "aborted", f"{detail}; the previous bundle runs again")


def _is_leaving(facts: RolloutFacts) -> bool:
    """Return True if the task's active bundle is the one to roll back."""
    desired = facts.desired
    return desired is not None and desired.strategy == "rollback" and facts.running_digest == desired.digest


def _cancel_for_local_config(desired: DesiredBundle) -> RolloutState:
    detail = "the config on this device names another bundle since, which runs instead"
    return replace(_make_state(desired, "cancelled", "", detail), is_locally_changed=True)


def _find_failure(facts: RolloutFacts) -> BundleAssessment | None:
    """Return the evidence against a running bundle, or why it does not start again."""
    if facts.failure is not None:
        return facts.failure
    return facts.readiness if facts.readiness is not None and facts.readiness.reason else None


def _is_same_rollout(old: RolloutState, desired: DesiredBundle) -> bool:
    return old.desired.rollout == desired.rollout and old.desired.digest == desired.digest


def _make_state(
    desired: DesiredBundle, phase: Phase, reason: Reason, detail: str, numbers: Mapping[str, Any] | None = None
) -> RolloutState:
    return RolloutState(desired, phase, reason, detail, dict(numbers or {}))


def compute_hold_off(new: RolloutState, uptime_s: float) -> HoldOff | None:
    """Return the hold-off of the bundle after this step; None if the step is no evidence against it."""
    if (
        new.phase not in ("rejected", "rolled_back")
        or new.reason in _TRANSIENT_REASONS
        or new.desired.strategy == "rollback"
    ):
        return None
    hold_s = max(_MIN_HOLD_OFF_S, new.desired.rules.hold_off_hours * 3600)
    return HoldOff(uptime_s + hold_s, f"{new.phase} for {new.reason}: {new.detail}"[:500])
