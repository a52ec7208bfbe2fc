"""Divergences against their definitions, computed another way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.drift.numeric import divergence

histograms = st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any)
BOUNDS = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
UNIT_SCALE = np.array(1.0)


@given(histograms)
def test_equal_shares_have_no_divergence_for_any_number_of_rows(counts: list[int]) -> None:
    p, q = np.array(counts), np.array(counts) * 7
    for size in (
        divergence.psi(p, q),
        divergence.js(p, q),
        divergence.ks(p, q),
        divergence.w1(p, q, BOUNDS, UNIT_SCALE),
    ):
        assert size == pytest.approx(0, abs=1e-7)


@given(histograms, histograms)
def test_sizes_are_symmetric_and_within_their_bounds(counts: list[int], other: list[int]) -> None:
    p, q = np.array(counts), np.array(other)
    assert float(divergence.psi(p, q)) == pytest.approx(float(divergence.psi(q, p)), abs=1e-12)
    assert 0 <= float(divergence.js(p, q)) <= 1 + 1e-12
    assert 0 <= float(divergence.ks(p, q)) <= 1 + 1e-12
    assert float(divergence.w1(p, q, BOUNDS, UNIT_SCALE)) == pytest.approx(
        float(divergence.w1(q, p, BOUNDS, UNIT_SCALE)), abs=1e-12
    )


def test_psi_is_the_sum_over_bins() -> None:
    expected = (0.5 - 0.25) * np.log(0.5 / 0.25) + (0.5 - 0.75) * np.log(0.5 / 0.75)
    assert float(divergence.psi(np.array([5, 5]), np.array([25, 75]))) == pytest.approx(expected)


def test_psi_of_an_empty_bin_is_finite() -> None:
    assert float(divergence.psi(np.array([10, 0]), np.array([5, 5]))) == pytest.approx(
        (1 - 0.5) * np.log(1 / 0.5) + (1e-4 - 0.5) * np.log(1e-4 / 0.5)
    )


def test_js_of_disjoint_histograms_is_one() -> None:
    assert float(divergence.js(np.array([3, 0]), np.array([0, 9]))) == pytest.approx(1)


def test_ks_is_the_largest_gap_of_the_cumulative_shares() -> None:
    assert float(divergence.ks(np.array([1, 1, 1, 1]), np.array([0, 0, 2, 2]))) == pytest.approx(0.5)


def test_w1_of_a_shift_by_one_bin_is_the_bin_width_in_sd() -> None:
    shifted = divergence.w1(np.array([10, 0, 0]), np.array([0, 10, 0]), np.arange(4.0), np.array(2.0))
    assert float(shifted) == pytest.approx(0.5)


def test_w1_agrees_with_a_fine_integral_where_the_curves_cross() -> None:
    p, q = np.array([10, 1, 9, 20]), np.array([3, 20, 14, 3])
    grid = np.linspace(0, 8, 400_001)
    curves = [np.interp(grid, BOUNDS, np.concatenate([[0], np.cumsum(c / c.sum())])) for c in (p, q)]
    expected = np.abs(curves[0] - curves[1]).mean() * 8
    assert float(divergence.w1(p, q, BOUNDS, UNIT_SCALE)) == pytest.approx(expected, rel=1e-4)


def test_w1_of_a_constant_reference_is_zero_not_infinite() -> None:
    assert float(divergence.w1(np.array([10, 0]), np.array([0, 10]), np.arange(3.0), np.array(0.0))) == 0
