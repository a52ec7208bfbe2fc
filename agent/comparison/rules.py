"""Rule evaluation: compare a new bundle with the old one, limit by limit.

A rule has passed or failed if its whole 95 % interval is on one side of the limit; else it is undecided. Devices
evaluate the limits of the desired state, the fleet those of a promotion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from agent.comparison import paired_intervals
from agent.comparison.paired_intervals import MIN_BLOCKS, MIN_DEVICES, ComparisonBlock, ComparisonEstimate
from agent.wire.desired_state import CanaryRules

RuleState = Literal["passed", "failed", "undecided"]
# Rule names are also the reasons for which a device rolls a bundle back.
AGREEMENT, LATENCY, ERROR_RATE, LABELS = "agreement", "latency", "error_rate", "labels"
ESTIMATED_ACCURACY = "estimated_accuracy"
_LOWER_RELATIONS = {"passed": "not below", "failed": "below", "undecided": "undecided against"}
_UPPER_RELATIONS = {"passed": "not above", "failed": "above", "undecided": "undecided against"}


class RuleLimits(msgspec.Struct, frozen=True):
    """Limits for the new bundle, with the meaning that `CanaryRules` gives them. None disables a rule."""

    min_agreement: float | None = None
    max_latency_ratio: float | None = None
    max_error_rate: float | None = None
    max_accuracy_drop: float | None = None
    max_error_growth: float | None = None


class RuleResult(msgspec.Struct, frozen=True):
    """Outcome of one rule; `summary` is a sentence with its numbers."""

    rule: str
    state: RuleState
    summary: str
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)


def evaluate_rules(
    limits: RuleLimits | CanaryRules, blocks: Sequence[ComparisonBlock], new_is_other: bool
) -> list[RuleResult]:
    """Return a result for each limit that is set and that the blocks hold data for.

    `new_is_other` is True in shadow, and False while the new bundle is the canary. Rules about labels need a label; the
    error rate is known only if the new bundle is the other one.
    """
    results: list[RuleResult] = []
    if limits.min_agreement is not None:
        agreement, limit = paired_intervals.agreement(blocks), limits.min_agreement
        mismatch = next((b.stats.error for b in reversed(blocks) if b.stats.n and b.stats.agreeing is None), "")
        if agreement is None and mismatch:
            text = f"Agreement is unknown: {mismatch}."
            results.append(RuleResult(AGREEMENT, "undecided", text, {"limit": limit}))
        else:
            text = "Agreement with the previous bundle"
            results.append(_evaluate_lower_bound(AGREEMENT, text, agreement, limit))
    if limits.max_latency_ratio is not None:
        estimate = paired_intervals.latency_ratio(blocks, new_is_other=new_is_other)
        text = "Inference time of a window, relative to the previous bundle"
        results.append(_evaluate_upper_bound(LATENCY, text, estimate, limits.max_latency_ratio))
    if limits.max_error_rate is not None and new_is_other:
        results.append(_evaluate_error_rate(limits.max_error_rate, blocks))
    if limits.max_accuracy_drop is not None and any(sum(block.stats.labelled) for block in blocks):
        estimate = paired_intervals.labelled_accuracy_gain(blocks, new_is_other=new_is_other)
        text = "Labelled accuracy, less that of the previous bundle"
        results.append(_evaluate_lower_bound(LABELS, text, estimate, -limits.max_accuracy_drop))
    if limits.max_accuracy_drop is not None and any(
        block.stats.model.expected_accuracy.n and block.stats.other.expected_accuracy.n for block in blocks
    ):
        estimate = paired_intervals.expected_accuracy_gain(blocks, new_is_other=new_is_other)
        text = "Estimated accuracy, less that of the previous bundle"
        results.append(_evaluate_lower_bound(ESTIMATED_ACCURACY, text, estimate, -limits.max_accuracy_drop))
    if limits.max_error_growth is not None and any(block.stats.model.abs_error.n for block in blocks):
        estimate = paired_intervals.error_ratio(blocks, new_is_other=new_is_other)
        text = "Mean absolute error by labels, relative to the previous bundle"
        results.append(_evaluate_upper_bound(LABELS, text, estimate, 1 + limits.max_error_growth))
    return results


def _evaluate_error_rate(limit: float, blocks: Sequence[ComparisonBlock]) -> RuleResult:
    """Fail on proof of one error above the limit; pass without an error once there are enough batches."""
    batches, errors = sum(block.stats.batches for block in blocks), sum(block.stats.errors for block in blocks)
    share, low, high = paired_intervals.failure_rate(blocks)
    cause = next((f", {block.stats.error}" for block in reversed(blocks) if block.stats.errors), "")
    text = f"{errors:,} of {batches:,} batches failed, {share:.3f} [{low:.3f}, {high:.3f}]{cause}"
    numbers = {"value": share, "low": low, "high": high, "limit": limit, "batches": batches, "errors": errors}
    state: RuleState = "undecided"
    if batches and low > limit:
        state = "failed"
    elif batches and (high <= limit or (batches >= MIN_BLOCKS and errors == 0)):
        state = "passed"
    return RuleResult(ERROR_RATE, state, f"{text}: {_UPPER_RELATIONS[state]} {limit:g}.", _round_floats(numbers))


def _evaluate_lower_bound(rule: str, text: str, estimate: ComparisonEstimate | None, limit: float) -> RuleResult:
    if estimate is None:
        return _insufficient_data(rule, text, limit)
    state: RuleState = "passed" if estimate.low >= limit else "failed" if estimate.high < limit else "undecided"
    return _rule_result(rule, text, estimate, limit, state, _LOWER_RELATIONS[state])


def _evaluate_upper_bound(rule: str, text: str, estimate: ComparisonEstimate | None, limit: float) -> RuleResult:
    if estimate is None:
        return _insufficient_data(rule, text, limit)
    state: RuleState = "passed" if estimate.high <= limit else "failed" if estimate.low > limit else "undecided"
    return _rule_result(rule, text, estimate, limit, state, _UPPER_RELATIONS[state])


def _rule_result(
    rule: str, text: str, estimate: ComparisonEstimate, limit: float, state: RuleState, relation: str
) -> RuleResult:
    interval = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    sample = f"{estimate.n:,} windows in {estimate.unit_count:,} {estimate.unit_kind}"
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "limit": limit, "n": estimate.n}
    numbers[estimate.unit_kind] = estimate.unit_count
    return RuleResult(rule, state, f"{text}: {interval} over {sample}, {relation} {limit:g}.", _round_floats(numbers))


def _insufficient_data(rule: str, text: str, limit: float) -> RuleResult:
    too_few = f"fewer than {MIN_BLOCKS} blocks or {MIN_DEVICES} devices have data yet"
    return RuleResult(rule, "undecided", f"{text}: {too_few}; the limit is {limit:g}.", {"limit": limit})


def _round_floats(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
