"""Expected error: trained from held-out data, stored with the reference, and estimated for answers without labels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.foundation import arrays
from outstation.foundation.errors import UsageError
from outstation.ml.performance.error_model import ErrorModel
from outstation.ml.performance.expected_error import ErrorReference
from outstation.workbench.authoring import error_training

Floats = NDArray[np.float64]
FIELDS = 4


def answers(seed: int, n: int, shift: float = 0.0) -> tuple[Floats, Floats, Floats]:
    """Return inputs (n, 4), answers and errors whose spread grows with the first input, which is shifted."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(n, FIELDS))
    inputs[:, 0] += shift
    errors = random.normal(size=n) * (0.2 + np.exp(0.8 * inputs[:, 0]) / 2)
    return inputs, inputs.sum(1), errors


@pytest.fixture(scope="module")
def reference() -> ErrorReference:
    return error_training.train(*answers(1, 3000))


def estimate(reference: ErrorReference, inputs: Floats, predicted: Floats) -> float:
    expected = reference.estimate(reference.count(inputs, predicted, 1)[0])
    assert expected is not None
    return float(expected["mae"])


@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.7])
def test_the_expected_error_follows_inputs_that_shift(reference: ErrorReference, shift: float) -> None:
    inputs, predicted, errors = answers(2, 4000, shift)
    real = float(np.abs(errors).mean())
    assert estimate(reference, inputs, predicted) == pytest.approx(real, rel=0.12)
    assert shift == 0.0 or abs(reference.mean - real) > 0.25 * real


def test_the_expected_error_after_a_large_shift_is_near_the_true_one(reference: ErrorReference) -> None:
    """Bins of equal counts gave 0.66 of it: their last one held most of the answers."""
    inputs, predicted, errors = answers(2, 4000, 2.0)
    assert estimate(reference, inputs, predicted) > 0.7 * float(np.abs(errors).mean())


def test_the_held_out_answers_let_expect_their_own_mean(reference: ErrorReference) -> None:
    assert (reference.n * reference.bin_error).sum() == pytest.approx(reference.total.sum())
    assert (reference.n * reference.bin_square).sum() == pytest.approx(reference.squares.sum())


def test_the_interval_holds_the_error_of_most_windows_without_a_shift(reference: ErrorReference) -> None:
    held = []
    for seed in range(40):
        inputs, predicted, errors = answers(100 + seed, 300)
        expected = reference.estimate(reference.count(inputs, predicted, 1)[0])
        assert expected is not None
        held.append(expected["mae_low"] <= np.abs(errors).mean() <= expected["mae_high"])
    assert sum(held) >= 34


def test_the_root_mean_square_error_is_expected_too(reference: ErrorReference) -> None:
    inputs, predicted, errors = answers(3, 5000, 0.3)
    expected = reference.estimate(reference.count(inputs, predicted, 1)[0])
    assert expected is not None
    assert expected["rmse"] == pytest.approx(float(np.sqrt((errors**2).mean())), rel=0.2)
    assert expected["rmse"] > expected["mae"]


def test_a_relation_that_changed_is_not_seen(reference: ErrorReference) -> None:
    inputs, predicted, errors = answers(4, 2000)
    assert estimate(reference, inputs, predicted) < 0.5 * np.abs(errors + 3.0).mean()


def test_errors_that_the_inputs_do_not_tell_are_refused() -> None:
    random = np.random.default_rng(5)
    for n in (300, 3000):
        inputs = random.normal(size=(n, FIELDS))
        with pytest.raises(UsageError, match="chance explains"):
            error_training.train(inputs, inputs[:, 0], random.normal(size=n))


def test_too_few_labels_are_refused() -> None:
    inputs, predicted, errors = answers(6, error_training.MIN_ANSWERS)
    errors[3] = np.nan
    with pytest.raises(UsageError, match=f"{error_training.MIN_ANSWERS - 1} labelled windows"):
        error_training.train(inputs, predicted, errors)


@pytest.mark.parametrize("scale", [0.0, 1e-150, 1e60])
def test_errors_of_zero_or_beyond_what_a_reference_may_hold_are_refused(scale: float) -> None:
    inputs, predicted, errors = answers(6, 300)
    with pytest.raises(UsageError, match="all errors are zero"):
        error_training.train(inputs, predicted, scale * errors)


@pytest.mark.parametrize("scale", [1e-90, 1e40])
def test_a_reference_of_very_small_or_large_errors_is_valid(scale: float) -> None:
    inputs, predicted, errors = answers(1, 3000)
    assert error_training.train(inputs, predicted, scale * errors).is_valid(FIELDS)


def test_training_twice_gives_the_same_bytes() -> None:
    first, second = (error_training.train(*answers(7, 600)) for _ in range(2))
    assert arrays.to_json(first) == arrays.to_json(second)


def test_a_reference_survives_its_file(reference: ErrorReference) -> None:
    decoded = arrays.from_json(arrays.to_json(reference), ErrorReference)
    assert decoded.is_valid(FIELDS)
    inputs, predicted, _ = answers(8, 500)
    assert (decoded.count(inputs, predicted, 5) == reference.count(inputs, predicted, 5)).all()
    assert len(arrays.to_json(reference)) < 16_384


def test_inputs_that_never_vary_or_are_missing_are_no_obstacle() -> None:
    inputs, predicted, errors = answers(9, 2000)
    inputs[:, 1], inputs[:, 2] = 5.0, np.nan
    inputs[::7, 0] = np.nan
    made = error_training.train(inputs, predicted, errors)
    assert made.is_valid(FIELDS)
    assert 1 not in made.model.inputs
    assert 2 not in made.model.inputs


def test_answers_that_are_no_number_are_left_out(reference: ErrorReference) -> None:
    inputs, predicted, _ = answers(10, 100)
    predicted[:10], predicted[50:60] = np.nan, np.inf
    counts = reference.count(inputs, predicted, 2)
    assert counts.sum(1).tolist() == [40, 40]
    assert reference.estimate(np.zeros(32, np.int64)) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 1999), max_size=6))
def test_any_split_of_answers_gives_the_same_counts(reference: ErrorReference, cuts: list[int]) -> None:
    inputs, predicted, _ = answers(11, 2000)
    edges = [0, *sorted(set(cuts)), 2000]
    parts = [reference.count(inputs[a:b], predicted[a:b], 1)[0] for a, b in itertools.pairwise(edges)]
    assert (np.sum(parts, axis=0) == reference.count(inputs, predicted, 1)[0]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": np.full((1, 3), FIELDS + 1)},
        {"inputs": np.full((1, 3), -1)},
        {"inputs": np.zeros(3, np.int64)},
        {"inputs": np.zeros((65, 3), np.int64)},
        {"splits": np.full((1, 3), np.inf)},
        {"leaves": np.zeros((1, 4), np.int64)},
        {"leaves": np.full((1, 8), -(2**63))},
        {"base": 2**62},
    ],
)
def test_a_malformed_error_model_is_invalid(change: dict[str, NDArray[np.int64] | int]) -> None:
    model = ErrorModel(1, np.zeros((1, 3), np.int64), np.zeros((1, 3)), np.zeros((1, 8), np.int64))
    assert model.is_valid(FIELDS)
    assert not replace(model, **change).is_valid(FIELDS)


@pytest.mark.parametrize(
    "change",
    [
        {"edges": np.zeros(30, np.int64)},
        {"edges": np.arange(31)[::-1].copy()},
        {"n": np.zeros(32, np.int64)},
        {"total": np.zeros(32)},
        {"total": np.full(32, np.nan)},
        {"squares": np.full(31, 1.0)},
        {"edges": np.array([2**63 - 1, *[-(2**63)] * 30])},
        {"edges": np.full(31, -(2**63))},
        {"edges": np.full(31, 2**63 - 1)},
        {"n": np.array([*[2**62] * 4, *[0] * 28])},
        {"n": np.array([*[2**62] * 2, *[0] * 30])},
        {"n": np.array([1, *[0] * 31])},
        {"total": np.full(32, 1e308)},
        {"total": np.full(32, 5e-324), "squares": np.zeros(32)},
        {"squares": np.full(32, 1e308)},
        {"squares": np.full(32, 1e99)},
        {"squares": np.zeros(32)},
    ],
)
def test_a_malformed_error_reference_is_invalid(
    reference: ErrorReference, change: dict[str, NDArray[np.float64]]
) -> None:
    assert not replace(reference, **change).is_valid(FIELDS)
