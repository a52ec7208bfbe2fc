"""A new bundle beside the old one, rule by rule: good or bad where the whole interval is on that side, else open.

The same for a device on probation (`judge`, by the rules of the desired state) and for a fleet that promotes (`weigh`,
with limits of its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from agent.comparison import paired_intervals
from agent.comparison.paired_intervals import MIN_BLOCKS, MIN_DEVICES, ComparisonBlock, ComparisonEstimate
from agent.wire.desired_state import CanaryRules

RuleState = Literal["good", "bad", "open"]
# Names of the rules, which are the reasons a bundle is taken back for.
AGREEMENT, LATENCY, ERRORS, LABELS, ESTIMATE = "agreement", "latency", "errors", "labels", "estimate"


class RuleLimits(msgspec.Struct, frozen=True):
    """What is asked of the new bundle; None: not asked. See `Rules` for what each of them is."""

    min_agreement: float | None = None
    max_latency_ratio: float | None = None
    max_error_rate: float | None = None
    max_accuracy_drop: float | None = None
    max_error_growth: float | None = None

    @classmethod
    def from_rules(cls, rules: CanaryRules) -> RuleLimits:
        return cls(rules.min_agreement, rules.max_latency_ratio, rules.max_error_rate, rules.max_accuracy_drop, rules.max_error_growth)


class RuleResult(msgspec.Struct, frozen=True):
    """What one rule says, and a sentence with its numbers."""

    rule: str
    state: RuleState
    summary: str
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)


def evaluate_rules(rules: CanaryRules, blocks: Sequence[ComparisonBlock], new_is_other: bool) -> list[RuleResult]:
    """By the rules of a device. `new_is_beside`: in shadow; False on probation, where the old one answers beside it."""
    return evaluate_limits(RuleLimits.from_rules(rules), blocks, new_is_other)


def evaluate_limits(limits: RuleLimits, blocks: Sequence[ComparisonBlock], new_is_other: bool) -> list[RuleResult]:
    """A finding for each limit that is set and that these blocks can tell of at all.

    Without any label there is none of labels, and of `errors` only where the new bundle is beside.
    """
    return list(_evaluate_each(limits, blocks, new_is_other))


def _evaluate_each(limits: RuleLimits, blocks: Sequence[ComparisonBlock], new_is_other: bool) -> Iterator[RuleResult]:
    if limits.min_agreement is not None:
        yield _evaluate_agreement(limits.min_agreement, blocks)
    if limits.max_latency_ratio is not None:
        found = paired_intervals.latency_ratio(blocks, new_is_other=new_is_other)
        yield _evaluate_upper_bound(
            LATENCY, "Time a window in the model, as a multiple of the bundle before", found, limits.max_latency_ratio
        )
    if limits.max_error_rate is not None and new_is_other:
        yield _evaluate_errors(limits.max_error_rate, blocks)
    if limits.max_accuracy_drop is not None:
        yield from _evaluate_accuracy(-limits.max_accuracy_drop, blocks, new_is_other)
    if limits.max_error_growth is not None and any(one.stats.model.abs_error.n for one in blocks):
        found = paired_intervals.error_ratio(blocks, new_is_other=new_is_other)
        what = "Mean absolute error by labels, as a multiple of the bundle before"
        yield _evaluate_upper_bound(LABELS, what, found, 1 + limits.max_error_growth)


def _evaluate_accuracy(limit: float, blocks: Sequence[ComparisonBlock], new_is_other: bool) -> Iterator[RuleResult]:
    """By labels and by scores, as far as there are any."""
    if any(sum(one.stats.labelled) for one in blocks):
        found = paired_intervals.labelled_accuracy_gain(blocks, new_is_other=new_is_other)
        yield _evaluate_lower_bound(LABELS, "Accuracy by labels, less that of the bundle before", found, limit)
    if any(one.stats.model.expected_accuracy.n and one.stats.other.expected_accuracy.n for one in blocks):
        found = paired_intervals.expected_accuracy_gain(blocks, new_is_other=new_is_other)
        yield _evaluate_lower_bound(ESTIMATE, "Expected accuracy, less that of the bundle before", found, limit)


def _evaluate_agreement(limit: float, blocks: Sequence[ComparisonBlock]) -> RuleResult:
    found = paired_intervals.agreement(blocks)
    why = next((one.stats.error for one in reversed(blocks) if one.stats.n and one.stats.agreeing is None), "")
    if found is None and why:
        return RuleResult(AGREEMENT, "open", f"Agreement is not known: {why}.", {"limit": limit})
    return _evaluate_lower_bound(AGREEMENT, "Share of windows answered as by the bundle before", found, limit)


def _evaluate_errors(limit: float, blocks: Sequence[ComparisonBlock]) -> RuleResult:
    """One error is proof that errors happen; that none do is believed once there were batches enough."""
    batches, errors = sum(one.stats.batches for one in blocks), sum(one.stats.errors for one in blocks)
    share, low, high = paired_intervals.failure_rate(blocks)
    why = next((one.stats.error for one in reversed(blocks) if one.stats.errors), "")
    said = f"{errors:,} of {batches:,} batches failed, {share:.3f} [{low:.3f}, {high:.3f}]" + (f", {why}" * bool(why))
    numbers = {"value": share, "low": low, "high": high, "limit": limit, "batches": batches, "errors": errors}
    if batches and low > limit:
        return RuleResult(ERRORS, "bad", f"{said}: more than the {limit:g} that may.", _round_floats(numbers))
    enough = batches >= MIN_BLOCKS and errors == 0
    if batches and (high <= limit or enough):
        return RuleResult(ERRORS, "good", f"{said}: no more than the {limit:g} that may.", _round_floats(numbers))
    return RuleResult(ERRORS, "open", f"{said}; {limit:g} may: not decided.", _round_floats(numbers))


def _evaluate_lower_bound(rule: str, description: str, estimate: ComparisonEstimate | None, limit: float) -> RuleResult:
    """Of what should not be less than `limit`."""
    if estimate is None:
        return _insufficient_data(rule, description, limit)
    state: RuleState = "good" if estimate.low >= limit else "bad" if estimate.high < limit else "open"
    words = {"good": "not below", "bad": "below", "open": "not decided against"}
    return _rule_result(rule, description, estimate, limit, state, words[state])


def _evaluate_upper_bound(rule: str, description: str, estimate: ComparisonEstimate | None, limit: float) -> RuleResult:
    """Of what should not be more than `limit`."""
    if estimate is None:
        return _insufficient_data(rule, description, limit)
    state: RuleState = "good" if estimate.high <= limit else "bad" if estimate.low > limit else "open"
    words = {"good": "not above", "bad": "above", "open": "not decided against"}
    return _rule_result(rule, description, estimate, limit, state, words[state])


def _rule_result(
    rule: str, description: str, estimate: ComparisonEstimate, limit: float, state: RuleState, relation: str
) -> RuleResult:
    interval = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    summary = f"{description}: {interval} of {estimate.n:,} windows in {estimate.unit_count:,} {estimate.unit_kind}, {relation} {limit:g}."
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "limit": limit, "n": estimate.n}
    return RuleResult(rule, state, summary, _round_floats({**numbers, estimate.unit_kind: estimate.unit_count}))


def _insufficient_data(rule: str, description: str, limit: float) -> RuleResult:
    few = f"fewer than {MIN_BLOCKS} blocks or {MIN_DEVICES} devices tell of it yet"
    return RuleResult(rule, "open", f"{description}: {few}; {limit:g} is the limit.", {"limit": limit})


def _round_floats(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
