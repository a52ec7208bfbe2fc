"""Rows to model windows: the same whatever the batch boundaries, and never across a gap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.ml.model.inference import features
from outstation.ml.model.inference.features import WindowCut

Ints = NDArray[np.int64]
STEP_US = 10_000  # 100 rows a second
LONG_US = 700_000  # a gap above 0.5 s
BACK_US = -1_000


@st.composite
def streams(draw: st.DrawFn) -> Ints:
    """Times (n,) epoch µs, mostly regular, with gaps and steps back here and there."""
    steps = draw(st.lists(st.sampled_from([STEP_US] * 8 + [0, 500_000, LONG_US, BACK_US]), max_size=120))
    first = draw(st.sampled_from([0, 1_764_022_680_000_000]))
    return np.cumsum([first, *steps], dtype=np.int64)[draw(st.integers(0, 1)) :]


WINDOWS = st.integers(1, 12).flatmap(
    lambda rows: st.builds(
        WindowSpec, rows=st.just(rows), step=st.integers(1, rows), max_gap_s=st.sampled_from([None, 0.5])
    )
)


def by_hand(t: Ints, window: WindowSpec) -> list[int]:
    """Return the starts of windows row by row, by the definition of `cut_windows`."""
    starts, begin = [], 0
    for row in range(len(t)):
        step = int(t[row] - t[row - 1]) if row else 0
        if step < 0 or (window.max_gap_s is not None and step > window.max_gap_s * 1e6):
            begin = row
        if row - begin + 1 >= window.rows:
            starts.append(row - window.rows + 1)
            begin += window.step
    return starts


@given(streams(), WINDOWS)
def test_windows_start_where_counting_row_by_row_says(t: Ints, window: WindowSpec) -> None:
    assert features.cut_windows(t, window).starts.tolist() == by_hand(t, window)


@given(streams(), WINDOWS, st.data())
def test_cutting_piece_by_piece_gives_the_windows_of_cutting_at_once(
    t: Ints, window: WindowSpec, data: st.DataObject
) -> None:
    whole, collected, at, end = features.cut_windows(t, window), [], 0, 0
    while end < len(t):
        end = min(len(t), end + data.draw(st.integers(1, 40)))
        piece = features.cut_windows(t[at:end], window)
        collected += [at + int(start) for start in piece.starts]
        at += piece.consumed
    assert collected == whole.starts.tolist()
    assert at == whole.consumed


@given(streams(), WINDOWS)
def test_no_window_spans_a_gap_or_a_step_back(t: Ints, window: WindowSpec) -> None:
    starts = features.cut_windows(t, window).starts
    assume(len(starts))
    for start in starts:
        steps = np.diff(t[start : start + window.rows])
        assert (steps >= 0).all()
        assert window.max_gap_s is None or (steps <= window.max_gap_s * 1e6).all()


@given(streams(), WINDOWS)
def test_consumed_rows_are_not_needed_again_and_others_stay(t: Ints, window: WindowSpec) -> None:
    cut = features.cut_windows(t, window)
    assert 0 <= cut.consumed <= len(t)
    assert len(t) - cut.consumed < window.rows
    assert all(start + window.step <= cut.consumed for start in cut.starts)


def test_rows_before_a_gap_that_fill_no_window_are_consumed() -> None:
    t = np.array([0, 1, 2, 3, 4, 2_000_000, 2_000_001], np.int64)
    cut = features.cut_windows(t, WindowSpec(rows=4, step=4, max_gap_s=0.5))
    assert (cut.starts.tolist(), cut.consumed) == ([0], 5)


def test_a_pause_just_as_long_as_allowed_is_no_gap() -> None:
    window = WindowSpec(rows=2, step=2, max_gap_s=0.5)
    assert features.cut_windows(np.array([0, 500_000]), window).starts.tolist() == [0]
    assert features.cut_windows(np.array([0, 500_001]), window).starts.tolist() == []


def test_equal_times_are_no_step_back() -> None:
    assert features.cut_windows(np.zeros(4, np.int64), WindowSpec(rows=2, step=1)).starts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 1, 5])
def test_without_a_window_each_row_stands_alone_at_any_time(n: int) -> None:
    cut = features.cut_windows(np.arange(n)[::-1], None)
    assert (cut.starts.tolist(), cut.consumed) == (list(range(n)), n)


def test_nothing_gives_nothing() -> None:
    empty = np.zeros(0, np.int64)
    cut = features.cut_windows(empty, WindowSpec(rows=3, step=1))
    assert (cut.starts.tolist(), cut.consumed) == ([], 0)


def test_more_rows_than_a_chunk_are_cut_quickly() -> None:
    cut = features.cut_windows(
        np.arange(1_000_000, dtype=np.int64) * STEP_US, WindowSpec(rows=100, step=1, max_gap_s=0.5)
    )
    assert (len(cut.starts), cut.consumed) == (999_901, 999_901)


# --- rows and columns to what a model takes ---


def test_columns_of_any_type_become_float32_rows_in_the_order_given() -> None:
    columns = [np.array([1, 2], np.int64), np.array([0.5, np.nan], np.float64), np.array([7, 8], "<f4")]
    made = features.stack_columns(columns)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made, np.array([[1, 0.5, 7], [2, np.nan, 8]], np.float32))


def test_rows_in_parts_become_the_bits_that_they_have_in_one_piece() -> None:
    rng = np.random.default_rng(1)
    columns = [rng.integers(-(2**62), 2**62, 1000), rng.normal(0, 1e30, 1000), rng.normal(0, 1, 1000).astype("<f4")]
    for chosen in (columns, columns[:1], columns[1:], [columns[0], columns[2]]):
        whole = np.stack(chosen, axis=1).astype(np.float32)
        for cuts in ([], [1], [10, 11, 999]):
            parts = [list(part) for part in zip(*(np.split(column, cuts) for column in chosen), strict=True)]
            np.testing.assert_array_equal(features.stack_parts(parts), whole)


def test_a_value_too_large_for_float32_becomes_infinite_without_a_warning() -> None:
    assert np.isinf(features.stack_columns([np.array([1e300])])).all()


def scaled(rows: list[list[float]], starts: list[int], spec: ModelInput) -> NDArray[np.float32]:
    return features.build_windows(np.array(rows, np.float32), np.array(starts, np.int64), spec)


def test_windows_overlap_according_to_their_starts() -> None:
    spec = ModelInput(fields=["x"], window=WindowSpec(rows=3, step=1))
    made = scaled([[0], [1], [2], [3]], [0, 1], spec)
    assert made.tolist() == [[[0], [1], [2]], [[1], [2], [3]]]


def test_values_are_scaled_by_their_fields_mean_and_std() -> None:
    spec = ModelInput(fields=["x", "y"], mean=[1, 10], std=[2, 5])
    assert scaled([[3, 0], [1, 20]], [0, 1], spec).tolist() == [[1, -2], [0, 2]]
    assert scaled([[3, 0]], [0], ModelInput(fields=["x", "y"], mean=[1, 10])).tolist() == [[2, -10]]
    assert scaled([[3, 0]], [0], ModelInput(fields=["x", "y"], std=[2, 5])).tolist() == [[1.5, 0]]


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [None, WindowSpec(rows=1, step=1)])
def test_a_missing_value_becomes_the_mean_and_the_rows_stay_as_they_were(
    missing: float, window: WindowSpec | None
) -> None:
    rows = np.array([[missing, 4]], np.float32)
    spec = ModelInput(fields=["x", "y"], mean=[1, 2], std=[2, 2], window=window)
    assert features.build_windows(rows, np.zeros(1, np.int64), spec).reshape(-1).tolist() == [0, 1]
    assert not np.isfinite(rows[0, 0])


def test_a_value_that_scaling_takes_past_float32_counts_as_missing() -> None:
    assert scaled([[3e38]], [0], ModelInput(fields=["x"], std=[1e-3])).tolist() == [[0]]


@pytest.mark.parametrize("window", [None, WindowSpec(rows=5, step=5)])
def test_no_windows_keep_their_shape(window: WindowSpec | None) -> None:
    spec = ModelInput(fields=["x", "y"], mean=[1, 2], std=[1, 1], window=window)
    made = features.build_windows(np.zeros((3, 2), np.float32), WindowCut(np.zeros(0, np.int64), 0).starts, spec)
    assert made.shape == ((0, 2) if window is None else (0, 5, 2))
