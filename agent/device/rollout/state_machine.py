"""What becomes of a task's roll-out: from how it stands and what there is to how it stands next, one step at a time.

Rules:
- a bundle that the task does not run is brought here and proves itself (`fetching`); then it answers beside the one
  that runs (`shadow`), or runs with that one beside it (`probation`), until it is `settled`
- what speaks against it ends that: `refused`, where none of its answers counted yet, else `rolled back`. The bundle is
  then held for a while, for whatever roll-out wants it
- `back` and a config that was changed on the device take it away (`withdrawn`); so does another roll-out that wants
  this device. One that does not want it changes nothing, nor does one that nobody mentions any more, but that it is
  fetched or looked at
- no step leads to itself: asked again with the same, the answer is that nothing changes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from agent.device.bundles.rollout_state import HoldOff, Reason, RolloutState
from agent.wire.desired_state import DesiredBundle, Phase

# Whatever the rules say: a bundle that is tried and taken back again and again would end what runs each time.
_MIN_HOLD_OFF_S = 600.0
_IN_PROGRESS_PHASES: frozenset[Phase] = frozenset({"downloading", "shadow", "canary"})
_RUNNING_PHASES: frozenset[Phase] = frozenset({"canary", "active"})
# Reasons that say nothing against the bundle: it is looked at again, and not held.
_TRANSIENT_REASONS: frozenset[Reason] = frozenset(
    {"download_failed", "signature", "incompatible", "hold_off", "aborted", ""}
)


class BundleAssessment(msgspec.Struct, frozen=True):
    """What was found of a bundle: `reason` is empty where nothing speaks against it."""

    reason: Reason
    detail: str
    numbers: Mapping[str, Any] = msgspec.field(default_factory=dict)


class RolloutFacts(msgspec.Struct, frozen=True):
    """All that a decision depends on, beside how the task stands.

    `runs`: the digest of the bundle that the task runs, or on probation would run without it. `proof`: that the bundle
    `aim` names is here and proved itself, or why it will not; None while that is not known. `against`: what was found
    against it while it ran, `enough`: that it ran long enough. `before`: the digest of what could run instead, `aside`:
    why what had settled was set aside. `now_s` is of the device's uptime.
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
    # Whether the deadline of what is wanted is over; None where the clock does not say.
    is_deadline_passed: bool | None = None


def select_target_digest(old: RolloutState | None, facts: RolloutFacts) -> str:
    """The digest of the bundle that should be here, proved, for the next step; "" for none."""
    if old is None or (facts.desired is None and old.phase != "canary"):
        return ""
    if old.phase in _IN_PROGRESS_PHASES:
        return old.desired.digest
    wanted = facts.desired
    if wanted is None:
        return ""
    if wanted.strategy == "rollback":
        return facts.fallback_digest if _is_leaving(facts) else ""
    waits = (
        old.phase == "rejected"
        and facts.hold_off is None
        and wanted.includes_device(facts.device)
        and old.reason != "hold_off"
    )
    return wanted.digest if waits and _is_same_rollout(old, wanted) else ""


def decide_next_state(old: RolloutState | None, facts: RolloutFacts) -> RolloutState | None:
    """How the task stands next; `old` itself where nothing changes."""
    new = _stamp_time(_transition(old, facts), facts)
    if new is None or old is None:
        return new
    if new.audit_key == old.audit_key:
        # Nothing to say; a share, a deadline or rules may have changed.
        unsaid = replace(new, since=old.since, since_s=old.since_s, configured_digest=old.configured_digest)
        return old if new.desired == old.desired else unsaid
    if new.phase == old.phase and _is_same_rollout(old, new.desired):
        return replace(new, since=old.since, since_s=old.since_s)
    return new


def _transition(old: RolloutState | None, facts: RolloutFacts) -> RolloutState | None:
    wanted = facts.desired
    if wanted is None:
        if old is None:
            return None
        if old.phase in _RUNNING_PHASES:
            return _continue_running(old, facts)
        return (
            old if old.phase == "cancelled" else _make_state(old.desired, "cancelled", "", "nobody desires it any more")
        )
    if wanted.strategy == "rollback":
        return _roll_back(old, wanted, facts)
    if old is None or not _is_same_rollout(old, wanted):
        if old is not None and old.phase == "canary":
            if not wanted.includes_device(facts.device):
                return _continue_running(old, facts)
            return _make_state(old.desired, "cancelled", "", f"roll-out {wanted.rollout} is desired instead")
        return _start_rollout(wanted, facts)
    return _continue_rollout(replace(old, desired=wanted), facts)


def _continue_rollout(old: RolloutState, facts: RolloutFacts) -> RolloutState:
    wanted = old.desired
    chosen = wanted.includes_device(facts.device)
    match old.phase:
        case "not_selected":
            return _start_rollout(wanted, facts)
        case "downloading":
            if not chosen or facts.running_digest == wanted.digest or facts.hold_off is not None:
                return _start_rollout(wanted, facts)
            return old if facts.readiness is None else _apply_readiness(old, facts.readiness)
        case "rejected":
            if old.reason == "hold_off":
                return old if facts.hold_off is not None else _start_rollout(wanted, facts)
            if facts.running_digest == wanted.digest:
                return _start_rollout(wanted, facts)
            again = chosen and facts.hold_off is None and facts.readiness is not None and not facts.readiness.reason
            over = old.reason not in _TRANSIENT_REASONS and facts.hold_off is None
            return (
                _apply_readiness(old, facts.readiness)
                if again and facts.readiness
                else _start_rollout(wanted, facts)
                if over
                else old
            )
        case "shadow":
            if not chosen or facts.running_digest == wanted.digest:
                return _start_rollout(wanted, facts)
            if (bad := _find_failure(facts)) is not None:
                return _make_state(wanted, "rejected", bad.reason, bad.detail, bad.numbers)
            return (
                old
                if wanted.strategy == "shadow"
                else _apply_readiness(old, BundleAssessment("", "it was looked at long enough"))
            )
        case "canary" | "active":
            return _continue_running(old, facts)
        case "rolled_back":
            return old if facts.hold_off is not None or not chosen else _start_rollout(wanted, facts)
        case "cancelled":
            stays = (
                old.is_locally_changed
                and old.configured_digest == facts.configured_digest
                and facts.running_digest != wanted.digest
            )
            return old if stays else _start_rollout(wanted, facts)


def _continue_running(old: RolloutState, facts: RolloutFacts) -> RolloutState:
    """A bundle that runs: nobody needs to want it."""
    wanted = old.desired
    if old.phase == "canary":
        if (bad := _find_failure(facts)) is not None:
            return _make_state(wanted, "rolled_back", bad.reason, bad.detail, bad.numbers)
        if facts.running_digest == wanted.digest:
            return _make_state(wanted, "active", "", "the config names it")
        if _is_reconfigured(old, facts):
            return _cancel_for_local_config(wanted, facts)
        if facts.desired is not None and facts.desired.strategy == "shadow" and _is_same_rollout(old, facts.desired):
            return _make_state(wanted, "shadow", "", "it is to be looked at again, and answers beside")
        return (
            old
            if facts.completion is None
            else _make_state(wanted, "active", "", facts.completion.detail, facts.completion.numbers)
        )
    if old.phase == "active" and facts.running_digest != wanted.digest:
        if facts.quarantine_reason:
            return _make_state(wanted, "rolled_back", "crash", facts.quarantine_reason)
        return _cancel_for_local_config(wanted, facts)
    return old


def _start_rollout(desired: DesiredBundle, facts: RolloutFacts) -> RolloutState:
    """A roll-out, or a step of it, from nothing."""
    if not desired.includes_device(facts.device):
        why = f"{desired.percent:g} % of the devices take part, and this is none of them"
        return _make_state(desired, "not_selected", "", why)
    if facts.running_digest == desired.digest:
        return _make_state(desired, "active", "", "it runs already")
    if facts.hold_off is not None:
        hours = max(0.0, facts.hold_off.until_s - facts.uptime_s) / 3600
        why = f"it is held for {hours:.1f} h of uptime more: {facts.hold_off.detail}"
        return _make_state(desired, "rejected", "hold_off", why, {"hours": round(hours, 2)})
    return _make_state(desired, "downloading", "", "")


def _apply_readiness(old: RolloutState, readiness: BundleAssessment) -> RolloutState:
    wanted = old.desired
    if readiness.reason:
        return _make_state(wanted, "rejected", readiness.reason, readiness.detail, readiness.numbers)
    phase: Phase = "shadow" if wanted.strategy == "shadow" else "canary"
    return _make_state(wanted, phase, "", readiness.detail, readiness.numbers)


def _roll_back(old: RolloutState | None, desired: DesiredBundle, facts: RolloutFacts) -> RolloutState:
    """Who runs the bundle or tries it leaves it."""
    why = f"roll-out {desired.rollout} was called back"
    if old is not None and _is_same_bundle(old, desired) and old.phase in _IN_PROGRESS_PHASES:
        return _make_state(desired, "cancelled", "aborted", why)
    if old is not None and old.phase == "canary":
        return _continue_running(old, facts)
    if not _is_leaving(facts):
        if old is not None and _is_same_bundle(old, desired) and old.phase in ("rejected", "rolled_back", "cancelled"):
            return replace(old, desired=desired)
        return _make_state(desired, "cancelled", "aborted", f"{why}; this device does not run it")
    if not facts.fallback_digest:
        return _make_state(
            desired, "rejected", "incompatible", f"{why}, but no other bundle that ran here is kept; it goes on"
        )
    if facts.readiness is None:
        return _make_state(desired, "active", "", f"{why}; it runs until the one before has proved itself again")
    if facts.readiness.reason:
        return _make_state(
            desired,
            "rejected",
            facts.readiness.reason,
            f"{why}, but the one before does not run: {facts.readiness.detail}",
        )
    return _make_state(desired, "cancelled", "aborted", f"{why}; the one before runs again")


def _is_leaving(facts: RolloutFacts) -> bool:
    """Whether the task runs, for good, what it is to leave."""
    wanted = facts.desired
    return wanted is not None and wanted.strategy == "rollback" and facts.running_digest == wanted.digest


def _cancel_for_local_config(desired: DesiredBundle, facts: RolloutFacts) -> RolloutState:
    why = "the config on this device names another bundle since, which runs instead"
    return replace(_make_state(desired, "cancelled", "", why), is_locally_changed=True)


def _is_reconfigured(old: RolloutState, facts: RolloutFacts) -> bool:
    return (
        "" not in (old.configured_digest, facts.configured_digest) and old.configured_digest != facts.configured_digest
    )


def _find_failure(facts: RolloutFacts) -> BundleAssessment | None:
    """What speaks against a bundle that runs, or that does not even start again."""
    if facts.failure is not None:
        return facts.failure
    return facts.readiness if facts.readiness is not None and facts.readiness.reason else None


def _is_same_rollout(old: RolloutState, desired: DesiredBundle) -> bool:
    return old.desired.rollout == desired.rollout and old.desired.digest == desired.digest


def _is_same_bundle(old: RolloutState, desired: DesiredBundle) -> bool:
    return old.desired.digest == desired.digest


def _make_state(
    desired: DesiredBundle, phase: Phase, reason: Reason, detail: str, numbers: Mapping[str, Any] | None = None
) -> RolloutState:
    return RolloutState(desired, phase, reason, detail, dict(numbers or {}))


def _stamp_time(new: RolloutState | None, facts: RolloutFacts) -> RolloutState | None:
    if new is None:
        return None
    under_way = new.phase in _IN_PROGRESS_PHASES and (new.phase, new.desired.strategy) != ("shadow", "shadow")
    late = new.late if facts.is_deadline_passed is None else facts.is_deadline_passed
    new = replace(new, late=late and under_way and new.desired.strategy != "rollback")
    return replace(
        new,
        since=facts.timestamp,
        since_s=facts.uptime_s,
        configured_digest=new.configured_digest or facts.configured_digest,
    )


def compute_hold_off(new: RolloutState, uptime_s: float) -> HoldOff | None:
    """Whether the bundle is not to be tried for a while after this step, and why."""
    if (
        new.phase not in ("rejected", "rolled_back")
        or new.reason in _TRANSIENT_REASONS
        or new.desired.strategy == "rollback"
    ):
        return None
    hold_s = max(_MIN_HOLD_OFF_S, new.desired.rules.hold_off_hours * 3600)
    return HoldOff(uptime_s + hold_s, f"{new.phase} for {new.reason}: {new.detail}"[:500])
