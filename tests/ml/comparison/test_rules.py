"""Intervals hold what they promise where blocks are alike; a bundle is bad or good only where all of one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from outstation.ml.comparison import paired_intervals
from outstation.ml.comparison import rules as verdict
from outstation.ml.comparison.paired_intervals import ComparisonBlock, ComparisonEstimate
from outstation.ml.comparison.rules import RuleLimits
from outstation.ml.comparison.tally import ComparisonStats
from outstation.protocol.wire.desired_state import CanaryRules, OutputLimits
from outstation.protocol.wire.messages import BundleStats, Moments

REPEATS = 200


def alike(random: np.random.Generator, correlation: float, count: int) -> np.ndarray:
    """(count,) standard normal, each as alike to the one before."""
    result = random.normal(size=count)
    for i in range(1, count):
        result[i] = correlation * result[i - 1] + np.sqrt(1 - correlation**2) * result[i]
    return result


def blocks_of(random: np.random.Generator, correlation: float, count: int, devices: int = 1) -> list[ComparisonBlock]:
    """Agreement wanders around 0.9, labelled gain around -0.05, time around twice, estimate around -0.1."""
    collected = []
    for device in range(devices):
        wander = alike(random, correlation, count)
        share = 1 / (1 + np.exp(-(2.5 + 0.6 * wander)))
        n = random.integers(20, 60, count)
        slow = np.exp(0.2 * alike(random, correlation, count))
        doubt = 0.03 * alike(random, correlation, count)
        for i in range(count):
            m, size = int(n[i]), float(n[i])
            same = int(random.binomial(m, share[i]))
            outcomes = random.multinomial(m // 2, [0.8, 0.1, 0.05, 0.05])
            model = BundleStats(m, 0.001 * size, expected_accuracy=Moments(m, 0.9, 0.0), abs_error=Moments(m, 1.0, 0.0))
            worse = 1.2 * float(slow[i])
            other_stats = BundleStats(
                m, 0.002 * size * float(slow[i]), expected_accuracy=Moments(m, 0.8 + float(doubt[i]), 0.0)
            )
            other_stats = BundleStats(*_members(other_stats)[:4], correct=0, abs_error=Moments(m, worse, 0.0))
            a, b, c, d = (int(entry) for entry in outcomes)
            collected.append(
                ComparisonBlock(
                    ComparisonStats(1, m, same, Moments(), model, other_stats, (a, b, c, d)), f"pi-{device}"
                )
            )
    return collected


def _members(stats: BundleStats) -> tuple[int, float, Moments, Moments]:
    return stats.windows, stats.seconds, stats.scores, stats.expected_accuracy


def coverage(
    estimate: Callable[[Sequence[ComparisonBlock]], ComparisonEstimate | None],
    truth: float,
    correlation: float,
    count: int,
    devices: int = 1,
) -> float:
    hits = 0
    for seed in range(REPEATS):
        result = estimate(blocks_of(np.random.default_rng(seed), correlation, count, devices))
        assert result is not None
        hits += result.low <= truth <= result.high
    return hits / REPEATS


def true_share() -> float:
    wander = np.random.default_rng(1).normal(size=400_000)
    return float((1 / (1 + np.exp(-(2.5 + 0.6 * wander)))).mean())


@pytest.mark.parametrize(("correlation", "count"), [(0.0, 12), (0.4, 20), (0.6, 60)])
def test_the_interval_of_agreement_holds_the_truth_as_often_as_it_says(correlation: float, count: int) -> None:
    assert 0.91 <= coverage(paired_intervals.agreement, true_share(), correlation, count) <= 0.995


@pytest.mark.parametrize(("correlation", "count"), [(0.0, 12), (0.4, 20), (0.6, 60)])
def test_the_interval_of_latency_holds_the_truth_as_often_as_it_says(correlation: float, count: int) -> None:
    share = coverage(
        lambda part: paired_intervals.latency_ratio(part, new_is_other=True), 2 * np.exp(0.02), correlation, count
    )
    assert 0.91 <= share <= 0.995


@pytest.mark.parametrize(("correlation", "count"), [(0.0, 12), (0.4, 20), (0.6, 60)])
def test_the_interval_of_labels_holds_the_truth_as_often_as_it_says(correlation: float, count: int) -> None:
    share = coverage(
        lambda part: paired_intervals.labelled_accuracy_gain(part, new_is_other=True), -0.05, correlation, count
    )
    assert 0.91 <= share <= 1


@pytest.mark.parametrize(("correlation", "count"), [(0.0, 12), (0.4, 20), (0.6, 60)])
def test_the_interval_of_the_estimate_holds_the_truth_as_often_as_it_says(correlation: float, count: int) -> None:
    share = coverage(
        lambda part: paired_intervals.expected_accuracy_gain(part, new_is_other=True), -0.1, correlation, count
    )
    assert 0.91 <= share <= 0.995


def test_the_interval_of_errors_holds_the_truth_as_often_as_it_says() -> None:
    share = coverage(lambda part: paired_intervals.error_ratio(part, new_is_other=True), 1.2 * np.exp(0.02), 0.4, 20)
    assert 0.91 <= share <= 0.995


def test_with_enough_devices_intervals_count_devices() -> None:
    def spread(seed: int) -> list[ComparisonBlock]:
        random = np.random.default_rng(seed)
        shares = 1 / (1 + np.exp(-(2.5 + 0.6 * random.normal(size=8))))
        return [
            ComparisonBlock(ComparisonStats(1, 50, int(random.binomial(50, share))), f"pi-{i}")
            for i, share in enumerate(shares.tolist())
            for _ in range(30)
        ]

    hits = 0
    for seed in range(REPEATS):
        result = paired_intervals.agreement(spread(seed))
        assert result is not None
        assert (result.unit_kind, result.unit_count) == ("devices", 8)
        hits += result.low <= true_share() <= result.high
    assert 0.91 <= hits / REPEATS <= 0.995


def test_few_blocks_give_no_interval() -> None:
    few = [ComparisonBlock(ComparisonStats(1, 10_000, 10_000))] * 9
    assert paired_intervals.agreement(few) is None
    verdicts = verdict.evaluate_rules(RuleLimits(min_agreement=0.5), few, True)
    assert [(block.rule, block.state) for block in verdicts] == [("agreement", "undecided")]
    assert "fewer than 10 blocks or 5 devices" in verdicts[0].summary


def test_full_agreement_still_has_an_interval_that_shrinks() -> None:
    part, many = (
        paired_intervals.agreement([ComparisonBlock(ComparisonStats(1, 20, 20))] * count) for count in (10, 200)
    )
    assert part is not None
    assert many is not None
    assert part.low < 0.95 < many.low
    assert part.high == many.high == 1.0


@pytest.mark.parametrize(("limit", "state"), [(0.7, "passed"), (0.99, "failed"), (0.905, "undecided")])
def test_agreement_is_decided_by_the_whole_interval(limit: float, state: str) -> None:
    blocks = blocks_of(np.random.default_rng(3), 0.3, 60)
    verdicts = verdict.evaluate_rules(RuleLimits(min_agreement=limit), blocks, True)
    assert [entry.state for entry in verdicts] == [state]
    assert verdicts[0].numbers["low"] < verdicts[0].numbers["value"] < verdicts[0].numbers["high"]
    assert verdicts[0].numbers["blocks"] == 60
    assert f"{verdicts[0].numbers['value']:.3f}" in verdicts[0].summary


def test_each_device_rule_detects_the_worse_bundle() -> None:
    blocks = blocks_of(np.random.default_rng(5), 0.3, 150)
    rules = CanaryRules(min_agreement=0.98, max_latency_ratio=1.5, max_accuracy_drop=0.02, max_error_growth=0.05)
    verdicts = {(entry.rule, entry.state) for entry in verdict.evaluate_rules(rules, blocks, True)}
    assert verdicts == {
        ("agreement", "failed"),
        ("latency", "failed"),
        ("error_rate", "passed"),
        ("labels", "failed"),
        ("estimated_accuracy", "failed"),
    }


def test_during_a_canary_the_old_bundle_is_the_other_one() -> None:
    blocks = blocks_of(np.random.default_rng(5), 0.3, 150)
    rules = CanaryRules(max_latency_ratio=1.5, max_accuracy_drop=0.02, max_error_growth=0.05)
    verdicts = verdict.evaluate_rules(rules, blocks, False)
    assert {entry.state for entry in verdicts} == {"passed"}
    assert "errors" not in {entry.rule for entry in verdicts}, "what fails beside is not the new bundle"


def test_the_error_rate_fails_on_one_error_and_passes_with_enough_batches() -> None:
    first = [ComparisonBlock(ComparisonStats(1, 10, 10))] * 9 + [
        ComparisonBlock(ComparisonStats(1, errors=1, error="the model crashed: SIGFPE"))
    ]
    verdicts = verdict.evaluate_rules(CanaryRules(max_accuracy_drop=None, max_error_growth=None), first, True)
    assert [(f.rule, f.state) for f in verdicts] == [("error_rate", "failed")]
    assert "1 of 10 batches failed" in verdicts[0].summary
    assert "SIGFPE" in verdicts[0].summary
    none = [ComparisonBlock(ComparisonStats(1, 10, 10))] * 10
    assert [f.state for f in verdict.evaluate_rules(RuleLimits(max_error_rate=0.0), none, True)] == ["passed"]
    assert [f.state for f in verdict.evaluate_rules(RuleLimits(max_error_rate=0.0), none[:9], True)] == ["undecided"]
    assert [f.state for f in verdict.evaluate_rules(RuleLimits(max_error_rate=0.5), first, True)] == ["passed"]


def test_incomparable_bundles_leave_agreement_undecided() -> None:
    blocks = [
        ComparisonBlock(ComparisonStats(1, 10, None, error="one bundle answers as classify, the other as regress"))
    ] * 20
    verdicts = verdict.evaluate_rules(RuleLimits(min_agreement=0.9), blocks, True)
    assert [entry.state for entry in verdicts] == ["undecided"]
    assert "one bundle answers as classify" in verdicts[0].summary


def test_without_data_rules_are_undecided() -> None:
    limits = RuleLimits(0.9, 2.0, 0.1, 0.05, 0.1)
    verdicts = verdict.evaluate_rules(limits, [], True)
    assert [(entry.rule, entry.state) for entry in verdicts] == [
        ("agreement", "undecided"),
        ("latency", "undecided"),
        ("error_rate", "undecided"),
    ]


def with_output(agreeing: int | None, **members: Any) -> list[ComparisonBlock]:
    """Return blocks whose first output is fine, and whose output `wear` agrees so often in 40 windows."""
    side = BundleStats(40, 0.0, expected_accuracy=Moments(40, 0.9, 0.1))
    wear = ComparisonStats(0, 40, agreeing, Moments(), side, side)
    first = ComparisonStats(1, 40, 39, Moments(), side, side)
    return [ComparisonBlock(replace(first, outputs={"wear": replace(wear, **members)}))] * 40


def test_limits_hold_for_each_output_alike() -> None:
    limits = RuleLimits(min_agreement=0.9, max_accuracy_drop=0.05)
    good = {r.name: r.state for r in verdict.evaluate_rules(limits, with_output(39), True)}
    assert set(good) == {"agreement", "estimated_accuracy", "wear/agreement", "wear/estimated_accuracy"}
    assert set(good.values()) == {"passed"}
    bad = {r.name: r for r in verdict.evaluate_rules(limits, with_output(20), True)}
    assert (bad["agreement"].state, bad["wear/agreement"].state) == ("passed", "failed")
    assert bad["wear/agreement"].summary.startswith("Output wear: Agreement with the previous bundle: 0.500")


def test_an_output_may_have_limits_of_its_own_or_none() -> None:
    bad = with_output(20)
    loose = RuleLimits(0.9, outputs={"wear": OutputLimits(min_agreement=0.4)})
    assert {r.state for r in verdict.evaluate_rules(loose, bad, True)} == {"passed"}
    strict = RuleLimits(0.1, outputs={"wear": OutputLimits(min_agreement=0.9)})
    assert [r.state for r in verdict.evaluate_rules(strict, bad, True)] == ["passed", "failed"]
    ignored = RuleLimits(0.9, 1.5, outputs={"wear": OutputLimits(min_agreement=0.9, ignore=True)})
    assert "wear/agreement" not in {r.name for r in verdict.evaluate_rules(ignored, bad, True)}


def test_an_output_of_another_kind_is_undecided() -> None:
    blocks = with_output(None, error="one bundle answers as classify, the other as regress")
    [_, wear] = verdict.evaluate_rules(RuleLimits(0.9), blocks, True)
    assert (wear.name, wear.state) == ("wear/agreement", "undecided")
    assert "the other as regress" in wear.summary


AGREES, DIFFERS = ({"n": 50, "agreeing": agreeing} for agreeing in (50, 20))
NUMBERS = {"n": 50, "agreeing": None}


@pytest.mark.parametrize(
    ("first", "flags", "drifting", "limits", "answer"),
    [
        (AGREES, AGREES, "", {}, False),
        (AGREES, DIFFERS, "", {}, True),
        (AGREES, DIFFERS, "", {"flags": OutputLimits(ignore=True)}, False),
        (NUMBERS, AGREES, "", {}, True),
        (NUMBERS, AGREES, "flags", {}, False),
        (AGREES, NUMBERS, "flags", {}, False),
        (NUMBERS, NUMBERS, "flags", {}, True),
    ],
    ids=["site", "bundle", "ignored", "numbers drift", "flags drift", "other numbers", "only numbers"],
)
def test_a_drift_alert_is_the_sites_where_both_bundles_answer_alike(
    first: dict[str, Any], flags: dict[str, Any], drifting: str, limits: dict[str, OutputLimits], answer: bool
) -> None:
    stats = BundleStats(50, 0.1)
    further = ComparisonStats(**flags, model=stats, other=stats)
    block = ComparisonBlock(ComparisonStats(1, **first, model=stats, other=stats, outputs={"flags": further}))
    rules = CanaryRules(outputs=limits)
    assert verdict.is_disagreeing(rules, [block] * 12, [drifting], True) is answer
    assert verdict.is_disagreeing(rules, [block] * 3, [drifting], True) is None
