"""What follows from a step as it stands: wait, promote, finish or abort. Pure.

Rules:
- abort: too many devices failed, whatever the others will say; or an asked finding is bad on enough devices
- the step is over: enough devices report, with enough batches each, it began long enough ago, no more failed than may,
  every asked finding is good
- the last step also waits for devices that are on their way, and ends without a finding that is open once all that were
  heard of have settled: nothing more is measured, and nothing else would follow
- devices that took the bundle back count as failed, and no more in the findings
- of a step that widens the one before, the devices that join with it must report, not those that did before
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from agent import clock
from agent.fleet.rollout import comparing
from agent.fleet.rollout.comparing import PromotionRuleResult
from agent.fleet.rollout.devices import NOT_REPORTED, RolloutDevice, StepDevices
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.plan import Promotion
from agent.fleet.rollout.tallies import RolloutTallies
from agent.performance.intervals import wilson
from agent.wire.messages import ShadowPayload

StepOutcome = Literal["wait", "promote", "finish", "abort"]
# A device that was heard of in this time and is not there yet is on its way.
RECENTLY_SEEN_US = 3600 * 1_000_000


class StepVerdict(msgspec.Struct, frozen=True):
    """`waits`: what is still missing, in words; `summary`: all that was looked at, with its numbers."""

    outcome: StepOutcome
    summary: str
    blockers: list[str]
    rule_results: list[PromotionRuleResult]
    reporting: int
    needed: int
    failed: int
    heard: int
    hours: float

    def to_evidence(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("reporting", "needed", "failed", "heard")}
        findings = [finding.to_dict() for finding in self.rule_results]
        return {"answer": self.outcome, **counts, "hours": round(self.hours, 3), "findings": findings}


def evaluate_step(
    rollout: Rollout, devices: StepDevices, tallies: RolloutTallies, step_start: str, now_us: int
) -> StepVerdict:
    """The step that the roll-out is at; `began`: RFC 3339."""
    promote, beside = rollout.current_step.promote, rollout.current_step.strategy == "shadow"
    taking_part = [one.device for one in devices.selected if not one.has_failed and not one.is_unfit]
    blocks = tallies.select_messages(taking_part, new_is_shadow=beside)
    findings = comparing.evaluate_promotion_rules(blocks, promote, new_is_shadow=beside)
    needed, reporting = _count_reporting(rollout, devices, blocks)
    # A clock that was set back makes it wait, no more.
    hours = max(0.0, (now_us - clock.parse_rfc3339(step_start)) / 3.6e9)
    waits = _find_blockers(promote, devices, needed, reporting, hours)
    if rollout.next_step is None and (late := _count_in_progress(devices.selected, now_us)):
        waits.append(f"devices on their way: {late}")
    waits += _find_undecided_rules(rollout, devices, findings)
    bad = any(one.state == "bad" for one in findings) and len(blocks) >= needed
    answer: StepOutcome = "wait"
    if bad or _has_too_many_failures(promote, devices):
        answer = "abort"
    elif not waits:
        answer = "promote" if rollout.next_step else "finish"
    failed, heard = len(devices.failed), len(devices.responding)
    counts = (
        f"{reporting} of {needed} devices that are needed report",
        f"{failed} of {heard} refused it or took it back ({100 * promote.max_failed_share:g} % may)",
        f"{hours:.1f} h in this step",
    )
    summary = ", ".join((*(one.words for one in findings), *counts))
    return StepVerdict(answer, summary, waits, findings, reporting, needed, failed, heard, hours)


def _count_reporting(
    rollout: Rollout, devices: StepDevices, messages: Mapping[str, Sequence[ShadowPayload]]
) -> tuple[int, int]:
    """(how many devices must report, how many do)."""
    promote = rollout.current_step.promote
    joining = devices.joining
    asked = [one for one in devices.selected if one.device in joining] if joining else devices.selected
    found = sum(
        _has_reported(one, messages.get(one.device, ()), promote.min_batches) for one in asked if not one.has_failed
    )
    # Of a group only devices that speak are known: nobody can say that there are no more.
    known = promote.min_devices if rollout.plan.target.startswith("group:") else min(promote.min_devices, len(asked))
    return max(1, known), found


def _has_reported(device: RolloutDevice, messages: Sequence[ShadowPayload], batches: int) -> bool:
    return device.phase == "settled" or sum(block.batches for block in messages) >= batches


def _has_too_many_failures(promote: Promotion, devices: StepDevices) -> bool:
    """Even if no other device fails, or by the lower end of the share's interval."""
    failed, heard = len(devices.failed), len(devices.responding)
    able = sum(not one.is_unfit for one in devices.selected)
    return failed > promote.max_failed_share * able or (heard > 0 and wilson(failed / heard, heard)[0] > promote.max_failed_share)


def _find_blockers(promote: Promotion, devices: StepDevices, needed: int, reporting: int, hours: float) -> list[str]:
    found = []
    if reporting < needed:
        silent = sum(one.phase == NOT_REPORTED for one in devices.selected)
        why = f"; {silent} of {len(devices.selected)} chosen devices not heard of" if silent else ""
        found.append(f"devices with {promote.min_batches} batches: {reporting} of {needed}{why}")
    if hours < promote.min_hours:
        found.append(f"{promote.min_hours - hours:.1f} h more")
    heard, failed = len(devices.responding), len(devices.failed)
    if failed > promote.max_failed_share * heard:
        found.append(f"fewer failed devices: {failed} of {heard} that were heard of, {100 * promote.max_failed_share:g} % may")
    return found


def _find_undecided_rules(
    rollout: Rollout, devices: StepDevices, rule_results: Sequence[PromotionRuleResult]
) -> list[str]:
    """Findings that hold it up. Devices that have settled measure no more: at the end, only what is bad still does."""
    settled = bool(devices.responding) and all(one.has_finished for one in devices.responding)
    if settled and rollout.next_step is None:
        return [one.words for one in rule_results if one.state == "bad"]
    found = [one.words for one in rule_results if one.state != "good"]
    if found and settled and rollout.current_step.strategy != "shadow":
        found.append("somebody to decide: all devices that were heard of have come to an end, and measure no more")
    return found


def _count_in_progress(selected: Sequence[RolloutDevice], now_us: int) -> int:
    return sum(
        not one.has_finished
        and one.last_seen is not None
        and now_us - clock.parse_rfc3339(one.last_seen) < RECENTLY_SEEN_US
        for one in selected
    )
