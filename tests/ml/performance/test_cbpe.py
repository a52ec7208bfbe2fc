"""CBPE: expected accuracy without labels."""

from __future__ import annotations

import numpy as np
import pytest

from outstation.foundation.indices import bincount
from outstation.ml.performance import cbpe

N, CORRECT = np.array([100, 100, 100]), np.array([50, 80, 99])


def test_surer_answers_mean_higher_accuracy() -> None:
    unsure = cbpe.estimate_accuracy(N, CORRECT, np.array([18, 1, 1]))
    sure = cbpe.estimate_accuracy(N, CORRECT, np.array([1, 1, 18]))
    assert unsure is not None
    assert sure is not None
    assert unsure["accuracy"] < 0.6 < 0.9 < sure["accuracy"]


def test_the_estimate_says_how_it_was_made_and_what_it_assumes() -> None:
    got = cbpe.estimate_accuracy(N, CORRECT, np.array([5, 5, 10]))
    assert got is not None
    assert got["method"] == "cbpe"
    assert "no concept drift" in got["assumes"]
    assert 0 <= got["low"] < got["accuracy"] < got["high"] <= 1


def test_more_answers_narrow_the_interval() -> None:
    few, many = (
        cbpe.estimate_accuracy(N, CORRECT, np.array([2, 2, 2])),
        cbpe.estimate_accuracy(N, CORRECT, np.array([200, 200, 200])),
    )
    assert few is not None
    assert many is not None
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_without_answers_there_is_no_estimate() -> None:
    assert cbpe.estimate_accuracy(N, CORRECT, np.zeros(3, np.int64)) is None


def test_the_interval_covers_the_accuracy_of_less_confident_answers() -> None:
    rng = np.random.default_rng(5)
    right = np.linspace(0.4, 0.99, 32)  # how often an answer in each bin is right, there and here
    n = np.full(32, 40)
    correct = rng.binomial(n, right)
    inside = 0
    for _ in range(200):
        bins = rng.integers(0, 12, 50)  # the reference's answers were spread over all 32
        got = cbpe.estimate_accuracy(n, correct, bincount(bins, minlength=32))
        assert got is not None
        inside += got["low"] <= (rng.random(50) < right[bins]).mean() <= got["high"]
    assert inside >= 180


@pytest.mark.parametrize(("a", "b"), [(6.0, 1.5), (5.0, 1.5), (5.0, 2.0), (8.0, 1.2)])
def test_it_agrees_with_nannyml_on_calibrated_scores(a: float, b: float) -> None:
    """NannyML estimates accuracy as the mean calibrated score of the predicted class, (TP + TN) / n."""
    rng = np.random.default_rng(1)
    known, current = rng.beta(6, 1.5, 40_000), rng.beta(a, b, 20_000)
    edges = np.quantile(known, np.arange(1, 32) / 32)
    places = np.searchsorted(edges, known, side="right")
    n = bincount(places, minlength=32)
    correct = np.rint(bincount(places, known, 32)).astype(np.int64)
    estimate = cbpe.estimate_accuracy(n, correct, bincount(np.searchsorted(edges, current, side="right"), minlength=32))
    assert estimate is not None
    assert estimate["accuracy"] == pytest.approx(current.mean(), abs=0.002)
