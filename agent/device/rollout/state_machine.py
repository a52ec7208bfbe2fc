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

from agent.device.bundles.rollout_state import Held, Phase, Reason, Standing
from agent.wire.desired_state import Wanted

# Whatever the rules say: a bundle that is tried and taken back again and again would end what runs each time.
_LEAST_HOLD_S = 600.0
_TRIED: frozenset[Phase] = frozenset({"fetching", "shadow", "probation"})
_RUNS: frozenset[Phase] = frozenset({"probation", "settled"})
# Reasons that say nothing against the bundle: it is looked at again, and not held.
_PASSING: frozenset[Reason] = frozenset({"fetch", "signature", "unfit", "held", "aborted", ""})


class Finding(msgspec.Struct, frozen=True):
    """What was found of a bundle: `reason` is empty where nothing speaks against it."""

    reason: Reason
    why: str
    numbers: Mapping[str, Any] = msgspec.field(default_factory=dict)


class Facts(msgspec.Struct, frozen=True):
    """All that a decision depends on, beside how the task stands.

    `runs`: the digest of the bundle that the task runs, or on probation would run without it. `proof`: that the bundle
    `aim` names is here and proved itself, or why it will not; None while that is not known. `against`: what was found
    against it while it ran, `enough`: that it ran long enough. `before`: the digest of what could run instead, `aside`:
    why what had settled was set aside. `now_s` is of the device's uptime.
    """

    device: str
    wanted: Wanted | None
    runs: str
    configured: str
    now: str
    now_s: float
    held: Held | None = None
    proof: Finding | None = None
    against: Finding | None = None
    enough: Finding | None = None
    before: str = ""
    aside: str = ""
    # Whether the deadline of what is wanted is over; None where the clock does not say.
    over: bool | None = None


def aim(old: Standing | None, facts: Facts) -> str:
    """The digest of the bundle that should be here, proved, for the next step; "" for none."""
    if old is None or (facts.wanted is None and old.phase != "probation"):
        return ""
    if old.phase in _TRIED:
        return old.wanted.digest
    wanted = facts.wanted
    if wanted is None:
        return ""
    if wanted.strategy == "back":
        return facts.before if _leaves(facts) else ""
    waits = old.phase == "refused" and facts.held is None and wanted.chosen(facts.device) and old.reason != "held"
    return wanted.digest if waits and _same(old, wanted) else ""


def decide(old: Standing | None, facts: Facts) -> Standing | None:
    """How the task stands next; `old` itself where nothing changes."""
    new = _dated(_next(old, facts), facts)
    if new is None or old is None:
        return new
    if new.said == old.said:
        # Nothing to say; a share, a deadline or rules may have changed.
        unsaid = replace(new, since=old.since, since_s=old.since_s, configured=old.configured)
        return old if new.wanted == old.wanted else unsaid
    if new.phase == old.phase and _same(old, new.wanted):
        return replace(new, since=old.since, since_s=old.since_s)
    return new


def _next(old: Standing | None, facts: Facts) -> Standing | None:
    wanted = facts.wanted
    if wanted is None:
        if old is None:
            return None
        if old.phase in _RUNS:
            return _going_on(old, facts)
        return old if old.phase == "withdrawn" else _to(old.wanted, "withdrawn", "", "nobody desires it any more")
    if wanted.strategy == "back":
        return _back(old, wanted, facts)
    if old is None or not _same(old, wanted):
        if old is not None and old.phase == "probation":
            if not wanted.chosen(facts.device):
                return _going_on(old, facts)
            return _to(old.wanted, "withdrawn", "", f"roll-out {wanted.rollout} is desired instead")
        return _begin(wanted, facts)
    return _same_rollout(replace(old, wanted=wanted), facts)


def _same_rollout(old: Standing, facts: Facts) -> Standing:
    wanted = old.wanted
    chosen = wanted.chosen(facts.device)
    match old.phase:
        case "not chosen":
            return _begin(wanted, facts)
        case "fetching":
            if not chosen or facts.runs == wanted.digest or facts.held is not None:
                return _begin(wanted, facts)
            return old if facts.proof is None else _proved(old, facts.proof)
        case "refused":
            if old.reason == "held":
                return old if facts.held is not None else _begin(wanted, facts)
            if facts.runs == wanted.digest:
                return _begin(wanted, facts)
            again = chosen and facts.held is None and facts.proof is not None and not facts.proof.reason
            over = old.reason not in _PASSING and facts.held is None
            return _proved(old, facts.proof) if again and facts.proof else _begin(wanted, facts) if over else old
        case "shadow":
            if not chosen or facts.runs == wanted.digest:
                return _begin(wanted, facts)
            if (bad := _bad(facts)) is not None:
                return _to(wanted, "refused", bad.reason, bad.why, bad.numbers)
            return old if wanted.strategy == "shadow" else _proved(old, Finding("", "it was looked at long enough"))
        case "probation" | "settled":
            return _going_on(old, facts)
        case "rolled back":
            return old if facts.held is not None or not chosen else _begin(wanted, facts)
        case "withdrawn":
            stays = old.changed_here and old.configured == facts.configured and facts.runs != wanted.digest
            return old if stays else _begin(wanted, facts)


def _going_on(old: Standing, facts: Facts) -> Standing:
    """A bundle that runs: nobody needs to want it."""
    wanted = old.wanted
    if old.phase == "probation":
        if (bad := _bad(facts)) is not None:
            return _to(wanted, "rolled back", bad.reason, bad.why, bad.numbers)
        if facts.runs == wanted.digest:
            return _to(wanted, "settled", "", "the config names it")
        if _reconfigured(old, facts):
            return _changed_here(wanted, facts)
        if facts.wanted is not None and facts.wanted.strategy == "shadow" and _same(old, facts.wanted):
            return _to(wanted, "shadow", "", "it is to be looked at again, and answers beside")
        return old if facts.enough is None else _to(wanted, "settled", "", facts.enough.why, facts.enough.numbers)
    if old.phase == "settled" and facts.runs != wanted.digest:
        if facts.aside:
            return _to(wanted, "rolled back", "crash", facts.aside)
        return _changed_here(wanted, facts)
    return old


def _begin(wanted: Wanted, facts: Facts) -> Standing:
    """A roll-out, or a step of it, from nothing."""
    if not wanted.chosen(facts.device):
        why = f"{wanted.percent:g} % of the devices take part, and this is none of them"
        return _to(wanted, "not chosen", "", why)
    if facts.runs == wanted.digest:
        return _to(wanted, "settled", "", "it runs already")
    if facts.held is not None:
        hours = max(0.0, facts.held.until_s - facts.now_s) / 3600
        why = f"it is held for {hours:.1f} h of uptime more: {facts.held.why}"
        return _to(wanted, "refused", "held", why, {"hours": round(hours, 2)})
    return _to(wanted, "fetching", "", "")


def _proved(old: Standing, proof: Finding) -> Standing:
    wanted = old.wanted
    if proof.reason:
        return _to(wanted, "refused", proof.reason, proof.why, proof.numbers)
    phase: Phase = "shadow" if wanted.strategy == "shadow" else "probation"
    return _to(wanted, phase, "", proof.why, proof.numbers)


def _back(old: Standing | None, wanted: Wanted, facts: Facts) -> Standing:
    """Who runs the bundle or tries it leaves it."""
    why = f"roll-out {wanted.rollout} was called back"
    if old is not None and _about(old, wanted) and old.phase in _TRIED:
        return _to(wanted, "withdrawn", "aborted", why)
    if old is not None and old.phase == "probation":
        return _going_on(old, facts)
    if not _leaves(facts):
        if old is not None and _about(old, wanted) and old.phase in ("refused", "rolled back", "withdrawn"):
            return replace(old, wanted=wanted)
        return _to(wanted, "withdrawn", "aborted", f"{why}; this device does not run it")
    if not facts.before:
        return _to(wanted, "refused", "unfit", f"{why}, but no other bundle that ran here is kept; it goes on")
    if facts.proof is None:
        return _to(wanted, "settled", "", f"{why}; it runs until the one before has proved itself again")
    if facts.proof.reason:
        return _to(wanted, "refused", facts.proof.reason, f"{why}, but the one before does not run: {facts.proof.why}")
    return _to(wanted, "withdrawn", "aborted", f"{why}; the one before runs again")


def _leaves(facts: Facts) -> bool:
    """Whether the task runs, for good, what it is to leave."""
    wanted = facts.wanted
    return wanted is not None and wanted.strategy == "back" and facts.runs == wanted.digest


def _changed_here(wanted: Wanted, facts: Facts) -> Standing:
    why = "the config on this device names another bundle since, which runs instead"
    return replace(_to(wanted, "withdrawn", "", why), changed_here=True)


def _reconfigured(old: Standing, facts: Facts) -> bool:
    return "" not in (old.configured, facts.configured) and old.configured != facts.configured


def _bad(facts: Facts) -> Finding | None:
    """What speaks against a bundle that runs, or that does not even start again."""
    if facts.against is not None:
        return facts.against
    return facts.proof if facts.proof is not None and facts.proof.reason else None


def _same(old: Standing, wanted: Wanted) -> bool:
    return old.wanted.rollout == wanted.rollout and old.wanted.digest == wanted.digest


def _about(old: Standing, wanted: Wanted) -> bool:
    return old.wanted.digest == wanted.digest


def _to(wanted: Wanted, phase: Phase, reason: Reason, why: str, numbers: Mapping[str, Any] | None = None) -> Standing:
    return Standing(wanted, phase, reason, why, dict(numbers or {}))


def _dated(new: Standing | None, facts: Facts) -> Standing | None:
    if new is None:
        return None
    under_way = new.phase in _TRIED and (new.phase, new.wanted.strategy) != ("shadow", "shadow")
    late = new.late if facts.over is None else facts.over
    new = replace(new, late=late and under_way and new.wanted.strategy != "back")
    return replace(new, since=facts.now, since_s=facts.now_s, configured=new.configured or facts.configured)


def held_for(new: Standing, at_s: float) -> Held | None:
    """Whether the bundle is not to be tried for a while after this step, and why."""
    if new.phase not in ("refused", "rolled back") or new.reason in _PASSING or new.wanted.strategy == "back":
        return None
    hold_s = max(_LEAST_HOLD_S, new.wanted.rules.hold_hours * 3600)
    return Held(at_s + hold_s, f"{new.phase} for {new.reason}: {new.why}"[:500])
