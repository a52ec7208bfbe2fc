"""Slow trends: several fields that move slowly together point at the surroundings; nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from outstation.ml.drift.detectors import season
from outstation.ml.drift.detectors.season import HALF_DAY_US, SlowTrend

FIELDS = ("a", "b", "c")
Shape = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def after(shape: Shape, seed: int = 0, days: float = 6.0) -> SlowTrend:
    """Windows of an hour with scores of sd 1 around `shape` of days (n,) → (n, 3)."""
    hours = np.arange(int(days * 24))
    z = np.random.default_rng(seed).normal(size=(len(hours), 3)) + shape(hours / 24)
    result = SlowTrend()
    for hour, scores in zip(hours.tolist(), z, strict=True):
        result = result.add(scores[None], np.array([hour * HALF_DAY_US // 12]))
    return result


def together(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([0.6 * d, -0.6 * d, 0 * d], axis=1)


def alone(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([0.6 * d, 0 * d, 0 * d], axis=1)


def at_once(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat((d > 3)[:, None] * 3.0, 3, axis=1)


def within_hours(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(np.clip((d - 3) * 4, 0, 1)[:, None] * 3.0, 3, axis=1)


def each_day(d: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.repeat(2 * np.sin(2 * np.pi * d)[:, None], 3, axis=1)


def test_fields_that_move_slowly_together_follow_the_surroundings() -> None:
    for seed in range(10):
        result = after(together, seed)
        assert season.guess_cause(0, result, FIELDS) == (
            "the season or a slow change of the surroundings: b moved as slowly, for more than a day"
        )
        assert season.guess_cause(2, result, FIELDS) == ""


@pytest.mark.parametrize("shape", [alone, at_once, within_hours, each_day, lambda d: 0 * together(d)])
def test_nothing_else_is_taken_for_the_surroundings(shape: Shape) -> None:
    reported = [season.guess_cause(i, after(shape, seed), FIELDS) for seed in range(10) for i in range(3)]
    assert set(reported) == {""}


def test_less_than_a_day_is_no_season() -> None:
    assert not len(after(lambda d: 5 * together(d), days=1.0).find_slow_fields())


def test_only_the_last_week_is_remembered_and_a_clock_set_back_begins_anew() -> None:
    result = after(together, days=30)
    assert len(result.half_day) == season.MAX_HALF_DAYS
    assert len(result.add(np.zeros((1, 3)), np.array([0])).half_day) == 1


def test_scores_that_are_missing_leave_the_mean_as_it_was() -> None:
    first = SlowTrend().add(np.array([[1.0, np.nan], [3.0, 2.0], [np.nan, 4.0]]), np.array([0, 1, 2]))
    np.testing.assert_allclose(first.mean, [[2.0, 3.0]])
    np.testing.assert_array_equal(first.n, [[2, 2]])
