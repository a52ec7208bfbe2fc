"""State machine of a roll-out: every transition, and laws that hold for all of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.device.bundles.rollout_state import HoldOff, RolloutState
from outstation.device.rollout.state_machine import (
    BundleAssessment,
    RolloutFacts,
    compute_hold_off,
    decide_next_state,
    select_target_digest,
)
from outstation.protocol.wire.desired_state import CanaryRules, DesiredBundle, Phase

OLD, NEW, OTHER = ("sha256:" + letter * 64 for letter in "abc")
FINE, BROKEN = BundleAssessment("", "its golden vectors came out"), BundleAssessment("golden_vectors", "they did not")
CRASH = BundleAssessment("crash", "it died of SIGSEGV")
ENOUGH = BundleAssessment("", "20 batches in 1.0 h and nothing against it")


def want(strategy: str = "shadow", digest: str = NEW, rollout: str = "r1", **more: Any) -> DesiredBundle:
    return DesiredBundle(rollout, "tiny", "2", digest, strategy, **more)  # type: ignore[arg-type]


def facts(wanted: DesiredBundle | None = None, **more: Any) -> RolloutFacts:
    return replace(RolloutFacts("pi-07", wanted, OLD, OLD, "2026-11-26T00:00:00Z", 1000.0), **more)


def at(phase: Phase, wanted: DesiredBundle | None = None, **more: Any) -> RolloutState:
    return RolloutState(wanted or want(), phase, configured_digest=OLD, **more)


def phase_of(state: RolloutState | None) -> str:
    return "" if state is None else state.phase


def after(old: RolloutState | None, seen: RolloutFacts) -> str:
    """The phase, and behind a slash the reason if there is one."""
    new = decide_next_state(old, seen)
    return phase_of(new) + (f"/{new.reason}" if new is not None and new.reason else "")


NOBODY: dict[str, Any] = {"percent": 0.0}
STEPS = [
    ("nothing is desired", None, facts(), ""),
    ("a shadow begins with fetching", None, facts(want()), "downloading"),
    ("it is not for this device", None, facts(want(**NOBODY)), "not_selected"),
    ("the bundle runs already", None, facts(want("all", OLD)), "active"),
    ("the bundle is held", None, facts(want(), hold_off=HoldOff(5000, "crash")), "rejected/hold_off"),
    ("the share grows", at("not_selected", want(**NOBODY)), facts(want("canary")), "downloading"),
    ("it waits for the bundle", at("downloading"), facts(want()), "downloading"),
    ("it proved itself, for a shadow", at("downloading"), facts(want(), readiness=FINE), "shadow"),
    ("it proved itself, for a canary", at("downloading"), facts(want("canary"), readiness=FINE), "canary"),
    ("it proved itself, for all", at("downloading"), facts(want("all"), readiness=FINE), "canary"),
    ("golden vectors fail", at("downloading"), facts(want(), readiness=BROKEN), "rejected/golden_vectors"),
    ("nobody wants what is fetched", at("downloading"), facts(), "cancelled"),
    ("no longer chosen while fetching", at("downloading"), facts(want(**NOBODY)), "not_selected"),
    ("no longer chosen in shadow", at("shadow"), facts(want(**NOBODY), readiness=FINE), "not_selected"),
    ("no longer chosen on probation", at("canary"), facts(want("canary", **NOBODY)), "canary"),
    ("nobody wants the shadow", at("shadow"), facts(), "cancelled"),
    ("nobody wants what is on probation", at("canary"), facts(), "canary"),
    ("nobody wants it and it settles", at("canary"), facts(completion=ENOUGH), "active"),
    ("nobody wants it and it fails", at("canary"), facts(failure=CRASH), "rolled_back/crash"),
    ("a shadow goes on", at("shadow"), facts(want(), readiness=FINE), "shadow"),
    ("a shadow crashes", at("shadow"), facts(want(), failure=CRASH), "rejected/crash"),
    ("a shadow comes to its turn", at("shadow"), facts(want("canary")), "canary"),
    ("a restart finds a broken shadow", at("shadow"), facts(want(), readiness=BROKEN), "rejected/golden_vectors"),
    ("probation goes on", at("canary", want("all")), facts(want("all")), "canary"),
    ("probation was long enough", at("canary", want("all")), facts(want("all"), completion=ENOUGH), "active"),
    ("long enough, but", at("canary"), facts(want("all"), completion=ENOUGH, failure=CRASH), "rolled_back/crash"),
    ("a restart finds it broken", at("canary"), facts(want("all"), readiness=BROKEN), "rolled_back/golden_vectors"),
    ("probation becomes a shadow again", at("canary"), facts(want("shadow")), "shadow"),
    ("another roll-out wants this device", at("canary"), facts(want("all", OTHER, "r2")), "cancelled"),
    ("another roll-out wants others", at("canary"), facts(want("all", OTHER, "r2", **NOBODY)), "canary"),
    ("the next one begins after that", at("cancelled"), facts(want("all", OTHER, "r2")), "downloading"),
    ("config changed on probation", at("canary"),
     facts(want("all"), running_digest=OTHER, configured_digest=OTHER), "cancelled"),
    ("config changed to it", at("canary"), facts(want("all"), running_digest=NEW, configured_digest=NEW), "active"),
    ("config changed when settled", at("active"),
     facts(want("all"), running_digest=OTHER, configured_digest=OTHER), "cancelled"),
    ("it was set aside", at("active"), facts(want("all"), quarantine_reason="it died twice"), "rolled_back/crash"),
    ("called back in shadow", at("shadow"), facts(want("rollback")), "cancelled/aborted"),
    ("called back on probation", at("canary"), facts(want("rollback")), "cancelled/aborted"),
    ("called back where it was not taken", None, facts(want("rollback")), "cancelled/aborted"),
    ("called back when settled", at("active"),
     facts(want("rollback"), running_digest=NEW, fallback_digest=OLD), "active"),
    ("the other is here", at("active"),
     facts(want("rollback"), running_digest=NEW, fallback_digest=OLD, readiness=FINE), "cancelled/aborted"),
    ("nothing to go back to", at("active"), facts(want("rollback"), running_digest=NEW), "rejected/incompatible"),
    ("held after it was taken back", at("rolled_back"), facts(want("all"), hold_off=HoldOff(5000, "")), "rolled_back"),
    ("the hold is over", at("rolled_back"), facts(want("all")), "downloading"),
    ("refused stays refused", at("rejected", reason="golden_vectors"),
     facts(want(), hold_off=HoldOff(5000, "")), "rejected/golden_vectors"),
    ("refused is tried again after the hold", at("rejected", reason="golden_vectors"), facts(want()), "downloading"),
    ("a hold is over", at("rejected", reason="hold_off"), facts(want()), "downloading"),
    ("the repository came back", at("rejected", reason="download_failed"), facts(want(), readiness=FINE), "shadow"),
    ("it still does not answer", at("rejected", reason="download_failed"),
     facts(want(), readiness=BROKEN), "rejected/download_failed"),
    ("nobody wants the refused one", at("rejected", reason="golden_vectors"), facts(), "cancelled"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "seen", "wanted"), [step[1:] for step in STEPS], ids=[step[0] for step in STEPS])
def test_each_step(old: RolloutState | None, seen: RolloutFacts, wanted: str) -> None:
    assert after(old, seen) == wanted


def test_a_local_config_change_holds_until_the_next_one() -> None:
    changed = decide_next_state(at("active"), facts(want("all"), running_digest=OTHER, configured_digest=OTHER))
    assert changed is not None
    assert "config on this device" in changed.detail
    assert decide_next_state(changed, facts(want("all"), running_digest=OTHER, configured_digest=OTHER)) is changed
    assert after(changed, facts(want("all"), running_digest=OLD, configured_digest=OLD)) == "downloading"
    assert after(changed, facts(want("all", OLD, "r2"), running_digest=OTHER, configured_digest=OTHER)) == "downloading"


def test_lateness_is_reported_once_and_ends_with_activation() -> None:
    fetching = decide_next_state(None, facts(want("all"), is_deadline_passed=False))
    late = decide_next_state(fetching, facts(want("all"), is_deadline_passed=True))
    assert fetching is not None
    assert late is not None
    assert (fetching.late, late.late, late.phase, late.since_s) == (False, True, "downloading", fetching.since_s)
    assert decide_next_state(late, facts(want("all"), is_deadline_passed=True)) is late
    assert decide_next_state(late, facts(want("all"), is_deadline_passed=None)) is late
    probation = decide_next_state(late, facts(want("all"), is_deadline_passed=True, readiness=FINE))
    assert probation is not None
    assert probation.late
    settled = decide_next_state(probation, facts(want("all"), is_deadline_passed=True, completion=ENOUGH))
    assert settled is not None
    assert (settled.phase, settled.late) == ("active", False)


def test_a_larger_percentage_alone_is_not_reported() -> None:
    old = at("canary", want("canary", percent=99.0), since_s=5.0, previous_history="x")
    new = decide_next_state(old, facts(want("canary", percent=100.0)))
    assert new is not None
    assert (new.audit_key == old.audit_key, new.since_s, new.previous_history) == (True, 5.0, "x")
    assert new.desired.percent == 100.0


@pytest.mark.parametrize(
    ("phase", "reason", "hours"),
    [
        ("rolled_back", "crash", 2.0),
        ("rolled_back", "operator", 2.0),
        ("rejected", "golden_vectors", 2.0),
        ("rejected", "download_failed", None),
    ],
)
def test_only_evidence_against_a_bundle_begins_a_hold_off(phase: Phase, reason: Any, hours: float | None) -> None:
    result = compute_hold_off(at(phase, want(rules=CanaryRules(hold_off_hours=2.0)), reason=reason), 100.0)
    assert (result and (result.until_s - 100.0) / 3600) == hours


findings = st.sampled_from(
    [
        None,
        FINE,
        BROKEN,
        CRASH,
        BundleAssessment("download_failed", "no [updates]"),
        BundleAssessment("incompatible", "field z"),
    ]
)
wants = st.one_of(
    st.none(),
    st.builds(
        lambda strategy, digest, rollout, percent: want(strategy, digest, rollout, percent=percent),
        st.sampled_from(["shadow", "canary", "all", "rollback"]),
        st.sampled_from([OLD, NEW, OTHER]),
        st.sampled_from(["r1", "r2"]),
        st.sampled_from([0.0, 30.0, 100.0]),
    ),
)
seen = st.builds(
    lambda wanted, runs, configured, held, proof, against, enough, before, aside, over: facts(
        wanted,
        running_digest=runs,
        configured_digest=configured,
        hold_off=HoldOff(9000.0, "it crashed") if held else None,
        readiness=proof,
        failure=CRASH if against else None,
        completion=ENOUGH if enough else None,
        fallback_digest=before,
        quarantine_reason=aside,
        is_deadline_passed=over,
    ),
    wants,
    st.sampled_from([OLD, NEW, OTHER, ""]),
    st.sampled_from([OLD, NEW, OTHER, ""]),
    st.booleans(),
    findings,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["", OLD, OTHER]),
    st.sampled_from(["", "it died twice"]),
    st.sampled_from([None, True, False]),
)


# A history that only chance writes seldom gets as far as a candidate that runs.
openings = st.sampled_from(
    [
        [],
        [facts(want("shadow"), readiness=FINE)],
        [facts(want("canary"), readiness=FINE)],
        [facts(want("all"), readiness=FINE), facts(want("all"), readiness=FINE, completion=ENOUGH)],
    ]
)
histories = st.builds(lambda opening, rest: [*opening, *rest], openings, st.lists(seen, max_size=12))


def held_by(step: RolloutState | None, facts: RolloutFacts) -> RolloutFacts:
    wanted = facts.desired if facts.desired is not None or step is None else step.desired
    result = None if step is None else compute_hold_off(step, facts.uptime_s)
    same = step is not None and wanted is not None and step.desired.digest == wanted.digest
    return replace(facts, hold_off=result) if result is not None and same else facts


def settle(old: RolloutState | None, facts: RolloutFacts) -> list[RolloutState | None]:
    """Every standing that the same facts lead to, the first `old`; what a step holds is held from there on."""
    road = [old]
    while len(road) < 20:
        new = decide_next_state(road[-1], facts)
        if new is road[-1]:
            return road
        road.append(new)
        facts = held_by(new, facts)
    raise AssertionError(f"it never comes to rest: {[phase_of(step) for step in road]}")


@given(histories)
def test_repeated_facts_reach_a_fixed_point(history: list[RolloutFacts]) -> None:
    now: RolloutState | None = None
    for item in history:
        now = settle(now, item)[-1]
        # What is kept is what was decided.
        if now is not None:
            assert msgspec.json.decode(msgspec.json.encode(now), type=RolloutState) == now


@given(histories, st.data())
def test_a_crash_between_any_two_steps_reaches_the_same_state(history: list[RolloutFacts], data: st.DataObject) -> None:
    now: RolloutState | None = None
    for item in history:
        road = settle(now, item)
        died = data.draw(st.sampled_from(road))
        restarted = None if died is None else msgspec.json.decode(msgspec.json.encode(died), type=RolloutState)
        # The first is how it stood; what that held may be over.
        for step in road[1 : road.index(died) + 1]:
            item = held_by(step, item)
        assert settle(restarted, item)[-1] == road[-1]
        now = road[-1]


@given(histories)
def test_no_unverified_or_held_off_bundle_ever_runs(history: list[RolloutFacts]) -> None:
    """Hypothesis fails if too few histories start a bundle."""
    now: RolloutState | None = None
    starts = 0
    for item in history:
        for before, step in zip(road := settle(now, item), road[1:], strict=False):
            if step is not None and step.phase in ("shadow", "canary") and phase_of(before) != step.phase:
                assert before is not None
                assert before.phase in ("shadow", "canary") or (item.readiness == FINE and item.hold_off is None)
                assert step.desired.digest == before.desired.digest
                starts += 1
        now = road[-1]
    assume(starts)


@given(histories)
def test_no_other_bundle_is_tried_before_the_canary_ends(history: list[RolloutFacts]) -> None:
    """Hypothesis fails if too few histories leave a canary."""
    now: RolloutState | None = None
    ends = 0
    for item in history:
        for before, step in zip(road := settle(now, item), road[1:], strict=False):
            if before is not None and before.phase == "canary":
                assert step is not None
                assert step.desired.digest == before.desired.digest
                ends += 1
        now = road[-1]
    assume(ends)


@given(histories)
def test_no_bundle_is_obtained_without_need(history: list[RolloutFacts]) -> None:
    """Hypothesis fails if too few histories have moments with a need and moments without."""
    now: RolloutState | None = None
    needs: set[bool] = set()
    for item in history:
        now = settle(now, item)[-1]
        wanted = select_target_digest(now, item)
        # Called back, it is the one before that proves itself again.
        back = item.desired is not None and item.desired.strategy == "rollback"
        if now is None or (now.phase in ("not_selected", "rolled_back", "cancelled") and not back):
            assert wanted == ""
            needs.add(False)
        if wanted:
            needs.add(True)
            assert wanted in (item.fallback_digest, now and now.desired.digest)
    assume(len(needs) == 2)
