"""CUSUM with slack 1 and limit 5: what raises an alarm, and what clears it."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.ml.drift.detectors import cusum
from outstation.ml.drift.detectors.cusum import Cusum


def after(*z: float) -> Cusum:
    """One test, given these scores; each window's effect is its own score."""
    state = Cusum.zeros(1)
    for item in z:
        state = state.update(np.array([item]), np.array([item]))
    return state


def test_one_odd_window_alone_never_alarms() -> None:
    assert not after(1000.0).alarm.any()
    assert after(1000.0).value[0, 0] == 3.0


def test_two_very_odd_windows_alarm() -> None:
    assert after(9.0, 9.0).alarm[:, 0].tolist() == [True, False]


def test_a_fall_alarms_on_the_other_side() -> None:
    assert after(-9.0, -9.0).alarm[:, 0].tolist() == [False, True]


def test_a_steady_small_shift_alarms_in_the_end() -> None:
    assert not after(*[1.6] * 8).alarm.any()
    assert after(*[1.6] * 9).alarm[0, 0]


def test_noise_within_the_slack_never_alarms() -> None:
    assert not after(*[1.0, -1.0, 0.9, -0.9] * 100).alarm.any()


def test_the_change_is_dated_from_when_the_sum_left_zero() -> None:
    state = after(0.0, 0.0, -3.0, -3.0, -4.0)
    assert state.windows[1, 0] == 3
    assert state.effect[1, 0] == -10.0


def test_three_calm_windows_in_a_row_clear_an_alarm_and_restart_the_sum() -> None:
    state = after(4.0, 4.0, 4.0, 0.0, 0.0)
    assert state.alarm[0, 0]
    state = state.update(np.array([0.0]), np.array([0.0]))
    assert not state.alarm.any()
    assert state.value[0, 0] == 0


def test_a_window_with_evidence_starts_the_calm_count_again() -> None:
    assert after(4.0, 4.0, 4.0, 0.0, 0.0, 2.0, 0.0, 0.0).alarm[0, 0]


def test_an_alarm_that_was_cleared_can_be_raised_again() -> None:
    assert after(4.0, 4.0, 0.0, 0.0, 0.0, 4.0, 4.0).alarm[0, 0]


def test_a_window_that_tests_nothing_changes_nothing() -> None:
    before = after(3.0, 3.0)
    state = before.update(np.array([np.nan]), np.array([0.0]))
    assert [state.value[0, 0], state.windows[0, 0], state.effect[0, 0]] == [4.0, 2, 6.0]


def test_scores_allow_for_the_reference_being_an_estimate() -> None:
    z = cusum.standardize(np.array([3.0]), np.array([1.0]), np.array([2.0]), 20)
    assert z[0] == pytest.approx(1 / np.sqrt(1.05))
