"""What a fleet's tallies say of a new bundle against the old one, each rule that is asked as an interval. Pure.

The statistics are those of `rivals`, where windows are added up. So no device may bring many more of them than the
others do: one that says most would outvote the rest, whether its sensor is fast or it lies.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from agent.comparison import rules
from agent.comparison.paired_intervals import ComparisonBlock
from agent.comparison.rules import AGREEMENT, ESTIMATE, LABELS, LATENCY, RuleLimits, RuleState
from agent.comparison.tally import ComparisonStats
from agent.fleet.rollout.plan import Promotion
from agent.wire.messages import ShadowPayload

MessagesByDevice = Mapping[str, Sequence[ShadowPayload]]
# A device's windows count up to so many times those of the device in the middle.
MAX_WINDOW_RATIO = 2
# Of fewer labelled windows in all, the estimate is asked in their place.
MIN_LABELLED = 100


class PromotionRuleResult(msgspec.Struct, frozen=True):
    """One rule: its number with its interval, None where there is too little to say it; `words` for a sentence."""

    rule: str
    state: RuleState
    words: str
    limit: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    blocks: int = 0
    devices: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


def evaluate_promotion_rules(
    messages: MessagesByDevice, promote: Promotion, *, new_is_shadow: bool
) -> list[PromotionRuleResult]:
    """Every rule that is asked. `beside`: the new bundle is the one beside, else the one whose results count."""
    taken = balance_devices(messages)
    limits = RuleLimits(promote.min_agreement, promote.max_latency_ratio, None, promote.max_accuracy_drop, promote.max_error_growth)
    found = rules.evaluate_limits(limits, taken, new_is_shadow)
    return list(_select_rule_results(promote, found, taken))


def balance_devices(messages: MessagesByDevice) -> list[ComparisonBlock]:
    """The newest messages of each device, as far as they hold no more windows than the device may bring."""
    if not messages:
        return []
    middle = statistics.median(sum(_count_windows(one) for one in said) for said in messages.values())
    taken: list[ComparisonBlock] = []
    for device, said in messages.items():
        left = MAX_WINDOW_RATIO * middle
        kept: list[ComparisonBlock] = []
        for one in reversed(said):
            if _count_windows(one) > left:
                # Older ones would not lie beside those that are kept.
                break
            left -= _count_windows(one)
            kept.append(ComparisonBlock(ComparisonStats.from_message(one), device))
        taken += reversed(kept)
    return taken


def _count_windows(message: ShadowPayload) -> int:
    """In windows; labels may come without any."""
    return max(
        message.n,
        sum(message.labelled),
        message.stats.windows,
        message.other_stats.windows,
        message.stats.abs_error.n,
    )


def _select_rule_results(
    promote: Promotion, rule_results: Sequence[rules.RuleResult], blocks: Sequence[ComparisonBlock]
) -> Iterator[PromotionRuleResult]:
    by_rule = {one.rule: one for one in rule_results}
    devices = len({one.device for one in blocks})
    labelled = sum(sum(one.stats.labelled) for one in blocks) >= MIN_LABELLED

    def build_result(name: str, rule: str, limit: float, is_lower_bound: bool) -> PromotionRuleResult:
        return _build_rule_result(name, by_rule.get(rule), limit, len(blocks), devices, is_lower_bound=is_lower_bound)

    if promote.min_agreement is not None:
        yield build_result("agreement", AGREEMENT, promote.min_agreement, True)
    if promote.max_latency_ratio is not None:
        yield build_result("time", LATENCY, promote.max_latency_ratio, False)
    if promote.max_accuracy_drop is not None and labelled:
        yield build_result("accuracy gained by labels", LABELS, -promote.max_accuracy_drop, True)
    elif promote.max_accuracy_drop is not None:
        yield build_result("estimated accuracy gained", ESTIMATE, -promote.max_accuracy_drop, True)
    if promote.max_error_growth is not None:
        yield build_result("error by labels", LABELS, 1 + promote.max_error_growth, False)


def _build_rule_result(
    name: str,
    rule_result: rules.RuleResult | None,
    limit: float,
    block_count: int,
    device_count: int,
    *,
    is_lower_bound: bool,
) -> PromotionRuleResult:
    """With the limit that was asked; what nothing can be told of is open: that is no reason to go on."""
    asked = f"{'at least' if is_lower_bound else 'at most'} {limit:g}"
    if rule_result is None or "value" not in rule_result.numbers:
        words = f"{name} not known yet over {block_count} blocks of {device_count} devices ({asked}: open)"
        return PromotionRuleResult(name, "open", words, limit, blocks=block_count, devices=device_count)
    value, low, high = (float(rule_result.numbers[one]) for one in ("value", "low", "high"))
    interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    words = f"{name} {interval} over {block_count} blocks of {device_count} devices ({asked}: {rule_result.state})"
    return PromotionRuleResult(name, rule_result.state, words, limit, value, low, high, block_count, device_count)
