"""A new bundle beside the old one, rule by rule: good or bad where the whole interval is on that side, else open.

The same for a device on probation (`judge`, by the rules of the desired state) and for a fleet that promotes (`weigh`,
with limits of its own).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from agent.comparison import paired_intervals
from agent.comparison.paired_intervals import FEWEST, FEWEST_BLOCKS, Block, Estimate
from agent.wire.desired_state import Rules

State = Literal["good", "bad", "open"]
# Names of the rules, which are the reasons a bundle is taken back for.
AGREEMENT, LATENCY, ERRORS, LABELS, ESTIMATE = "agreement", "latency", "errors", "labels", "estimate"


class Limits(msgspec.Struct, frozen=True):
    """What is asked of the new bundle; None: not asked. See `Rules` for what each of them is."""

    agreement: float | None = None
    slower: float | None = None
    errors: float | None = None
    accuracy_drop: float | None = None
    error_growth: float | None = None

    @classmethod
    def of(cls, rules: Rules) -> Limits:
        return cls(rules.agreement, rules.slower, rules.errors, rules.accuracy_drop, rules.error_growth)


class Finding(msgspec.Struct, frozen=True):
    """What one rule says, and a sentence with its numbers."""

    rule: str
    state: State
    summary: str
    numbers: dict[str, Any] = msgspec.field(default_factory=dict)


def judge(rules: Rules, blocks: Sequence[Block], new_is_beside: bool) -> list[Finding]:
    """By the rules of a device. `new_is_beside`: in shadow; False on probation, where the old one answers beside it."""
    return weigh(Limits.of(rules), blocks, new_is_beside)


def weigh(limits: Limits, blocks: Sequence[Block], new_is_beside: bool) -> list[Finding]:
    """A finding for each limit that is set and that these blocks can tell of at all.

    Without any label there is none of labels, and of `errors` only where the new bundle is beside.
    """
    return list(_findings(limits, blocks, new_is_beside))


def _findings(limits: Limits, blocks: Sequence[Block], new_is_beside: bool) -> Iterator[Finding]:
    if limits.agreement is not None:
        yield _agreement(limits.agreement, blocks)
    if limits.slower is not None:
        found = paired_intervals.slowness(blocks, new_is_beside=new_is_beside)
        yield _most(LATENCY, "Time a window in the model, as a multiple of the bundle before", found, limits.slower)
    if limits.errors is not None and new_is_beside:
        yield _errors(limits.errors, blocks)
    if limits.accuracy_drop is not None:
        yield from _accuracy(-limits.accuracy_drop, blocks, new_is_beside)
    if limits.error_growth is not None and any(one.tally.model.off.n for one in blocks):
        found = paired_intervals.error_growth(blocks, new_is_beside=new_is_beside)
        what = "Mean absolute error by labels, as a multiple of the bundle before"
        yield _most(LABELS, what, found, 1 + limits.error_growth)


def _accuracy(limit: float, blocks: Sequence[Block], new_is_beside: bool) -> Iterator[Finding]:
    """By labels and by scores, as far as there are any."""
    if any(sum(one.tally.labelled) for one in blocks):
        found = paired_intervals.labelled_gain(blocks, new_is_beside=new_is_beside)
        yield _least(LABELS, "Accuracy by labels, less that of the bundle before", found, limit)
    if any(one.tally.model.expected.n and one.tally.beside.expected.n for one in blocks):
        found = paired_intervals.expected_gain(blocks, new_is_beside=new_is_beside)
        yield _least(ESTIMATE, "Expected accuracy, less that of the bundle before", found, limit)


def _agreement(limit: float, blocks: Sequence[Block]) -> Finding:
    found = paired_intervals.agreement(blocks)
    why = next((one.tally.why for one in reversed(blocks) if one.tally.n and one.tally.same is None), "")
    if found is None and why:
        return Finding(AGREEMENT, "open", f"Agreement is not known: {why}.", {"limit": limit})
    return _least(AGREEMENT, "Share of windows answered as by the bundle before", found, limit)


def _errors(limit: float, blocks: Sequence[Block]) -> Finding:
    """One error is proof that errors happen; that none do is believed once there were batches enough."""
    batches, errors = sum(one.tally.batches for one in blocks), sum(one.tally.errors for one in blocks)
    share, low, high = paired_intervals.failing(blocks)
    why = next((one.tally.why for one in reversed(blocks) if one.tally.errors), "")
    said = f"{errors:,} of {batches:,} batches failed, {share:.3f} [{low:.3f}, {high:.3f}]" + (f", {why}" * bool(why))
    numbers = {"value": share, "low": low, "high": high, "limit": limit, "batches": batches, "errors": errors}
    if batches and low > limit:
        return Finding(ERRORS, "bad", f"{said}: more than the {limit:g} that may.", _rounded(numbers))
    enough = batches >= FEWEST_BLOCKS and errors == 0
    if batches and (high <= limit or enough):
        return Finding(ERRORS, "good", f"{said}: no more than the {limit:g} that may.", _rounded(numbers))
    return Finding(ERRORS, "open", f"{said}; {limit:g} may: not decided.", _rounded(numbers))


def _least(rule: str, what: str, found: Estimate | None, limit: float) -> Finding:
    """Of what should not be less than `limit`."""
    if found is None:
        return _unknown(rule, what, limit)
    state: State = "good" if found.low >= limit else "bad" if found.high < limit else "open"
    words = {"good": "not below", "bad": "below", "open": "not decided against"}
    return _finding(rule, what, found, limit, state, words[state])


def _most(rule: str, what: str, found: Estimate | None, limit: float) -> Finding:
    """Of what should not be more than `limit`."""
    if found is None:
        return _unknown(rule, what, limit)
    state: State = "good" if found.high <= limit else "bad" if found.low > limit else "open"
    words = {"good": "not above", "bad": "above", "open": "not decided against"}
    return _finding(rule, what, found, limit, state, words[state])


def _finding(rule: str, what: str, found: Estimate, limit: float, state: State, words: str) -> Finding:
    interval = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    summary = f"{what}: {interval} of {found.n:,} windows in {found.units:,} {found.of}, {words} {limit:g}."
    numbers = {"value": found.value, "low": found.low, "high": found.high, "limit": limit, "n": found.n}
    return Finding(rule, state, summary, _rounded({**numbers, found.of: found.units}))


def _unknown(rule: str, what: str, limit: float) -> Finding:
    few = f"fewer than {FEWEST_BLOCKS} blocks or {FEWEST} devices tell of it yet"
    return Finding(rule, "open", f"{what}: {few}; {limit:g} is the limit.", {"limit": limit})


def _rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
