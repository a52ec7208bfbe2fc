"""Correlation: whole numbers that add, correct correlations, and their tests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.drift.detectors import class_means, correlation
from outstation.ml.drift.detectors.class_means import WeightedMeans
from outstation.ml.drift.detectors.detector import Task
from outstation.ml.drift.numeric.sums import Groups


def correlated(rng: np.random.Generator, n: int, r: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rows = rng.normal(size=(n, 3))
    rows[:, 2] = r * rows[:, 0] + np.sqrt(1 - r * r) * rows[:, 2]
    return rows


def test_neighbours_are_paired_first_and_of_many_fields_only_so_many() -> None:
    assert correlation.field_pairs(3).tolist() == [[0, 1], [1, 2], [0, 2]]
    assert len(correlation.field_pairs(24)) == 276
    assert len(correlation.field_pairs(200)) == 276
    assert correlation.field_pairs(1).shape == (0, 2)


@given(st.lists(st.integers(0, 400), max_size=5), st.integers(0, 99), st.permutations(range(6)))
def test_residuals_of_rows_add_up_to_the_bit_in_any_parts_and_order(
    cuts: list[int], seed: int, order: list[int]
) -> None:
    raw = np.random.default_rng(seed).normal(size=(400, 3)) * 3
    raw[::11, 1] = np.nan
    rows = correlation.quantize_residuals(raw)
    bounds = [0, *sorted(cuts), 400]
    groups = np.random.default_rng(seed).integers(0, 3, 400)
    parts = [correlation.sum_products(rows[a:b], Groups(groups[a:b], 3)) for a, b in pairwise(bounds)]
    shuffled = [parts[i] for i in order if i < len(parts)]
    assert sum(shuffled, np.zeros_like(parts[0])).tolist() == correlation.sum_products(rows, Groups(groups, 3)).tolist()


def test_z_is_that_of_the_correlation_coefficient() -> None:
    rows = correlated(np.random.default_rng(1), 2000, 0.6)
    one_class = Groups(np.zeros(len(rows), np.int64), 1)
    sums = correlation.sum_products(correlation.quantize_residuals(rows), one_class)
    result = correlation.CorrelationDetector().means(Task(3, 0, 1, window_rows=1, window=2000), sums)
    expected = np.arctanh(np.asarray(np.corrcoef(rows.T))[[0, 1, 0], [1, 2, 2]])
    np.testing.assert_allclose(result.mean[0], expected, atol=2e-3)
    assert result.weight[0].tolist() == [1997.0] * 3


def test_model_windows_tell_the_same_z_on_average() -> None:
    windows = correlated(np.random.default_rng(1), 50 * 100, 0.6).reshape(50, 100, 3)
    centred = windows - windows.mean(1, keepdims=True)
    each = np.arctanh(correlation.correlate_windows(centred, (centred**2).mean(1)))
    result = class_means.means_from_sums(class_means.sum_by_group(each, Groups(np.zeros(len(each), np.int64), 1)))
    expected = [np.arctanh(np.asarray(np.corrcoef(window.T))[0, 2]) for window in windows]
    assert result.mean[0, 2] == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_field_that_does_not_move_tells_no_correlation() -> None:
    still = np.random.default_rng(1).normal(size=(4, 100, 3))
    still[:, :, 1] = 0.0
    moving = np.where(np.arange(3) == 1, np.nan, (still**2).mean(1))
    each = np.arctanh(correlation.correlate_windows(still, moving))
    result = class_means.means_from_sums(class_means.sum_by_group(each, Groups(np.zeros(len(each), np.int64), 1)))
    assert result.weight[0].tolist() == [0.0, 0.0, 4.0]
    reported = class_means.compute_deviations(result, np.zeros((1, 3)))
    assert np.isnan(reported).tolist() == [True, True, False]


def test_usual_values_leave_out_the_window_they_are_compared_with() -> None:
    z = np.array([[[0.1]], [[0.2]], [[0.9]]])
    result = WeightedMeans(np.full((3, 1, 1), 10.0), z)
    assert class_means.pooled_mean(result, 8)[0, 0] == pytest.approx(0.4)
    assert class_means.leave_one_out_mean(result, 8)[:, 0, 0].tolist() == pytest.approx([0.55, 0.5, 0.15])


def test_a_class_too_rare_to_tell_has_the_correlation_of_all() -> None:
    result = WeightedMeans(np.array([[[3.0], [97.0]]]), np.array([[[-1.0], [0.5]]]))
    assert class_means.pooled_mean(result, 8)[:, 0].tolist() == pytest.approx([0.455, 0.5])
