"""When a step is over, goes on, or ends the roll-out: by what devices count, in intervals, and by how many failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outstation.fleet.rollout.promotion import StepVerdict
from outstation.foundation import clock
from outstation.protocol.wire.desired_state import OutputLimits
from outstation.workbench.testing.messages import MODEL, NEW_MODEL, MessageSender, new_key
from tests.kit.fleet_rollouts import HOUR_US, NOW_US, Fleet, fleet, plan, promotion

ANSWERED = {"windows": 100, "seconds": 0.1, "scores": {"n": 100, "mean": 0.9, "m2": 1.0}}


def answered(mean: float = 0.9, seconds: float = 0.1, off: float | None = None) -> dict[str, Any]:
    expected = {"n": 100, "mean": mean, "m2": 1.0}
    errors = {} if off is None else {"abs_error": {"n": 100, "mean": off, "m2": 1.0}}
    return {**ANSWERED, "seconds": seconds, "expected_accuracy": expected, **errors}


@pytest.fixture
def six(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as made:
        yield made


def rules(verdict: StepVerdict) -> dict[str, str]:
    return {finding.rule: finding.state for finding in verdict.rule_results}


def test_a_step_with_enough_evidence_is_promoted(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow()
    verdict = six.look(2.0).verdict
    assert (verdict.outcome, verdict.blockers, rules(verdict)) == ("promote", [], {"agreement": "passed"})
    assert verdict.summary.startswith("agreement 0.960 [")
    assert "over 36 blocks of 6 devices (at least 0.9: passed), 6 of 3 required devices report" in verdict.summary


@pytest.mark.parametrize(
    ("later_h", "devices", "blocks", "waits"),
    [
        (0.5, 6, 6, "30 min 00 s more"),
        (0.9999, 6, 6, "1 s more"),
        (2.0, 2, 6, "devices with 20 batches: 2 of 3; missing pi-02 (has not reported, never seen), pi-03 (has"),
        (2.0, 6, 3, "devices with 20 batches: 0 of 3; missing pi-00 (shadow, 15 of 20 batches), pi-01 (shadow, 15 of"),
        (2.0, 0, 6, "devices with 20 batches: 0 of 3; missing pi-00 (has not reported, never seen), pi-01 (has not"),
        (2.0, 0, 6, ", pi-04 (has not reported, never seen) and 1 more"),
    ],
    ids=["half an hour", "a second", "devices", "batches", "nobody", "not all"],
)
def test_blockers_name_what_is_missing(six: Fleet, later_h: float, devices: int, blocks: int, waits: str) -> None:
    six.start(plan())
    six.in_shadow(six.senders[:devices], blocks)
    verdict = six.look(later_h).verdict
    assert verdict.outcome == "wait"
    assert any(waits in blocker for blocker in verdict.blockers), verdict.blockers


def test_an_interval_that_contains_the_limit_is_undecided(six: Fleet) -> None:
    six.start(plan())
    for sender, same in zip(six.senders, (99, 99, 99, 99, 99, 60), strict=True):
        six.in_shadow([sender], agreeing=same)
    verdict = six.look().verdict
    [finding] = verdict.rule_results
    assert finding.value is not None
    assert (finding.state, finding.value > 0.9, verdict.outcome) == ("undecided", True, "wait")


def test_a_disagreeing_model_is_aborted_in_shadow(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(agreeing=30)
    verdict = six.look(0.1).verdict
    assert (verdict.outcome, rules(verdict)) == ("abort", {"agreement": "failed"})


def test_a_rule_that_fails_on_too_few_devices_does_not_abort(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(six.senders[:2], agreeing=30)
    verdict = six.look().verdict
    assert (verdict.outcome, rules(verdict)) == ("wait", {"agreement": "failed"})


@pytest.mark.parametrize(
    ("limits", "numbers", "answer"),
    [
        ({"max_latency_ratio": 1.5}, {"other_stats": answered(seconds=0.12)}, "promote"),
        ({"max_latency_ratio": 1.5}, {"other_stats": answered(seconds=0.3)}, "abort"),
        ({"max_accuracy_drop": 0.02}, {"other_stats": answered(0.91), "stats": answered()}, "promote"),
        ({"max_accuracy_drop": 0.02}, {"other_stats": answered(0.7), "stats": answered()}, "abort"),
        ({"max_error_growth": 0.1}, {"other_stats": answered(off=2.0), "stats": answered(off=1.9)}, "promote"),
        ({"max_error_growth": 0.1}, {"other_stats": answered(off=3.0), "stats": answered(off=1.9)}, "abort"),
        ({"max_accuracy_drop": 0.02}, {"labelled": [90, 1, 1, 8]}, "promote"),
        ({"max_accuracy_drop": 0.02}, {"labelled": [60, 30, 1, 9]}, "abort"),
        ({"max_error_growth": 0.1}, {}, "wait"),
    ],
    ids=["fast", "slow", "as sure", "less sure", "as near", "less near", "as right", "less right", "no labels"],
)
def test_each_rule_uses_its_own_numbers(
    six: Fleet, limits: dict[str, float], numbers: dict[str, Any], answer: str
) -> None:
    six.start(plan(rules=promotion(min_agreement=None, **limits)))
    six.in_shadow(**numbers)
    assert six.look().verdict.outcome == answer


def wear(agreeing: int | None = None, off: float | None = None, **changes: Any) -> dict[str, Any]:
    """Return the sums of an output `wear`, of which the new bundle's error is `off` times the old one's."""
    side: dict[str, Any] = {"windows": 100, "seconds": 0.0}
    other = side
    if off is not None:
        side, other = ({**side, "abs_error": {"n": 50, "mean": mean, "m2": 1.0}} for mean in (1.0, off))
    return {"outputs": {"wear": {"n": 100, "agreeing": agreeing, "stats": side, "other_stats": other, **changes}}}


AS_NEAR = {"stats": answered(off=1.0), "other_stats": answered(off=1.0)}


@pytest.mark.parametrize(
    ("limits", "numbers", "outcome", "states"),
    [
        ({}, wear(96), "promote", {"agreement": "passed", "wear/agreement": "passed"}),
        ({}, wear(40), "abort", {"agreement": "passed", "wear/agreement": "failed"}),
        ({}, wear(), "promote", {"agreement": "passed"}),
        ({}, wear(error="only one of the two bundles has this output"), "wait", {"wear/agreement": "undecided"}),
        ({"max_error_growth": 0.1}, {**AS_NEAR, **wear(off=2.0)}, "abort", {"wear/error_ratio": "failed"}),
        ({"max_error_growth": 0.1}, {**AS_NEAR, **wear()}, "wait", {"wear/error_ratio": "undecided"}),
        (
            {"outputs": {"wear": OutputLimits(max_error_growth=0.1)}},
            wear(off=2.0),
            "abort",
            {"wear/error_ratio": "failed"},
        ),
        (
            {"outputs": {"wear": OutputLimits(max_error_growth=2.0)}},
            wear(off=2.0),
            "promote",
            {"wear/error_ratio": "passed"},
        ),
        ({"outputs": {"wear": OutputLimits(ignore=True)}}, wear(40), "promote", {"agreement": "passed"}),
    ],
    ids=["alike", "other classes", "numbers", "dropped", "worse", "no labels", "own", "wide", "ignored"],
)
def test_a_second_output_is_judged_like_the_first(
    six: Fleet, limits: dict[str, Any], numbers: dict[str, Any], outcome: str, states: dict[str, str]
) -> None:
    six.start(plan(rules=promotion(**limits)))
    six.in_shadow(**numbers)
    verdict = six.look().verdict
    assert verdict.outcome == outcome
    assert {name: state for name, state in rules(verdict).items() if name in states} == states
    assert [name for name in rules(verdict) if name.startswith("wear/")] == [n for n in states if n.startswith("wear/")]


@pytest.mark.attack("devices")
@pytest.mark.parametrize("blocks", [6, 12])
@pytest.mark.parametrize(
    ("honest", "lie"),
    [
        ({}, wear(0)),
        (wear(), wear(0)),
        (wear(96), wear()),
        (wear(96), wear(error="made up")),
        (wear(stats={"windows": 0, "seconds": 0.0}, error="only one has it"), wear(0)),
    ],
    ids=["made up", "numbers as classes", "classes as numbers", "no kind", "of the new bundle"],
)
def test_one_device_that_lies_about_an_output_neither_blocks_nor_ends_a_rollout(
    six: Fleet, honest: dict[str, Any], lie: dict[str, Any], blocks: int
) -> None:
    six.start(plan(rules=promotion(max_error_growth=10.0)))
    for devices, numbers in ((six.senders[:5], honest), (six.senders[5:], lie)):
        errors = {**AS_NEAR, **numbers}
        six.in_shadow(devices, blocks, **errors)
    verdict = six.look().verdict
    undecided = {name: state for name, state in rules(verdict).items() if state != "passed"}
    assert undecided == ({"wear/error_ratio": "undecided"} if honest == wear() else {})
    assert verdict.outcome == ("wait" if undecided else "promote")


def test_an_output_of_fewer_devices_than_a_step_needs_decides_nothing(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(six.senders[:4])
    six.in_shadow(six.senders[4:], **wear(0))
    assert (six.look().verdict.outcome, rules(six.look().verdict)) == ("promote", {"agreement": "passed"})


def test_a_comparison_in_two_messages_counts_as_one_block(six: Fleet) -> None:
    six.start(plan())
    nothing = {"windows": 0, "seconds": 0.0}
    part = {"n": 0, "agreeing": 0, "batches": 0, "stats": nothing, "other_stats": nothing, **wear(96)}
    six.in_shadow(blocks=0)
    for sender in six.senders * 6:
        head = sender.shadow()
        six.collect(head, sender.shadow(rows=[sender.row - 99, sender.row], **part))
    verdict = six.look().verdict
    assert rules(verdict) == {"agreement": "passed", "wear/agreement": "passed"}
    assert [(each.blocks, each.devices) for each in verdict.rule_results] == [(36, 6)] * 2


@pytest.mark.attack("devices")
@pytest.mark.parametrize("agreeing", [96, 40], ids=["alike", "other classes"])
def test_a_device_that_withholds_an_output_leaves_its_rule_undecided(six: Fleet, agreeing: int) -> None:
    six.start(plan(("shadow", 100.0), ("all", 100.0), rules=promotion(min_devices=6)))
    six.in_shadow(six.senders[:5], **wear(agreeing))
    six.in_shadow(six.senders[5:])
    verdict = six.look().verdict
    assert (verdict.outcome, rules(verdict)) == ("wait", {"agreement": "passed", "wear/agreement": "undecided"})
    [blocker] = verdict.blockers
    assert blocker.startswith(f"wear/agreement {agreeing / 100:.3f} [")
    assert blocker.endswith(": undecided); 5 of 6 required devices report this output; missing pi-05")


@pytest.mark.attack("devices")
@pytest.mark.parametrize("others", [0, 1, 3])
def test_half_of_the_devices_or_one_alone_decide_nothing_by_an_output_they_made_up(six: Fleet, others: int) -> None:
    six.start(plan(("shadow", 100.0), ("all", 100.0), rules=promotion(min_devices=6)))
    six.in_shadow(six.senders[: max(1, others)], **wear(0))
    six.in_shadow(six.senders[3 : 3 + others])
    assert rules(six.look().verdict).keys() == {"agreement"}


def test_an_output_that_only_the_new_bundle_has_blocks_nothing(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(**wear(stats={"windows": 0, "seconds": 0.0}, error="only one of the two bundles has this output"))
    assert six.look().verdict.outcome == "promote"


def test_a_dropped_output_is_named_with_its_reason(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(**wear(error="only one of the two bundles has this output"))
    blocker = six.look().verdict.blockers[-1]
    assert blocker.startswith("wear/agreement unknown over 36 blocks of 6 devices (at least 0.9: undecided; only one")


def test_expected_errors_accompany_the_measured_ones(six: Fleet) -> None:
    six.start(plan(rules=promotion(min_agreement=None, max_error_growth=0.1)))
    old, new = ({"n": 100, "mean": mean, "m2": 1.0} for mean in (2.0, 3.0))
    six.in_shadow(stats={**ANSWERED, "expected_error": old}, other_stats={**ANSWERED, "expected_error": new})
    [finding] = six.look().verdict.rule_results
    assert finding.state == "undecided", "they decide nothing"
    assert finding.text.endswith("; expected without labels: 3, of the previous bundle 2, ratio 1.500 [1.500, 1.500]")


def test_in_a_canary_step_the_new_bundle_is_the_active_one(six: Fleet) -> None:
    six.start(plan(("canary", 100.0), ("all", 100.0), rules=promotion(min_agreement=None, max_latency_ratio=1.5)))
    six.on_probation(six.senders, stats=answered(seconds=0.5), other_stats=answered(seconds=0.1))
    [finding] = six.look().verdict.rule_results
    assert finding.value == pytest.approx(5.0)
    assert finding.state == "failed"


def test_an_operator_must_decide_when_no_more_evidence_can_come(six: Fleet) -> None:
    six.start(plan(("canary", 100.0), ("all", 100.0)))
    six.on_probation(six.senders, 4, agreeing=90)
    verdict = six.look().verdict
    assert (verdict.outcome, verdict.rule_results[0].state) == ("wait", "undecided")
    assert verdict.blockers[-1].startswith("an operator's decision: all responding devices are done")


def test_the_last_step_finishes_with_undecided_but_not_failed_rules(six: Fleet) -> None:
    six.start(plan(("all", 100.0)))
    six.on_probation(six.senders, 4, agreeing=90, settles=False)
    verdict = six.look().verdict
    assert (verdict.outcome, verdict.rule_results[0].state) == ("wait", "undecided")
    six.collect(*(sender.rollout("active", strategy="all") for sender in six.senders))
    verdict = six.look().verdict
    assert (verdict.outcome, verdict.rule_results[0].state) == ("finish", "undecided")
    assert "(at least 0.9: undecided)" in verdict.summary
    six.collect(*(sender.shadow(model=NEW_MODEL, other=MODEL, agreeing=0) for sender in six.senders for _ in range(5)))
    assert six.look().verdict.outcome == "abort"


def test_labelled_accuracy_replaces_the_estimate(six: Fleet) -> None:
    six.start(plan(rules=promotion(min_agreement=None, max_accuracy_drop=0.02)))
    six.in_shadow(labelled=[90, 1, 1, 8], other_stats=answered(0.2))
    [finding] = six.look().verdict.rule_results
    assert (finding.rule, finding.state) == ("accuracy_gain", "passed")


def test_only_messages_of_the_steps_bundles_count(six: Fleet) -> None:
    other = {**NEW_MODEL, "digest": "sha256:" + "ee" * 32}
    six.start(plan())
    six.in_shadow()
    for sender in six.senders:
        six.collect(sender.shadow(other=other, agreeing=0), sender.shadow("another-roll-out", agreeing=0))
        six.collect(sender.shadow(model=NEW_MODEL, other=MODEL, agreeing=0), sender.shadow(model=NEW_MODEL, agreeing=0))
    [finding] = six.look().verdict.rule_results
    assert finding.value == pytest.approx(0.96)
    assert finding.blocks == 36


def test_a_device_that_rolled_back_counts_only_as_failed(tmp_path: Path) -> None:
    with fleet(tmp_path, 12) as many:
        many.start(plan(("canary", 100.0), ("all", 100.0)))
        many.on_probation(many.senders[1:])
        many.on_probation(many.senders[:1], settles=False, agreeing=0)
        many.collect(many.senders[0].rollout("rolled_back", reason="output_drift", strategy="canary"))
        verdict = many.look().verdict
        [finding] = verdict.rule_results
        assert (verdict.outcome, verdict.failed, verdict.responding, finding.devices) == ("promote", 1, 12, 11)


@pytest.mark.parametrize(
    ("failing", "reason", "answer"),
    [
        (1, "crash", "abort"),
        (3, "signature", "abort"),
        (2, "incompatible", "promote"),
        (2, "operator", "promote"),
        (2, "download_failed", "promote"),
    ],
)
def test_too_many_failed_devices_abort_but_incompatible_ones_do_not(
    six: Fleet, failing: int, reason: str, answer: str
) -> None:
    six.start(plan())
    six.in_shadow(six.senders[failing:])
    for sender in six.senders[:failing]:
        six.collect(sender.rollout("rejected", reason=reason))
    assert six.look().verdict.outcome == answer


def test_failures_that_may_still_be_few_only_block(tmp_path: Path) -> None:
    with fleet(tmp_path, 20) as many:
        many.start(plan())
        many.in_shadow(many.senders[2:8])
        for sender in many.senders[:2]:
            many.collect(sender.rollout("rejected", reason="golden_vectors"))
        verdict = many.look().verdict
        assert (verdict.outcome, verdict.blockers) == (
            "wait",
            [
                "fewer failed devices: 2 of 8 responding, 10 % allowed; failed: pi-00 (golden_vectors), "
                "pi-01 (golden_vectors)"
            ],
        )
        many.in_shadow(many.senders[8:])
        assert many.look().verdict.outcome == "promote"


def test_a_wider_canary_needs_reports_of_the_joining_devices(tmp_path: Path) -> None:
    with fleet(tmp_path, 16) as many:
        many.start(plan(("canary", 50.0), ("canary", 90.0), ("all", 100.0)))
        first, second = many.chosen(1), many.chosen(2)
        many.on_probation(first)
        assert many.look().verdict.outcome == "promote"
        many.promote()
        verdict = many.look(4.0).verdict
        assert (verdict.outcome, verdict.reporting) == ("wait", 0)
        joining = [sender for sender in second if sender not in first]
        assert len(joining) >= 3
        many.on_probation(joining[:3])
        assert (many.look(4.0).verdict.outcome, many.look(4.0).verdict.reporting) == ("promote", 3)


def test_the_last_step_waits_for_devices_in_progress_only(six: Fleet) -> None:
    six.start(plan(("canary", 100.0), ("all", 100.0)))
    six.on_probation(six.senders[:4])
    six.promote()
    six.collect(six.senders[4].rollout("downloading", strategy="all"))
    with six.store.transaction() as db:
        db.execute("UPDATE devices SET last_seen = ?", (clock.to_rfc3339(NOW_US + HOUR_US * 7 // 2),))
        db.execute("UPDATE devices SET last_seen = NULL WHERE device = ?", (six.senders[5].device,))
    verdict = six.look(4.0).verdict
    assert (verdict.outcome, verdict.blockers) == (
        "wait",
        [
            "devices in progress: 1, pi-04 (downloading); each tries the bundle for at least 1 h and 20 batches "
            "([device_rules])"
        ],
    )
    assert six.look(4.6).verdict.outcome == "finish"


def test_a_group_needs_min_devices_among_responding_ones(six: Fleet) -> None:
    six.start(plan(target="group:roof"))
    six.in_shadow(six.senders[:2])
    seen = six.look()
    assert (len(seen.devices.selected), seen.verdict.needed, seen.verdict.reporting) == (2, 3, 2)
    assert "devices with 20 batches: 2 of 3; this step selects 2 devices that responded" in seen.verdict.blockers
    six.in_shadow(six.senders[2:3], 12)
    assert six.look().verdict.outcome == "promote"


def test_the_last_step_of_a_group_needs_no_more_devices_than_join(six: Fleet) -> None:
    six.start(plan(("canary", 60.0), ("all", 100.0), target="group:roof"))
    first = six.chosen(1)
    joining = [sender for sender in six.senders if sender not in first]
    assert 0 < len(joining) < 3 <= len(first)
    six.collect(*(sender.rollout("not_selected") for sender in joining))
    six.on_probation(first)
    six.promote()
    verdict = six.look(4.0).verdict
    assert (verdict.outcome, verdict.reporting, verdict.needed) == ("wait", 0, len(joining))
    six.collect(*(sender.rollout("active", strategy="all") for sender in six.senders))
    assert six.look(4.0).verdict.outcome == "finish"


def test_a_device_target_counts_one_device(six: Fleet) -> None:
    six.start(plan(("shadow", 100.0), ("all", 100.0), target="device:pi-01", rules=promotion(min_devices=1)))
    six.in_shadow(six.senders[2:], agreeing=0)
    six.in_shadow([six.senders[1]], 12)
    seen = six.look()
    assert ([entry.device for entry in seen.devices.selected], seen.verdict.outcome) == (["pi-01"], "promote")


def test_the_newest_log_of_a_device_has_its_last_report(six: Fleet) -> None:
    six.start(plan())
    old = six.senders[0]
    six.collect(old.rollout("rejected", reason="golden_vectors"), old.rollout("rejected", reason="golden_vectors"))
    anew = MessageSender(old.device, old.key)
    evidence = {"old": old.log, "through": old.seq}
    six.collect(anew.append("audit", event="new log", summary="", evidence=evidence), anew.rollout("shadow"))
    assert six.look().devices.selected[0].phase == "shadow"


def test_a_revoked_device_does_not_count(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(six.senders[:3])
    six.in_shadow(six.senders[3:], agreeing=0)
    for sender in six.senders[3:]:
        six.store.revoke(sender.device, None, "2026-11-24T22:20:00.000000Z")
    seen = six.look()
    assert len(seen.devices.selected) == 3
    assert seen.verdict.rule_results[0].value == pytest.approx(0.96)


def test_an_unselected_device_cannot_influence_the_roll_out(tmp_path: Path) -> None:
    with fleet(tmp_path, 12) as many:
        many.start(plan(("canary", 50.0), ("all", 100.0)))
        chosen = many.chosen(1)
        outside = next(sender for sender in many.senders if sender not in chosen)
        many.on_probation(chosen)
        before = many.look().verdict
        many.on_probation([outside], 300, settles=False, agreeing=0)
        seen = many.look()
        assert seen.verdict == before
        assert len(seen.tallies.devices[outside.device].as_active) == 200


def test_a_flooding_device_counts_as_one(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(six.senders[1:])
    six.in_shadow(six.senders[:1], 250, n=1000, agreeing=960)
    [finding] = six.look().verdict.rule_results
    assert finding.value == pytest.approx(0.96)
    assert finding.devices == 6


def test_a_device_counts_at_most_twice_the_median_windows(six: Fleet) -> None:
    six.start(plan())
    six.in_shadow(six.senders[1:])
    six.senders[0].row = 0
    six.in_shadow(six.senders[:1], 3, n=2**50, agreeing=0)
    six.in_shadow(six.senders[:1], 30, agreeing=30)
    [finding] = six.look().verdict.rule_results
    assert finding.value == pytest.approx((5 * 6 * 96 + 12 * 30) / (5 * 600 + 1200), abs=1e-4)
    assert finding.state == "undecided"


@pytest.mark.parametrize(
    "lie",
    [
        {"n": 10_000_000, "rows": [1, 100], "agreeing": 10_000_000},
        {"errors": 6},
        {"labelled": [2**52, 0, 0, 0]},
        {"stats": {**ANSWERED, "windows": 101}},
        {"stats": {**ANSWERED, "expected_accuracy": {"n": 101, "mean": 0.9, "m2": 1.0}}},
        {"stats": {**ANSWERED, "seconds": 1e100}, "other_stats": {**ANSWERED, "seconds": 1e-100}},
        {"other_stats": {**ANSWERED, "expected_accuracy": {"n": 100, "mean": 1e90, "m2": 0}}},
        {"other_stats": {**ANSWERED, "expected_accuracy": {"n": 100, "mean": 0.5, "m2": 1e9}}},
        {"difference": {"n": 101, "mean": 0, "m2": 0}},
        {"other_stats": {**ANSWERED, "expected_error": {"n": 100, "mean": -1.0, "m2": 0}}},
        {"outputs": {"wear": {"n": 101, "agreeing": 101}}},
        {"outputs": {"wear": {"n": 1, "agreeing": 1, "stats": {"windows": 101, "seconds": 0.0}}}},
    ],
    ids=lambda lie: " ".join(lie),
)
def test_implausible_statistics_are_left_out_and_reported(six: Fleet, lie: dict[str, Any]) -> None:
    six.start(plan(rules=promotion(max_latency_ratio=1.5, max_accuracy_drop=0.02)))
    honest, liar = six.senders[:5], six.senders[5]
    six.in_shadow(honest)
    before = six.look().verdict
    six.collect(*(liar.shadow(**lie) for _ in range(5)))
    seen = six.look()
    assert [f.text for f in seen.verdict.rule_results] == [f.text for f in before.rule_results]
    assert seen.tallies.devices[liar.device].implausible_count == 5
    assert seen.tallies.devices[liar.device].implausible_reason


def test_a_forged_message_adds_nothing(six: Fleet) -> None:
    six.start(plan())
    forger = MessageSender(six.senders[0].device, new_key(666))
    six.in_shadow([forger], agreeing=0)
    seen = six.look()
    assert (seen.tallies.devices, seen.verdict.responding) == ({}, 0)
