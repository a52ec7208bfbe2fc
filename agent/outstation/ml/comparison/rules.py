"""Rule evaluation: compare a new bundle with the old one, limit by limit.

A rule has passed or failed if its whole 95 % interval is on one side of the limit; else it is undecided. Devices
evaluate the limits of the desired state, the fleet those of a promotion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from outstation.ml.comparison import paired_intervals
from outstation.ml.comparison.paired_intervals import MIN_BLOCKS, MIN_DEVICES, ComparisonBlock, ComparisonEstimate
from outstation.ml.comparison.tally import ComparisonStats
from outstation.protocol.wire.desired_state import CanaryRules, LimitsByOutput, OutputLimits

RuleState = Literal["passed", "failed", "undecided"]
# Rule names are also the reasons for which a device rolls a bundle back.
AGREEMENT, LATENCY, ERROR_RATE, LABELS = "agreement", "latency", "error_rate", "labels"
ESTIMATED_ACCURACY = "estimated_accuracy"
# With more agreement than this, drift of the predictions is the site's and not the bundle's.
_MIN_AGREEMENT = 0.9
_LOWER_RELATIONS = {"passed": "not below", "failed": "below", "undecided": "undecided against"}
_UPPER_RELATIONS = {"passed": "not above", "failed": "above", "undecided": "undecided against"}


class RuleLimits(msgspec.Struct, frozen=True):
    """Limits for the new bundle, with the meaning that `CanaryRules` gives them. None disables a rule.

    They hold for each output of the models; `outputs` has other limits for some of the further ones.
    """

    min_agreement: float | None = None
    max_latency_ratio: float | None = None
    max_error_rate: float | None = None
    max_accuracy_drop: float | None = None
    max_error_growth: float | None = None
    outputs: LimitsByOutput = {}


class RuleResult(msgspec.Struct, frozen=True):
    """Outcome of one rule; `summary` is a sentence with its numbers. `output`: a further output that it is about."""

    rule: str
    state: RuleState
    summary: str
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)
    output: str = ""

    @property
    def name(self) -> str:
        return name_rule(self.rule, self.output)


def name_rule(rule: str, output: str) -> str:
    """Return the name of a rule among those of all outputs."""
    return f"{output}/{rule}" if output else rule


def evaluate_rules(
    limits: RuleLimits | CanaryRules, blocks: Sequence[ComparisonBlock], new_is_other: bool
) -> list[RuleResult]:
    """Return a result for each limit that is set and that the blocks hold data for.

    `new_is_other` is True in shadow, and False while the new bundle is the canary. Rules about labels need a label; the
    error rate is known only if the new bundle is the other one.
    """
    results: list[RuleResult] = []
    if limits.min_agreement is not None:
        results.append(_evaluate_agreement(limits.min_agreement, blocks))
    if limits.max_latency_ratio is not None:
        estimate = paired_intervals.latency_ratio(blocks, new_is_other=new_is_other)
        text = "Inference time of a window, relative to the previous bundle"
        results.append(_evaluate_upper_bound(LATENCY, text, estimate, limits.max_latency_ratio))
    if limits.max_error_rate is not None and new_is_other:
        results.append(_evaluate_error_rate(limits.max_error_rate, blocks))
    results += _evaluate_quality(limits, blocks, new_is_other)
    for name in list_outputs(blocks, new_is_other):
        own, inherited = output_limits(limits, name)
        part = select_output(blocks, name)
        if own.min_agreement is not None and not (inherited and is_numeric(part)):
            results.append(replace(_evaluate_agreement(own.min_agreement, part), output=name))
        results += [replace(result, output=name) for result in _evaluate_quality(own, part, new_is_other)]
    return [
        replace(result, summary=f"Output {result.output}: {result.summary}") if result.output else result
        for result in results
    ]


def list_outputs(blocks: Sequence[ComparisonBlock], new_is_other: bool) -> list[str]:
    """Return the further outputs of the previous bundle: nothing compares with one that only the new bundle has."""
    names: set[str] = set()
    for block in blocks:
        for name, stats in block.stats.outputs.items():
            old = stats.model if new_is_other else stats.other
            if old.windows or sum(stats.labelled) or old.abs_error.n:
                names.add(name)
    return sorted(names)


def select_output(blocks: Sequence[ComparisonBlock], name: str) -> list[ComparisonBlock]:
    """Return the blocks' statistics of one further output."""
    return [ComparisonBlock(block.stats.outputs[name], block.device) for block in blocks if name in block.stats.outputs]


def output_limits(limits: RuleLimits | CanaryRules, name: str) -> tuple[RuleLimits, bool]:
    """Return the limits of a further output, and if its `min_agreement` is that of the first output."""
    own = limits.outputs.get(name, OutputLimits())
    if is_ignored(limits, name):
        return RuleLimits(), False
    names = ("min_agreement", "max_accuracy_drop", "max_error_growth")
    chosen = {n: getattr(limits if getattr(own, n) is None else own, n) for n in names}
    return RuleLimits(**chosen), own.min_agreement is None


def is_numeric(blocks: Sequence[ComparisonBlock]) -> bool:
    """Return True for the statistics of numbers, which neither agree nor differ."""
    known = [block.stats for block in blocks if block.stats.n]
    return bool(known) and all(stats.agreeing is None and not stats.error for stats in known)


def find_mismatch(blocks: Sequence[ComparisonBlock]) -> str:
    """Return why the predictions of the two bundles cannot agree; "" if they can."""
    return next((b.stats.error for b in reversed(blocks) if b.stats.n and b.stats.agreeing is None), "")


def is_ignored(limits: RuleLimits | CanaryRules, name: str) -> bool:
    return limits.outputs.get(name, OutputLimits()).ignore


def is_disagreeing(
    limits: CanaryRules, blocks: Sequence[ComparisonBlock], drifting: Sequence[str], new_is_other: bool
) -> bool | None:
    """Return True if the bundles differ in an output, or if `drifting` ones cannot be compared; None: too few blocks.

    Further outputs that agree say nothing of a first one whose predictions are numbers.
    """
    names = [name for name in list_outputs(blocks, new_is_other) if not is_ignored(limits, name)]
    parts = {"": blocks, **{name: select_output(blocks, name) for name in names}}
    estimates = {name: estimate for name, part in parts.items() if (estimate := paired_intervals.agreement(part))}
    if any(estimate.low < _MIN_AGREEMENT for estimate in estimates.values()):
        return True
    if estimates and ("" in estimates or "" not in drifting):
        return False
    return None if len(blocks) < MIN_BLOCKS else True


def _evaluate_agreement(limit: float, blocks: Sequence[ComparisonBlock]) -> RuleResult:
    agreement, mismatch = paired_intervals.agreement(blocks), find_mismatch(blocks)
    if agreement is None and mismatch:
        return RuleResult(AGREEMENT, "undecided", f"Agreement is unknown: {mismatch}.", {"limit": limit})
    return _evaluate_lower_bound(AGREEMENT, "Agreement with the previous bundle", agreement, limit)


def _evaluate_quality(
    limits: RuleLimits | CanaryRules, blocks: Sequence[ComparisonBlock], new_is_other: bool
) -> list[RuleResult]:
    """Return the results of rules about accuracy and errors, by labels and as expected without them."""
    results: list[RuleResult] = []
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
        result = _evaluate_upper_bound(LABELS, text, estimate, 1 + limits.max_error_growth)
        expected = describe_expected_errors(blocks, new_is_other)
        results.append(replace(result, summary=f"{result.summary} {expected.capitalize()}.") if expected else result)
    return results


def describe_expected_errors(blocks: Sequence[ComparisonBlock], new_is_other: bool) -> str:
    """Return a phrase about the errors that the inputs let expect of both bundles; "" if they do not.

    They decide nothing: two bundles may have been measured on held-out data that are not alike.
    """
    ratio = paired_intervals.expected_error_ratio(blocks, new_is_other=new_is_other)
    if ratio is None:
        return ""
    stats = sum((block.stats for block in blocks), ComparisonStats())
    pooled = [stats.model.expected_error.mean, stats.other.expected_error.mean]
    old, new = pooled if new_is_other else pooled[::-1]
    interval = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    return f"expected without labels: {new:.4g}, of the previous bundle {old:.4g}, ratio {interval}"


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
