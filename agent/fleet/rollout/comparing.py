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
from agent.comparison.paired_intervals import Block
from agent.comparison.rules import AGREEMENT, ESTIMATE, LABELS, LATENCY, Limits, State
from agent.comparison.tally import Tally
from agent.fleet.rollout.plan import Promotion
from agent.wire.messages import Shadow

Blocks = Mapping[str, Sequence[Shadow]]
# A device's windows count up to so many times those of the device in the middle.
MOST_TIMES = 2
# Of fewer labelled windows in all, the estimate is asked in their place.
FEWEST_LABELLED = 100


class Finding(msgspec.Struct, frozen=True):
    """One rule: its number with its interval, None where there is too little to say it; `words` for a sentence."""

    rule: str
    state: State
    words: str
    limit: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    blocks: int = 0
    devices: int = 0

    def document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__struct_fields__}


def compare(blocks: Blocks, promote: Promotion, *, beside: bool) -> list[Finding]:
    """Every rule that is asked. `beside`: the new bundle is the one beside, else the one whose results count."""
    taken = balanced(blocks)
    limits = Limits(promote.agreement, promote.slower, None, promote.accuracy_drop, promote.error_growth)
    found = rules.weigh(limits, taken, beside)
    return list(_asked(promote, found, taken))


def balanced(blocks: Blocks) -> list[Block]:
    """The newest messages of each device, as far as they hold no more windows than the device may bring."""
    if not blocks:
        return []
    middle = statistics.median(sum(_size(one) for one in said) for said in blocks.values())
    taken: list[Block] = []
    for device, said in blocks.items():
        left = MOST_TIMES * middle
        kept: list[Block] = []
        for one in reversed(said):
            if _size(one) > left:
                # Older ones would not lie beside those that are kept.
                break
            left -= _size(one)
            kept.append(Block(Tally.of(one), device))
        taken += reversed(kept)
    return taken


def _size(one: Shadow) -> int:
    """In windows; labels may come without any."""
    return max(one.n, sum(one.labelled), one.answered.windows, one.answered_beside.windows, one.answered.off.n)


def _asked(promote: Promotion, found: Sequence[rules.Finding], blocks: Sequence[Block]) -> Iterator[Finding]:
    by_rule = {one.rule: one for one in found}
    devices = len({one.device for one in blocks})
    labelled = sum(sum(one.tally.labelled) for one in blocks) >= FEWEST_LABELLED

    def said(name: str, rule: str, limit: float, least: bool) -> Finding:
        return _finding(name, by_rule.get(rule), limit, len(blocks), devices, least=least)

    if promote.agreement is not None:
        yield said("agreement", AGREEMENT, promote.agreement, True)
    if promote.slower is not None:
        yield said("time", LATENCY, promote.slower, False)
    if promote.accuracy_drop is not None and labelled:
        yield said("accuracy gained by labels", LABELS, -promote.accuracy_drop, True)
    elif promote.accuracy_drop is not None:
        yield said("estimated accuracy gained", ESTIMATE, -promote.accuracy_drop, True)
    if promote.error_growth is not None:
        yield said("error by labels", LABELS, 1 + promote.error_growth, False)


def _finding(name: str, told: rules.Finding | None, limit: float, blocks: int, devices: int, *, least: bool) -> Finding:
    """With the limit that was asked; what nothing can be told of is open: that is no reason to go on."""
    asked = f"{'at least' if least else 'at most'} {limit:g}"
    if told is None or "value" not in told.numbers:
        words = f"{name} not known yet over {blocks} blocks of {devices} devices ({asked}: open)"
        return Finding(name, "open", words, limit, blocks=blocks, devices=devices)
    value, low, high = (float(told.numbers[one]) for one in ("value", "low", "high"))
    interval = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    words = f"{name} {interval} over {blocks} blocks of {devices} devices ({asked}: {told.state})"
    return Finding(name, told.state, words, limit, value, low, high, blocks, devices)
