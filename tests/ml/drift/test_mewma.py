"""MEWMA: how often chance raises an alarm, and how soon four of sixteen shifts are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from msgspec.structs import replace

from outstation.ml.drift import DriftMonitor, MonitorSettings
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.mewma import CLIP, UNREACHABLE_LIMIT, Mewma, fit_limit
from outstation.ml.drift.numeric.control_limits import ScoreNoise
from tests.kit.machine import LABELS, WINDOW, feed, readings, reference

LEARN, SCORES, ALLOTTED = 40, 16, 4e-3


def noise(windows: int, scores: int, memory: float = 0.0) -> ScoreNoise:
    return ScoreNoise(
        windows, np.ones(scores), np.ones(scores), np.full(scores, memory), np.ones(scores), np.full(scores, 3.0)
    )


def alarms(seed: int, windows: int, shift: float = 0.0, together: float = 0.0) -> list[int]:
    """In which windows squares were beyond the limit, begun anew each time; the first four scores are shifted."""
    rng = np.random.default_rng(seed)
    mixed = np.linalg.cholesky(np.full((SCORES, SCORES), together) + (1 - together) * np.eye(SCORES)).T
    learned = rng.normal(size=(LEARN, SCORES)) @ mixed
    mean, sd = learned.mean(0), learned.std(0, ddof=1)
    most = fit_limit((learned - mean) / sd, noise(LEARN, SCORES), ALLOTTED)
    rows = rng.normal(size=(windows, SCORES)) @ mixed
    rows[:, :4] += shift
    now, collected = Mewma.zeros(SCORES), []
    for window, z in enumerate((rows - mean) / (sd * np.sqrt(1 + 1 / LEARN))):
        now = now.update(z, z, window)
        if now.statistic > most:
            collected.append(window)
            now = Mewma.zeros(SCORES)
    return collected


@pytest.mark.parametrize("together", [0.0, 0.5])
def test_chance_is_taken_for_a_shift_about_as_often_as_allotted(together: float) -> None:
    share = sum(len(alarms(seed, 100, together=together)) for seed in range(80)) / 8000
    assert ALLOTTED / 4 < share < 2 * ALLOTTED


def test_four_small_shifts_of_sixteen_are_detected_in_few_windows() -> None:
    first = [next(iter(alarms(seed, 20, shift=1.28)), 20) + 1 for seed in range(60)]
    assert np.median(first) <= 6
    assert max(first) <= 20


def test_one_odd_window_alone_is_no_shift() -> None:
    odd = Mewma.zeros(3).update(np.full(3, 1e6), np.zeros(3), 0)
    learned = np.random.default_rng(1).normal(size=(LEARN, 3))
    assert odd.statistic < fit_limit(learned, noise(LEARN, 3), 1e-3)
    assert (odd.mean < CLIP).all()


@given(arrays(np.float64, st.tuples(st.integers(0, 12), st.integers(0, 4)), elements=st.floats(-1e3, 1e3)))
def test_any_learned_scores_give_a_limit_above_all_that_they_reached(scores: np.ndarray) -> None:
    most = fit_limit(scores, noise(len(scores), scores.shape[1], 0.3), 1e-3)
    now = Mewma.zeros(scores.shape[1])
    for z in scores:
        now = now.update(z, z, 0)
        assert now.statistic <= most
    assert 0 < most <= UNREACHABLE_LIMIT or not scores.any()


def test_a_window_without_a_score_changes_nothing_and_a_sign_resets() -> None:
    now = Mewma.zeros(2).update(np.array([1.0, -1.0]), np.array([2.0, -2.0]), 10)
    now = now.update(np.array([np.nan, -1.0]), np.array([9.0, -4.0]), 20)
    assert now.windows.tolist() == [1, 2]
    assert now.effect.tolist() == [2.0, -6.0]
    assert now.since.tolist() == [10, 10]
    now = now.update(np.array([-2.0, -1.0]), np.array([-5.0, -4.0]), 30)
    assert now.windows.tolist() == [1, 3]
    assert now.effect.tolist() == [-5.0, -10.0]
    assert now.since.tolist() == [30, 10]


def test_a_state_with_other_tests_is_refused() -> None:
    monitor = DriftMonitor(MonitorSettings(reference(), labels=LABELS, window=WINDOW, learn_windows=LEARN))
    state, _ = feed(monitor, monitor.start(), readings(3, 2))
    old = replace(state, suite=replace(state.suite, cusum=Cusum.zeros(3)))
    with pytest.raises(ValueError, match="a version with other tests"):
        monitor.restore(monitor.to_bytes(old))
    assert monitor.restore(monitor.to_bytes(state)).index == state.index
