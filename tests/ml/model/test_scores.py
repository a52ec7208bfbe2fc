"""Model outputs to labels and scores."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from outstation.ml.model.bundle.manifest import Manifest, ModelInput, ModelOutput
from outstation.ml.model.inference import scores

FINITE = st.floats(-1e6, 1e6, width=32)


def manifest(kind: Any, labels: int = 0, **output: Any) -> Manifest:
    names = [f"c{i}" for i in range(labels)]
    return Manifest(
        format=1,
        name="tiny",
        version="1",
        created="",
        kind=kind,
        input=ModelInput(fields=["x"]),
        output=ModelOutput(labels=names, **output),
        files={},
    )


def f32(values: Any) -> Any:
    return np.array(values, np.float32)


@pytest.mark.parametrize("activation", ["none", "softmax", "sigmoid"])
@given(x=arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 6)), elements=FINITE))
def test_scores_are_probabilities_and_belong_to_the_label(activation: str, x: Any) -> None:
    made = manifest("classify", max(2, x.shape[1]), activation=activation, temperature=0.7)
    predictions = scores.from_outputs(x, made)
    assert len(predictions) == len(x)
    assert predictions.label is not None
    assert predictions.score is not None
    assert ((predictions.score >= 0) & (predictions.score <= 1)).all()
    p = scores.compute_probabilities(x, made.output)
    np.testing.assert_array_equal(p.argmax(axis=1), predictions.label)
    if activation != "sigmoid" or x.shape[1] == 1:
        np.testing.assert_allclose(p.sum(axis=1), 1)


def test_softmax_of_logits_and_probabilities_as_they_come_agree() -> None:
    logits = f32([[0, 1, 3]])
    from_logits = scores.compute_probabilities(logits, ModelOutput(activation="softmax"))
    assert from_logits[0] == pytest.approx(np.exp([0, 1, 3]) / np.exp([0, 1, 3]).sum())
    np.testing.assert_allclose(
        scores.compute_probabilities(from_logits.astype(np.float32), ModelOutput()), from_logits, rtol=1e-5
    )


@pytest.mark.parametrize("activation", ["none", "softmax"])
def test_temperature_softens_the_score_and_keeps_the_label(activation: str) -> None:
    x = f32([[0.1, 0.7, 0.2]])
    sharp, soft = (
        scores.from_outputs(x, manifest("classify", 3, activation=activation, temperature=temperature))
        for temperature in (0.5, 4.0)
    )
    assert sharp.score is not None
    assert soft.score is not None
    assert sharp.label == soft.label == [1]
    assert sharp.score[0] > soft.score[0] > 1 / 3


@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_one_output_for_two_labels_is_the_probability_of_the_second(activation: str) -> None:
    x = f32([[0.9], [0.1]]) if activation == "none" else f32([[np.log(9)], [-np.log(9)]])
    predictions = scores.from_outputs(x, manifest("classify", 2, activation=activation))
    assert predictions.label is not None
    assert predictions.label.tolist() == [1, 0]
    assert predictions.score == pytest.approx([0.9, 0.9], abs=1e-6)


def test_a_probability_of_zero_or_one_stays_a_number() -> None:
    for x in (f32([[0, 1]]), f32([[0], [1]])):
        predictions = scores.from_outputs(x, manifest("classify", 2))
        assert predictions.score is not None
        assert np.isfinite(predictions.score).all()
        assert (predictions.score > 0.99).all()


def test_infinite_outputs_become_no_number_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions = scores.from_outputs(f32([[np.inf, 0]]), manifest("classify", 2, activation="softmax"))
    assert predictions.score is not None
    assert np.isnan(predictions.score).all()


def test_large_logits_do_not_overflow() -> None:
    for activation in ("softmax", "sigmoid"):
        p = scores.compute_probabilities(f32([[-3e38, 3e38]]), ModelOutput(activation=activation))
        assert p.tolist() == [[0, 1]]


def test_an_autoencoder_is_scored_by_its_mean_squared_error() -> None:
    inputs = f32(np.arange(12)).reshape(2, 3, 2)
    outputs = inputs.reshape(2, 6) + f32([[0] * 6, [1, -1, 2, 0, 0, 0]])
    predictions = scores.from_outputs(outputs, manifest("anomaly"), inputs)
    assert predictions.value == pytest.approx([0, 1])
    assert (predictions.label, predictions.score) == (None, None)


def test_an_anomaly_model_with_one_output_gives_that() -> None:
    predictions = scores.from_outputs(f32([[0.25], [4]]), manifest("anomaly"), f32(np.zeros((2, 3, 2))))
    assert predictions.value == pytest.approx([0.25, 4])


def test_a_regression_gives_its_output() -> None:
    predictions = scores.from_outputs(f32([[1.5], [-2]]), manifest("regress"))
    assert predictions.value == pytest.approx([1.5, -2])
    assert len(predictions) == 2


@pytest.mark.parametrize("kind", ["classify", "regress", "anomaly"])
def test_no_windows_give_no_scores(kind: str) -> None:
    predictions = scores.from_outputs(f32(np.zeros((0, 6))), manifest(kind, 6), f32(np.zeros((0, 3, 2))))
    assert len(predictions) == 0
