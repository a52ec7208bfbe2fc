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
from agent.fleet.rollout.comparing import Finding
from agent.fleet.rollout.devices import NOT_HEARD_OF, Member, Members
from agent.fleet.rollout.journal import Rollout
from agent.fleet.rollout.plan import Promotion
from agent.fleet.rollout.tallies import Tallies
from agent.performance.intervals import wilson
from agent.wire.messages import Shadow

Answer = Literal["wait", "promote", "finish", "abort"]
# A device that was heard of in this time and is not there yet is on its way.
ON_ITS_WAY_US = 3600 * 1_000_000


class Verdict(msgspec.Struct, frozen=True):
    """`waits`: what is still missing, in words; `summary`: all that was looked at, with its numbers."""

    answer: Answer
    summary: str
    waits: list[str]
    findings: list[Finding]
    reporting: int
    needed: int
    failed: int
    heard: int
    hours: float

    def evidence(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("reporting", "needed", "failed", "heard")}
        findings = [finding.document() for finding in self.findings]
        return {"answer": self.answer, **counts, "hours": round(self.hours, 3), "findings": findings}


def judge(rollout: Rollout, members: Members, tallies: Tallies, began: str, now_us: int) -> Verdict:
    """The step that the roll-out is at; `began`: RFC 3339."""
    promote, beside = rollout.now.promote, rollout.now.strategy == "shadow"
    taking_part = [one.device for one in members.chosen if not one.failed and not one.left_out]
    blocks = tallies.blocks(taking_part, beside=beside)
    findings = comparing.compare(blocks, promote, beside=beside)
    needed, reporting = _reporting(rollout, members, blocks)
    # A clock that was set back makes it wait, no more.
    hours = max(0.0, (now_us - clock.epoch_us(began)) / 3.6e9)
    waits = _waits(promote, members, needed, reporting, hours)
    if rollout.following is None and (late := _on_their_way(members.chosen, now_us)):
        waits.append(f"devices on their way: {late}")
    waits += _undecided(rollout, members, findings)
    bad = any(one.state == "bad" for one in findings) and len(blocks) >= needed
    answer: Answer = "wait"
    if bad or _too_many_failed(promote, members):
        answer = "abort"
    elif not waits:
        answer = "promote" if rollout.following else "finish"
    failed, heard = len(members.failed), len(members.heard)
    counts = (
        f"{reporting} of {needed} devices that are needed report",
        f"{failed} of {heard} refused it or took it back ({100 * promote.failed:g} % may)",
        f"{hours:.1f} h in this step",
    )
    summary = ", ".join((*(one.words for one in findings), *counts))
    return Verdict(answer, summary, waits, findings, reporting, needed, failed, heard, hours)


def _reporting(rollout: Rollout, members: Members, blocks: Mapping[str, Sequence[Shadow]]) -> tuple[int, int]:
    """(how many devices must report, how many do)."""
    promote = rollout.now.promote
    joining = members.joining
    asked = [one for one in members.chosen if one.device in joining] if joining else members.chosen
    found = sum(_reports(one, blocks.get(one.device, ()), promote.batches) for one in asked if not one.failed)
    # Of a group only devices that speak are known: nobody can say that there are no more.
    known = promote.devices if rollout.plan.to.startswith("group:") else min(promote.devices, len(asked))
    return max(1, known), found


def _reports(one: Member, blocks: Sequence[Shadow], batches: int) -> bool:
    return one.phase == "settled" or sum(block.batches for block in blocks) >= batches


def _too_many_failed(promote: Promotion, members: Members) -> bool:
    """Even if no other device fails, or by the lower end of the share's interval."""
    failed, heard = len(members.failed), len(members.heard)
    able = sum(not one.left_out for one in members.chosen)
    return failed > promote.failed * able or (heard > 0 and wilson(failed / heard, heard)[0] > promote.failed)


def _waits(promote: Promotion, members: Members, needed: int, reporting: int, hours: float) -> list[str]:
    found = []
    if reporting < needed:
        silent = sum(one.phase == NOT_HEARD_OF for one in members.chosen)
        why = f"; {silent} of {len(members.chosen)} chosen devices not heard of" if silent else ""
        found.append(f"devices with {promote.batches} batches: {reporting} of {needed}{why}")
    if hours < promote.hours:
        found.append(f"{promote.hours - hours:.1f} h more")
    heard, failed = len(members.heard), len(members.failed)
    if failed > promote.failed * heard:
        found.append(f"fewer failed devices: {failed} of {heard} that were heard of, {100 * promote.failed:g} % may")
    return found


def _undecided(rollout: Rollout, members: Members, findings: Sequence[Finding]) -> list[str]:
    """Findings that hold it up. Devices that have settled measure no more: at the end, only what is bad still does."""
    settled = bool(members.heard) and all(one.there for one in members.heard)
    if settled and rollout.following is None:
        return [one.words for one in findings if one.state == "bad"]
    found = [one.words for one in findings if one.state != "good"]
    if found and settled and rollout.now.strategy != "shadow":
        found.append("somebody to decide: all devices that were heard of have come to an end, and measure no more")
    return found


def _on_their_way(chosen: Sequence[Member], now_us: int) -> int:
    return sum(
        not one.there and one.last_seen is not None and now_us - clock.epoch_us(one.last_seen) < ON_ITS_WAY_US
        for one in chosen
    )
