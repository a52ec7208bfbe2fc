"""Intervals: their coverage, and their width if neighbours are alike."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.performance import intervals
from outstation.ml.performance.intervals import INDEPENDENT, Dependence


def test_wilson_is_the_textbook_interval() -> None:
    # Newcombe (1998), table I: 81 of 263.
    low, high = intervals.wilson(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_a_share(pair: tuple[int, int]) -> None:
    right, n = pair
    low, high = intervals.wilson(right / n, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


def test_nothing_known_is_anything() -> None:
    assert intervals.wilson(0.0, 0) == (0.0, 1.0)


def test_independent_results_count_one_each_and_alike_ones_less() -> None:
    random = np.random.default_rng(1)
    free = random.random(2000) < 0.2
    sticky = np.repeat(random.random(200) < 0.2, 10)
    assert intervals.estimate_design_effect(free.astype(float)) < 1.2
    assert intervals.estimate_design_effect(sticky.astype(float)) > 8


def test_too_few_or_constant_results_have_no_design_effect() -> None:
    assert intervals.estimate_design_effect(np.ones(5)) == 1.0
    assert intervals.estimate_design_effect(np.ones(500)) == 1.0


def draw_losses(kind: str, n: int, random: np.random.Generator) -> tuple[Any, float]:
    """Return errors (n,), and their true share."""
    if kind == "independent":
        return (random.random(n) < 0.15).astype(float), 0.15
    if kind == "autoregressive":
        noise, state = random.standard_normal(n + 100), 0.0
        states = [state := 0.9 * state + math.sqrt(1 - 0.81) * step for step in noise]
        return (np.array(states[100:]) > 1.036433).astype(float), 0.15
    # Sessions of 50 results, each with an error rate of its own: neighbours correlate by 1/7.
    rates = np.repeat(random.beta(0.9, 5.1, n // 50 + 2), 50)[random.integers(0, 50) :][:n]
    return (random.random(n) < rates).astype(float), 0.15


@pytest.mark.parametrize("kind", ["independent", "autoregressive", "sessions"])
def test_intervals_hold_the_truth_however_results_depend_on_each_other(kind: str) -> None:
    random, trials, n = np.random.default_rng(3), 60, 1000
    holds, width = np.zeros(2), 0.0
    for _ in range(trials):
        losses, truth = draw_losses(kind, n, random)
        dependence = intervals.estimate_dependence(losses)
        mean = lambda w, losses=losses: [float((w * losses).mean())]  # noqa: E731
        [drawn] = intervals.bootstrap(mean, intervals.bootstrap_weights(n, dependence))
        wilson = intervals.wilson(losses.mean(), n / dependence.design_effect)
        holds += [low <= truth <= high for low, high in (wilson, drawn)]
        width += (wilson[1] - wilson[0]) / np.diff(intervals.wilson(losses.mean(), n)).item()
    assert (holds >= 0.9 * trials).all()
    assert kind != "independent" or width < 1.25 * trials


def test_weights_of_few_blocks_vary_more() -> None:
    drawn = intervals.spread_weights(np.random.default_rng(0).standard_exponential(400_000), 3.0)
    assert drawn.mean() == pytest.approx(1.0, abs=0.02)
    assert drawn.var() == pytest.approx(3.0, abs=0.2)


def test_dependence_of_values_that_are_constant_infinite_or_few_is_none() -> None:
    for values in (np.ones(500), np.full(500, np.inf), np.arange(5.0), np.zeros(0)):
        assert intervals.estimate_dependence(values).design_effect == 1.0


def test_weights_are_the_same_every_time_and_have_mean_one() -> None:
    drawn = np.array(list(intervals.bootstrap_weights(333, INDEPENDENT)))
    assert drawn.tobytes() == np.array(list(intervals.bootstrap_weights(333, INDEPENDENT))).tobytes()
    assert drawn.mean(axis=1) == pytest.approx(np.ones(intervals.REPLICATES))
    # Exponential: standard deviation 1, and replicates differ.
    assert drawn.std() == pytest.approx(1.0, abs=0.05)
    assert np.abs(np.asarray(np.corrcoef(drawn[:50]))[np.triu_indices(50, 1)]).max() < 0.3


def test_neighbours_that_are_alike_share_their_weight() -> None:
    drawn = np.array(list(intervals.bootstrap_weights(400, Dependence(5.0, 10, 1.0))))
    assert (drawn[:, 0] == drawn[:, 9]).all()
    assert (drawn[:, 9] != drawn[:, 10]).all()


def test_the_bootstrap_of_a_mean_covers_it() -> None:
    random, inside = np.random.default_rng(3), 0
    for _ in range(100):
        values = random.normal(5, 2, 120)
        [(low, high)] = intervals.bootstrap(
            lambda w, v=values: [float((v * w).sum() / w.sum())],  # type: ignore[misc]
            intervals.bootstrap_weights(120, INDEPENDENT),
        )
        inside += low <= 5 <= high
    assert 88 <= inside <= 100


def test_a_statistic_without_a_value_has_no_interval() -> None:
    [nothing] = intervals.bootstrap(lambda w: [math.nan], intervals.bootstrap_weights(50, INDEPENDENT))
    assert all(map(math.isnan, nothing))


def test_what_never_varied_has_no_interval_of_width_zero() -> None:
    [same] = intervals.bootstrap(lambda w: [1.0], intervals.bootstrap_weights(50, INDEPENDENT))
    assert all(map(math.isnan, same))


@pytest.mark.parametrize("value", [1e160, -1e308, math.inf, math.nan])
def test_an_extreme_value_keeps_the_design_effect_finite(value: float) -> None:
    values = np.full(60, 0.5)
    values[5] = value
    assert 1.0 <= intervals.estimate_design_effect(values) < 20


@given(st.floats(1e-100, 1e100))
def test_how_alike_neighbours_are_does_not_depend_on_the_unit(scale: float) -> None:
    values = np.repeat(np.random.default_rng(1).random(50), 4)
    assert intervals.estimate_design_effect(values * scale) == pytest.approx(intervals.estimate_design_effect(values))


def test_weights_of_many_results_are_made_one_replicate_at_a_time() -> None:
    tracemalloc.start()
    try:
        intervals.bootstrap(lambda w: [float(w[0])], intervals.bootstrap_weights(100_000, INDEPENDENT))
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_groups_that_differ_by_more_than_chance_count_for_less() -> None:
    rng = np.random.default_rng(3)
    free = (rng.random((400, 25)) < 0.1).astype(float)
    # Sessions of 50 values each, one in ten of which goes wrong half the time: neighbours hardly show it.
    chances = np.repeat(np.where(rng.random(200) < 0.1, 0.5, 0.05), 50)
    sessions = (rng.random(10_000) < chances).astype(float).reshape(400, 25)

    def effect(groups: Any) -> float:
        return intervals.estimate_group_effect(groups.sum(axis=1), (groups**2).sum(axis=1), 25)

    assert effect(free) < 1.2
    assert effect(sessions) > 4 > 2 > intervals.estimate_design_effect(sessions.ravel())
    assert effect(sessions * 1e3) == pytest.approx(effect(sessions))
    assert effect(np.ones((40, 25))) == effect(sessions[:3]) == 1.0


def test_intervals_of_six_sessions_hold_the_truth_by_students_quantile() -> None:
    random, holds = np.random.default_rng(5), 0
    for _ in range(200):
        losses, truth = draw_losses("sessions", 300, random)
        low, high = intervals.wilson(losses.mean(), 300 / intervals.estimate_dependence(losses).design_effect)
        holds += low <= truth <= high
    assert holds >= 172, "163 without the quantile"
