"""Promotion: decide whether a step waits, is promoted, finishes or is aborted. Pure.

Rules of a step:
- abort: too many devices failed whatever the others report, or a rule failed with enough reporting devices
- the step is complete: enough devices report enough batches each, it lasted long enough, no more devices failed than
  allowed, and every rule passed
- the last step also waits for devices in progress. Once all responding devices are done, an undecided rule no longer
  blocks it: there will be no more data, and no later step
- devices that rolled back count as failed and are left out of the comparison
- a step that widens the previous one needs reports from the devices that join, not from those already in it
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
from msgspec.structs import asdict, replace

from outstation.fleet.rollout.devices import NOT_REPORTED, RolloutDevice, StepDevices
from outstation.fleet.rollout.journal import Rollout
from outstation.fleet.rollout.plan import Promotion
from outstation.fleet.rollout.tallies import RolloutTallies
from outstation.foundation import clock
from outstation.foundation.text import format_span, pluralize, printable
from outstation.ml.comparison import rules
from outstation.ml.comparison.paired_intervals import ComparisonBlock
from outstation.ml.comparison.rules import (
    AGREEMENT,
    ESTIMATED_ACCURACY,
    LABELS,
    LATENCY,
    RuleLimits,
    RuleState,
    name_rule,
)
from outstation.ml.comparison.tally import ComparisonStats
from outstation.ml.performance.intervals import wilson
from outstation.protocol.wire.messages import ComparedOutput, ShadowPayload

MessagesByDevice = Mapping[str, Sequence[ShadowPayload]]
StepOutcome = Literal["wait", "promote", "finish", "abort"]
# A device that was seen within this time and is not done is in progress.
RECENTLY_SEEN_US = 3600 * 1_000_000
# Windows of a device count up to this multiple of the median device's.
MAX_WINDOW_RATIO = 2
# Devices that one blocker names; it counts the others.
MAX_NAMED = 5
ERROR_RATIO = "error_ratio"
# With fewer labelled windows the estimated accuracy is evaluated instead.
MIN_LABELLED = 100


class RuleOutcome(msgspec.Struct, frozen=True):
    """Outcome of one rule; the number and its interval are None without enough data. `text` is for people."""

    rule: str
    state: RuleState
    text: str
    limit: float
    value: float | None
    low: float | None
    high: float | None
    blocks: int
    devices: int


class StepVerdict(msgspec.Struct, frozen=True):
    """Outcome of a step. `blockers` say what is still missing; `summary` lists everything with its numbers."""

    outcome: StepOutcome
    summary: str
    blockers: list[str]
    rule_results: list[RuleOutcome]
    reporting: int
    needed: int
    failed: int
    responding: int
    hours: float

    def to_evidence(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("reporting", "needed", "failed", "responding")}
        results = [asdict(result) for result in self.rule_results]
        return {"outcome": self.outcome, **counts, "hours": round(self.hours, 3), "rules": results}


def evaluate_step(
    rollout: Rollout, devices: StepDevices, tallies: RolloutTallies, step_start: str, now_us: int
) -> StepVerdict:
    """Evaluate the current step, which began at `step_start` (RFC 3339)."""
    promote, is_shadow = rollout.current_step.promote, rollout.current_step.strategy == "shadow"
    taking_part = [device.device for device in devices.selected if not device.has_failed and not device.is_incompatible]
    messages = tallies.select_messages(taking_part, new_is_shadow=is_shadow)
    needed, reporting, lacking = _count_reporting(rollout, devices, messages)
    results = evaluate_promotion(messages, promote, needed, new_is_shadow=is_shadow)
    # A clock that was set back only makes the step wait longer.
    hours = max(0.0, (now_us - clock.parse_rfc3339(step_start)) / 3.6e9)
    blockers = _find_blockers(promote, devices, needed, reporting, lacking, hours)
    in_progress = [
        f"{device.device} ({device.phase})"
        for device in devices.selected
        if not device.is_done
        and device.last_seen is not None
        and now_us - clock.parse_rfc3339(device.last_seen) < RECENTLY_SEEN_US
    ]
    if rollout.next_step is None and in_progress:
        rules = rollout.plan.device_rules
        required = f"each tries the bundle for at least {rules.min_hours:g} h and {rules.min_batches} batches"
        blockers.append(
            f"devices in progress: {len(in_progress)}, {_list_devices(in_progress)}; {required} ([device_rules])"
        )
    blockers += _find_undecided_rules(rollout, devices, results)
    has_failed_rule = any(result.state == "failed" for result in results) and len(messages) >= needed
    outcome: StepOutcome = "wait"
    if has_failed_rule or _has_too_many_failures(promote, devices):
        outcome = "abort"
    elif not blockers:
        outcome = "promote" if rollout.next_step else "finish"
    failed, responding = len(devices.failed), len(devices.responding)
    counts = (
        f"{reporting} of {needed} required devices report",
        f"{failed} of {responding} rejected it or rolled it back ({100 * promote.max_failed_share:g} % allowed)",
        f"{format_span(3600 * hours)} in this step",
    )
    summary = ", ".join((*(result.text for result in results), *counts))
    return StepVerdict(outcome, summary, blockers, results, reporting, needed, failed, responding, hours)


def evaluate_promotion(
    messages: MessagesByDevice, promote: Promotion, needed: int, *, new_is_shadow: bool
) -> list[RuleOutcome]:
    """Evaluate every rule of `promote`. Rules of a further output are undecided until `needed` devices report it.

    `new_is_shadow` is False where the new bundle's results are published.
    """
    blocks, shortages = _select_outputs(balance_devices(messages), needed, new_is_shadow)
    limits = RuleLimits(
        promote.min_agreement,
        promote.max_latency_ratio,
        None,
        promote.max_accuracy_drop,
        promote.max_error_growth,
        promote.outputs,
    )
    by_name = {result.name: result for result in rules.evaluate_rules(limits, blocks, new_is_shadow)}
    block_count, device_count = len(blocks), len({block.device for block in blocks})
    sample = f"over {pluralize(block_count, 'block')} of {pluralize(device_count, 'device')}"
    results = []
    for output, name, rule, limit, bound in _list_rules(limits, blocks, new_is_shadow):
        title, result = name_rule(name.replace("_", " "), output), by_name.get(name_rule(rule, output))
        part = rules.select_output(blocks, output) if output else blocks
        mismatch, notes = rules.find_mismatch(part), [shortages.get(output, "")]
        if name == ERROR_RATIO:
            notes.append(rules.describe_expected_errors(part, new_is_shadow))
        # A rule without data blocks the promotion.
        state: RuleState = "undecided"
        value = low = high = None
        text = f"{title} unknown {sample} ({bound} {limit:g}: undecided{'; ' if mismatch else ''}{mismatch})"
        if result is not None and "value" in result.numbers:
            state = "undecided" if output in shortages else result.state
            value, low, high = (float(result.numbers[key]) for key in ("value", "low", "high"))
            text = f"{title} {value:.3f} [{low:.3f}, {high:.3f}] {sample} ({bound} {limit:g}: {state})"
        text = "; ".join([text, *filter(None, notes)])
        key = name_rule(name, output)
        results.append(RuleOutcome(key, state, text, limit, value, low, high, block_count, device_count))
    return results


def balance_devices(messages: MessagesByDevice) -> list[ComparisonBlock]:
    """Return the newest messages of each device, up to MAX_WINDOW_RATIO times the median device's windows.

    Windows are summed over devices, so a device with a fast sensor, or one that lies, would outvote the others.
    """
    if not messages:
        return []
    median = statistics.median(sum(_count_windows(message) for message in sent) for sent in messages.values())
    blocks: list[ComparisonBlock] = []
    for device, sent in messages.items():
        left = MAX_WINDOW_RATIO * median
        newest: list[ComparisonBlock] = []
        for message in reversed(sent):
            if _count_windows(message) > left:
                # Older messages would not be adjacent to the ones already taken.
                break
            left -= _count_windows(message)
            newest.append(ComparisonBlock(ComparisonStats.from_message(message), device))
        blocks += reversed(newest)
    return blocks


def _select_outputs(
    blocks: Sequence[ComparisonBlock], needed: int, new_is_shadow: bool
) -> tuple[list[ComparisonBlock], dict[str, str]]:
    """Return the blocks with the further outputs that `needed` devices or most report, as most of these describe them.

    Also return which of the outputs fewer than `needed` report, with a phrase. All devices run the same new bundle: few
    that invent an output, or its kind, must not block a roll-out, and few that withhold one must not decide for it.
    """
    by_device: dict[str, list[ComparisonBlock]] = {}
    for block in blocks:
        by_device.setdefault(block.device, []).append(block)
    devices: dict[str, dict[tuple[bool, bool], set[str]]] = {}
    for device, own in by_device.items():
        for name in rules.list_outputs(own, new_is_shadow):
            part = rules.select_output(own, name)
            kind = bool(rules.find_mismatch(part)), rules.is_numeric(part)
            devices.setdefault(name, {}).setdefault(kind, set()).add(device)
    majority = max(2, len(by_device) // 2 + 1)
    chosen, shortages = dict[str, set[str]](), dict[str, str]()
    for name, kinds in devices.items():
        reporting = set[str]().union(*kinds.values())
        if len(reporting) >= min(needed, majority):
            chosen[name] = max(kinds.items(), key=lambda entry: (len(entry[1]), entry[0]))[1]
            if len(reporting) < needed:
                missing = _list_devices(sorted(by_device.keys() - reporting))
                missing = f"; missing {missing}" if missing else ""
                shortages[name] = f"{len(reporting)} of {needed} required devices report this output{missing}"
    return [_keep_outputs(block, chosen) for block in blocks], shortages


def _keep_outputs(block: ComparisonBlock, chosen: Mapping[str, set[str]]) -> ComparisonBlock:
    outputs = {name: part for name, part in block.stats.outputs.items() if block.device in chosen.get(name, ())}
    return block if outputs == block.stats.outputs else replace(block, stats=replace(block.stats, outputs=outputs))


def _count_windows(message: ShadowPayload) -> int:
    """Count the windows of a message; labels may arrive in a message without any."""
    parts: list[ShadowPayload | ComparedOutput] = [message, *message.outputs.values()]
    return max(
        max(part.n, sum(part.labelled), part.stats.windows, part.other_stats.windows, part.stats.abs_error.n)
        for part in parts
    )


def _list_rules(
    limits: RuleLimits, blocks: Sequence[ComparisonBlock], new_is_shadow: bool
) -> Iterator[tuple[str, str, str, float, Literal["at least", "at most"]]]:
    """Yield (output, name, rule of `comparison.rules`, limit, bound) for each limit that is set, "" the first output.

    Limits that a further output has from the first one count where they fit its kind.
    """
    yield from (("", *rule) for rule in _list_output_rules(limits, blocks))
    for output in rules.list_outputs(blocks, new_is_shadow):
        own, inherited = rules.output_limits(limits, output)
        part = rules.select_output(blocks, output)
        if rules.is_numeric(part):
            own = replace(own, max_accuracy_drop=None, min_agreement=None if inherited else own.min_agreement)
        elif not rules.find_mismatch(part):
            own = replace(own, max_error_growth=None)
        yield from ((output, *rule) for rule in _list_output_rules(own, part))


def _list_output_rules(
    limits: RuleLimits, blocks: Sequence[ComparisonBlock]
) -> Iterator[tuple[str, str, float, Literal["at least", "at most"]]]:
    if limits.min_agreement is not None:
        yield "agreement", AGREEMENT, limits.min_agreement, "at least"
    if limits.max_latency_ratio is not None:
        yield "latency_ratio", LATENCY, limits.max_latency_ratio, "at most"
    if limits.max_accuracy_drop is not None:
        if sum(sum(block.stats.labelled) for block in blocks) >= MIN_LABELLED:
            yield "accuracy_gain", LABELS, -limits.max_accuracy_drop, "at least"
        else:
            yield "estimated_accuracy_gain", ESTIMATED_ACCURACY, -limits.max_accuracy_drop, "at least"
    if limits.max_error_growth is not None:
        yield ERROR_RATIO, LABELS, 1 + limits.max_error_growth, "at most"


def _count_reporting(rollout: Rollout, devices: StepDevices, messages: MessagesByDevice) -> tuple[int, int, list[str]]:
    """Return how many devices must report, how many do, and which do not, each with what it has done."""
    promote = rollout.current_step.promote
    joining = [device for device in devices.selected if device.device in devices.joining] or devices.selected
    batches = {device: sum(message.batches for message in sent) for device, sent in messages.items()}
    able = [device for device in joining if not device.has_failed]
    lacking = [
        device for device in able if device.phase != "active" and batches.get(device.device, 0) < promote.min_batches
    ]
    # Only responding members of a group are known. Those of a step that widens another one responded to that one.
    is_unknown = rollout.plan.target.startswith("group:") and len(joining) == len(devices.selected)
    needed = promote.min_devices if is_unknown else min(promote.min_devices, len(joining))
    described = [_describe_progress(device, batches.get(device.device, 0), promote) for device in lacking]
    return max(1, needed), len(able) - len(lacking), described


def _describe_progress(device: RolloutDevice, batches: int, promote: Promotion) -> str:
    if device.phase == NOT_REPORTED:
        seen = f"last seen {device.last_seen[:16]}Z" if device.last_seen else "never seen"
        return f"{device.device} (has not reported, {seen})"
    reason = f" for {printable(device.reason)}" if device.reason else ""
    return f"{device.device} ({device.phase}{reason}, {batches} of {promote.min_batches} batches)"


def _list_devices(described: Sequence[str]) -> str:
    more = len(described) - MAX_NAMED
    return ", ".join(described[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _has_too_many_failures(promote: Promotion, devices: StepDevices) -> bool:
    """Return True if the allowed share is exceeded even if no other device fails, or by the interval's lower end."""
    failed, responding = len(devices.failed), len(devices.responding)
    able = sum(not device.is_incompatible for device in devices.selected)
    if failed > promote.max_failed_share * able:
        return True
    return responding > 0 and wilson(failed / responding, responding)[0] > promote.max_failed_share


def _find_blockers(
    promote: Promotion, devices: StepDevices, needed: int, reporting: int, lacking: Sequence[str], hours: float
) -> list[str]:
    blockers = []
    if reporting < needed:
        waits = f"; missing {_list_devices(lacking)}" if lacking else ""
        if (known := len(devices.selected)) < needed:
            waits += f"; this step selects {pluralize(known, 'device')} that responded"
        blockers.append(f"devices with {promote.min_batches} batches: {reporting} of {needed}{waits}")
    if hours < promote.min_hours:
        blockers.append(f"{format_span(math.ceil(3600 * (promote.min_hours - hours)))} more")
    responding, failed = len(devices.responding), len(devices.failed)
    if failed > promote.max_failed_share * responding:
        allowed = f"{100 * promote.max_failed_share:g} % allowed"
        named = _list_devices([f"{device.device} ({printable(device.reason)})" for device in devices.failed])
        blockers.append(f"fewer failed devices: {failed} of {responding} responding, {allowed}; failed: {named}")
    return blockers


def _find_undecided_rules(rollout: Rollout, devices: StepDevices, rule_results: Sequence[RuleOutcome]) -> list[str]:
    """Return the rules that block the step. After the last step's devices are done, only failed rules do."""
    all_done = bool(devices.responding) and all(device.is_done for device in devices.responding)
    if all_done and rollout.next_step is None:
        return [result.text for result in rule_results if result.state == "failed"]
    blockers = [result.text for result in rule_results if result.state != "passed"]
    if blockers and all_done and rollout.current_step.strategy != "shadow":
        blockers.append("an operator's decision: all responding devices are done and send no more comparisons")
    return blockers
