"""Evaluation of alert rules: raised and cleared in turn, whatever the batches are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.rules import evaluation
from outstation.device.rules.evaluation import Observations, RuleState, Transition, Trigger

S = 1_000_000


def windows(hits: str, *, step_s: float = 1.0, calm: str | None = None) -> Observations:
    """Return windows that meet the condition where `hits` has an x, `step_s` apart; `calm` has one where they are."""
    hit = np.array([mark == "x" for mark in hits])
    is_calm = ~hit if calm is None else np.array([mark == "x" for mark in calm])
    return Observations(hit, is_calm, np.arange(len(hits), dtype=np.int64) * round(step_s * S))


def changes(trigger: Trigger, seen: Observations, state: RuleState | None = None) -> list[tuple[int, bool]]:
    _, transitions = evaluation.advance(trigger, state or RuleState(), seen)
    return [(change.index, change.is_raised) for change in transitions]


def slice_windows(seen: Observations, begin: int, end: int) -> Observations:
    return Observations(seen.hit[begin:end], seen.calm[begin:end], seen.t[begin:end])


def advance_in_parts(trigger: Trigger, seen: Observations, cuts: Sequence[int]) -> tuple[RuleState, list[Transition]]:
    state, out = RuleState("f"), []
    edges = [0, *sorted(cuts), len(seen.t)]
    for begin, end in pairwise(edges):
        state, transitions = evaluation.advance(trigger, state, slice_windows(seen, begin, end))
        out += [
            Transition(change.index + begin, change.is_raised, change.number, change.hits) for change in transitions
        ]
    return state, out


def simulate(trigger: Trigger, seen: Observations) -> list[tuple[int, bool]]:
    """Return the transitions by the rule's definition, one window after the other."""
    out: list[tuple[int, bool]] = []
    hits: list[bool] = []
    since = {"hit": -1, "calm": -1}
    is_raised, age, calm_windows, last = False, 0, 0, None
    for index, (hit, calm, t) in enumerate(zip(seen.hit.tolist(), seen.calm.tolist(), seen.t.tolist(), strict=True)):
        gap = 0 if last is None else max(0, t - last)
        last, age = t, age + gap
        hits = [*hits, hit][-trigger.window_count :]
        calm_windows = calm_windows + 1 if calm else 0
        for name, flag, needed in (("hit", hit, trigger.duration_us), ("calm", calm, trigger.calm_us)):
            counted = gap if gap <= needed else needed // 2
            start = counted if trigger.is_repetition and name == "hit" else 0
            since[name] = -1 if not flag else start if since[name] < 0 else since[name] + counted
        if not is_raised and hit and sum(hits) >= trigger.needed and since["hit"] >= trigger.duration_us:
            is_raised, age = True, 0
            out.append((index, True))
        elif is_raised and calm and calm_windows >= trigger.calm_windows and since["calm"] >= trigger.calm_us:
            is_raised = age < trigger.hold_us
            out += [] if is_raised else [(index, False)]
    return out


def test_three_of_five_windows_raise_it_and_five_without_clear_it() -> None:
    trigger = Trigger(needed=3, window_count=5, calm_windows=5)
    assert changes(trigger, windows("x.x.x.....")) == [(4, True), (9, False)]
    assert changes(trigger, windows("x..x..x..x")) == []


def test_a_condition_that_holds_for_a_time_raises_it_at_that_time() -> None:
    trigger = Trigger(duration_us=3 * S, calm_us=3 * S)
    assert changes(trigger, windows("xxx.xxxxx...x....")) == [(7, True), (16, False)]


def test_an_outage_does_not_count_as_time_in_which_the_condition_held() -> None:
    trigger = Trigger(duration_us=600 * S, calm_us=600 * S)
    seen = Observations(np.ones(4, bool), np.zeros(4, bool), np.array([0, 10_800, 10_860, 11_200]) * S)
    assert changes(trigger, seen) == [(3, True)]


def test_windows_at_longer_intervals_than_the_time_raise_it_all_the_same() -> None:
    assert changes(Trigger(duration_us=S, calm_us=S), windows("xxxx", step_s=60)) == [(2, True)]


def test_it_stays_raised_for_the_hold_and_clears_with_the_first_calm_window_after_it() -> None:
    trigger = Trigger(hold_us=5 * S)
    assert changes(trigger, windows("x...x....")) == [(0, True), (5, False)]
    assert changes(trigger, windows("x....xx..")) == [(0, True), (7, False)]


def test_between_both_limits_of_a_hysteresis_nothing_changes() -> None:
    trigger = Trigger(needed=1, window_count=1)
    assert changes(trigger, windows("x..x....", calm="......xx")) == [(0, True), (6, False)]


def test_a_clock_that_is_set_back_neither_ends_nor_prolongs_a_hold() -> None:
    seen = windows("x.......")
    times = seen.t.copy()
    times[3:] -= 86_400 * S
    moved = Observations(seen.hit, seen.calm, times)
    # The window after the step adds no time.
    assert changes(Trigger(hold_us=4 * S), moved) == [(0, True), (5, False)]


def test_times_beyond_the_calendar_are_taken() -> None:
    times = np.array([-(2**63), 2**63 - 1] * 4, np.int64)
    seen = Observations(np.ones(8, bool), np.zeros(8, bool), times)
    assert changes(Trigger(duration_us=S, calm_us=S), seen) == [(3, True)]


def test_equal_answers_are_counted_from_the_first_of_them() -> None:
    answers = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 5.0])
    hit = evaluation.mark_repetitions(answers, None)
    assert hit.tolist() == [False, False, True, True, True, False]
    assert evaluation.mark_repetitions(answers, 1.0).tolist()[0] is True
    seen = Observations(hit, ~hit, np.arange(6, dtype=np.int64) * S)
    by_time = Trigger(duration_us=3 * S, is_repetition=True)
    by_windows = Trigger(needed=3, window_count=3, is_repetition=True)
    assert changes(by_time, seen) == changes(by_windows, seen) == [(4, True), (5, False)]


triggers = st.builds(
    lambda window_count, needed, duration, calm, hold, is_repetition: Trigger(
        needed=min(needed, window_count),
        window_count=window_count,
        duration_us=duration * S,
        calm_windows=calm,
        calm_us=duration * S,
        hold_us=hold * S,
        is_repetition=is_repetition,
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([0, 0, 2, 5]),
    st.integers(1, 6),
    st.sampled_from([0, 0, 3, 9]),
    st.booleans(),
)
marks = st.sampled_from(["hit", "calm", "neither"])
observations = st.lists(st.tuples(marks, st.integers(-2, 12)), min_size=1, max_size=60).map(
    lambda items: Observations(
        np.array([mark == "hit" for mark, _ in items]),
        np.array([mark == "calm" for mark, _ in items]),
        np.cumsum([gap for _, gap in items]).astype(np.int64) * S,
    )
)


@given(triggers, observations, st.lists(st.integers(0, 60), max_size=8))
def test_how_windows_are_split_into_batches_changes_nothing(
    trigger: Trigger, seen: Observations, cuts: list[int]
) -> None:
    cuts = [min(cut, len(seen.t)) for cut in cuts]
    whole, transitions = advance_in_parts(trigger, seen, [])
    assert advance_in_parts(trigger, seen, cuts) == (whole, transitions)
    assert [(change.index, change.is_raised) for change in transitions] == simulate(trigger, seen)


@given(triggers, observations)
def test_an_alert_is_raised_and_cleared_in_turn_under_ascending_numbers(trigger: Trigger, seen: Observations) -> None:
    state, transitions = advance_in_parts(trigger, seen, [])
    assert [change.is_raised for change in transitions] == [index % 2 == 0 for index in range(len(transitions))]
    assert [change.number for change in transitions] == [index // 2 + 1 for index in range(len(transitions))]
    assert state.is_raised == bool(len(transitions) % 2)


@pytest.mark.parametrize("window_count", [1, 5])
def test_no_window_changes_nothing(window_count: int) -> None:
    state, none = RuleState("f", 3, is_raised=True, age_us=5), slice_windows(windows("x"), 0, 0)
    assert evaluation.advance(Trigger(window_count=window_count), state, none) == (state, [])
