"""Evaluation of alert rules: when observations of windows raise an alert and when they clear it.

Pure functions of arrays. Every decision depends on windows up to it only, so a batch that is split in two gives what
the whole gives. The work for each rule is a few passes over arrays of windows, and one step for each transition.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config.alert_rules import MAX_DURATION_S
from outstation.foundation.arrays import Bools, Ints

# Longest time between two windows that is counted: sums of any number of them fit into 64 bits.
_MAX_GAP_US = int(MAX_DURATION_S * 1e6)
_MAX_TIME_US = 2**61


class Trigger(msgspec.Struct, frozen=True):
    """When a rule's alert is raised and cleared; each window either meets the condition, is calm, or neither.

    - raised: `needed` of the newest `window_count` windows meet the condition, and it has been met for `duration_us`
    - cleared: `calm_windows` windows in a row are calm, for `calm_us`, and the alert is at least `hold_us` old
    - `is_repetition`: meeting the condition says something of the time since the window before, too
    """

    needed: int = 1
    window_count: int = 1
    duration_us: int = 0
    calm_windows: int = 1
    calm_us: int = 0
    hold_us: int = 0
    is_repetition: bool = False


class Observations(msgspec.Struct, frozen=True, eq=False):
    """Windows that count for a rule: meets the condition `hit` (w,), is `calm` (w,), time `t` (w,) epoch µs."""

    hit: Bools
    calm: Bools
    t: Ints


class RuleState(msgspec.Struct, frozen=True):
    """State of a rule after its newest window that counts.

    - `fingerprint` of the rule's text; `number` of alerts so far
    - `age_us` of a raised alert
    - `hits`: a byte for each of the newest windows, 1 if it met the condition
    - `hit_us`, `calm_us`: how long the condition has been met, or windows have been calm; None if the newest is not
    - `answer` of the newest window, for rules about unchanged answers
    """

    fingerprint: str = ""
    number: int = 0
    is_raised: bool = False
    age_us: int = 0
    hits: bytes = b""
    hit_us: int | None = None
    calm_windows: int = 0
    calm_us: int | None = None
    last_t: int | None = None
    answer: float | None = None


class Transition(msgspec.Struct, frozen=True):
    """Alert `number` is raised or cleared by the window at `index`, of which `hits` newest ones met the condition."""

    index: int
    is_raised: bool
    number: int
    hits: int


def mark_repetitions(answers: NDArray[np.float64], before: float | None) -> Bools:
    """Return which of the finite `answers` (w,) equal the one before; `before` is that before the first."""
    if not len(answers):
        return np.zeros(0, np.bool_)
    previous = np.concatenate([[np.nan if before is None else before], answers[:-1]])
    return np.asarray(answers == previous)


def advance(trigger: Trigger, state: RuleState, seen: Observations) -> tuple[RuleState, list[Transition]]:
    """Return the state after these windows, and the transitions among them in order."""
    if not len(seen.t):
        return state, []
    gaps = _measure_gaps(seen.t, state.last_t)
    elapsed = np.cumsum(gaps)
    hit_us = _time_runs(seen.hit, state.hit_us, gaps, trigger.duration_us, is_repetition=trigger.is_repetition)
    calm_us = _time_runs(seen.calm, state.calm_us, gaps, trigger.calm_us, is_repetition=False)
    recent = np.concatenate([np.frombuffer(state.hits, np.uint8), seen.hit.astype(np.uint8)])
    counts = _count_newest(recent, len(state.hits), trigger.window_count)
    calm_windows = _count_runs(seen.calm, state.calm_windows)
    raising = seen.hit & (counts >= trigger.needed) & (hit_us >= trigger.duration_us)
    clearing = seen.calm & (calm_windows >= trigger.calm_windows) & (calm_us >= trigger.calm_us)
    number, is_raised, age_us, transitions = _alternate(trigger, state, raising, clearing, elapsed, counts)
    remembered = min(trigger.window_count - 1, len(recent))
    return (
        RuleState(
            state.fingerprint,
            number,
            is_raised,
            age_us,
            recent[len(recent) - remembered :].tobytes(),
            # Longer than needed is as good as needed, and stays a small number.
            min(int(hit_us[-1]), trigger.duration_us) if seen.hit[-1] else None,
            min(int(calm_windows[-1]), trigger.calm_windows),
            min(int(calm_us[-1]), trigger.calm_us) if seen.calm[-1] else None,
            int(seen.t[-1]),
            state.answer,
        ),
        transitions,
    )


def _alternate(
    trigger: Trigger, state: RuleState, raising: Bools, clearing: Bools, elapsed: Ints, counts: Ints
) -> tuple[int, bool, int, list[Transition]]:
    """Return number, openness and age of the alert after all windows, and the transitions."""
    raise_at, clear_at = np.flatnonzero(raising), np.flatnonzero(clearing)
    number, is_raised, raised_us, position = state.number, state.is_raised, -state.age_us, 0
    transitions: list[Transition] = []
    while True:
        if is_raised:
            position = max(position, int(np.searchsorted(elapsed, raised_us + trigger.hold_us)))
        candidates = clear_at if is_raised else raise_at
        place = int(np.searchsorted(candidates, position))
        if place == len(candidates):
            break
        index = int(candidates[place])
        is_raised = not is_raised
        if is_raised:
            number, raised_us = number + 1, int(elapsed[index])
        transitions.append(Transition(index, is_raised, number, int(counts[index])))
        position = index + 1
    # No decision needs an age beyond the hold.
    age_us = min(int(elapsed[-1]) - raised_us, trigger.hold_us) if is_raised else 0
    return number, is_raised, age_us, transitions


def _measure_gaps(t: Ints, last_t: int | None) -> Ints:
    """Return the time (w,) µs from each window to the one before; 0 where a clock was set back."""
    first = int(t[0]) if last_t is None else last_t
    times = np.clip(np.concatenate([[first], t]), -_MAX_TIME_US, _MAX_TIME_US)
    return np.asarray(np.clip(np.diff(times), 0, _MAX_GAP_US))


def _time_runs(flags: Bools, carried_us: int | None, gaps: Ints, needed_us: int, *, is_repetition: bool) -> Ints:
    """Return how long (w,) µs each run of true `flags` has lasted; `carried_us`: that of a run that began before.

    An outage of more than the time that is needed counts as half of it: it proves nothing, but two results that far
    apart on each side do. A run begins at its first window; with `is_repetition`, at the window before.
    """
    spans = np.cumsum(np.where(gaps > needed_us, needed_us // 2, gaps))
    goes_on = np.concatenate([[carried_us is not None], flags[:-1]])
    begins = np.concatenate([[0], spans[:-1]]) if is_repetition else spans
    base = np.maximum.accumulate(np.where(flags & ~goes_on, begins, -(carried_us or 0)))
    return np.asarray(np.where(flags, spans - base, -1))


def _count_newest(recent: NDArray[np.uint8], earlier: int, window_count: int) -> Ints:
    """Return how many of the newest `window_count` windows met the condition, for all but the `earlier` ones."""
    sums = np.concatenate([[0], np.cumsum(recent, dtype=np.int64)])
    ends = np.arange(earlier + 1, len(recent) + 1)
    return np.asarray(sums[ends] - sums[np.maximum(ends - window_count, 0)])


def _count_runs(flags: Bools, carried: int) -> Ints:
    """Return the length (w,) of the run of true `flags` that ends at each window; `carried`: that before the first."""
    index = np.arange(len(flags))
    return np.asarray(index - np.maximum.accumulate(np.where(flags, -1 - carried, index)))
