"""Slices: none is worse by chance, a bad one is, and a small one is too small to tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.performance import slices
from outstation.ml.performance.estimates import MetricEstimate, compute_metrics
from outstation.ml.performance.metrics import LabelledPredictions


def states(estimates: list[MetricEstimate]) -> dict[str, str | None]:
    return {estimate.slice: estimate.state for estimate in estimates if estimate.metric in ("accuracy", "mae")}


def classified(right: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> LabelledPredictions:
    return LabelledPredictions(np.ones(len(right)), right.astype(np.int64))


def test_a_slice_that_is_worse_is_named() -> None:
    random = np.random.default_rng(0)
    site = random.integers(0, 4, 600)
    right = random.random(600) < np.where(site == 2, 0.6, 0.92)
    estimates = slices.compute_slice_metrics("classify", classified(right), {"site": [f"s{i}" for i in site]})
    assert states(estimates) == {"site=s0": "ok", "site=s1": "ok", "site=s2": "worse", "site=s3": "ok"}


def test_slices_that_differ_by_chance_are_seldom_called_worse() -> None:
    random = np.random.default_rng(1)
    loud = 0
    for _ in range(24):
        right = random.random(400) < 0.85
        fields = {name: [str(i) for i in random.integers(0, 5, 400)] for name in ("site", "user", "mode")}
        loud += any(
            estimate.state == "worse"
            for estimate in slices.compute_slice_metrics("classify", classified(right), fields)
        )
    assert loud <= 3


def test_a_slice_with_few_results_is_too_small_to_tell() -> None:
    right = np.random.default_rng(2).random(300) < 0.9
    estimates = slices.compute_slice_metrics("classify", classified(right), {"site": ["rare"] * 8 + ["usual"] * 292})
    assert states(estimates) == {"site=rare": "small", "site=usual": "ok"}


def test_a_slice_with_larger_errors_of_numbers_is_worse() -> None:
    random = np.random.default_rng(3)
    mode = random.integers(0, 3, 500)
    value = random.normal(0, np.where(mode == 1, 3.0, 1.0))
    estimates = slices.compute_slice_metrics(
        "regress", LabelledPredictions(np.zeros(500), value=value), {"mode": [str(m) for m in mode]}
    )
    assert states(estimates) == {"mode=0": "ok", "mode=1": "worse", "mode=2": "ok"}
    assert {estimate.metric for estimate in estimates} == {"mae"}


def test_many_values_are_merged_but_the_most_frequent() -> None:
    values = [str(i % 100) for i in range(1000)] + ["often"] * 50
    estimates = slices.compute_slice_metrics("classify", classified(np.ones(1050, bool)), {"user": values})
    assert len(states(estimates)) == 21
    assert {"user=often", "user=other"} <= {estimate.slice for estimate in estimates}


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=20))
def test_holm_calls_no_more_than_uncorrected_and_no_less_than_bonferroni(ps: list[float]) -> None:
    estimates = slices.holm_correction(ps)
    for p, worse in zip(ps, estimates, strict=True):
        assert worse or p > slices.SIGNIFICANCE_LEVEL / len(ps)
        assert not worse or p <= slices.SIGNIFICANCE_LEVEL


def test_fishers_test_is_the_textbook_one() -> None:
    # The lady tasting tea: 3 of 4 right, one-sided 17/70.
    assert slices._fisher_exact(3, 4, 1, 4) == pytest.approx(17 / 70)


def test_bins_are_named_by_their_edges_and_missing_is_its_own() -> None:
    estimates = slices.name_bins(np.array([-1, 0, 4.9, 5, np.nan]), [0, 5])
    assert estimates == ["below 0", "0 to 5", "0 to 5", "from 5", "missing"]


def test_one_edge_makes_two_bins() -> None:
    assert slices.name_bins(np.array([1.0, 3.0]), [2.5]) == ["below 2.5", "from 2.5"]


def test_large_slices_have_f1_and_brier_after_all_tested_slices() -> None:
    random = np.random.default_rng(4)
    truth = random.integers(0, 3, 400)
    predicted = np.where(random.random(400) < 0.8, truth, random.integers(0, 3, 400))
    pairs = LabelledPredictions(truth.astype(float), predicted, random.uniform(0.4, 1, 400))
    sites = ["a"] * 300 + ["b"] * 60 + ["rare"] * 40
    estimates = slices.compute_slice_metrics("classify", pairs, {"site": sites})
    assert [(estimate.metric, estimate.slice) for estimate in estimates] == [
        *(("accuracy", f"site={name}") for name in ("a", "b", "rare")),
        *((metric, f"site={name}") for name in ("a", "b") for metric in ("f1_macro", "brier_top")),
    ]
    whole = {estimate.metric: estimate.value for estimate in compute_metrics("classify", ("x", "y", "z"), pairs[:300])}
    inside = {estimate.metric: estimate.value for estimate in estimates if estimate.slice == "site=a"}
    assert inside == {name: whole[name] for name in inside}


def test_errors_that_are_all_the_same_have_no_interval_of_width_zero() -> None:
    estimates = slices.compute_slice_metrics(
        "regress", LabelledPredictions(np.zeros(60), value=np.ones(60)), {"site": ["a"] * 30 + ["b"] * 30}
    )
    assert [(estimate.value, estimate.low, estimate.high) for estimate in estimates] == [(1.0, None, None)] * 2


def test_sessions_that_differ_make_no_slice_worse() -> None:
    """Each session falls into one of three slices by chance, and slices have nothing to do with errors."""
    flagged = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        rates, rooms = np.repeat(random.beta(0.9, 5.1, 10), 50), np.repeat(random.integers(0, 3, 10), 50)
        truth = np.zeros(500)
        predicted = (random.random(500) < rates).astype(np.int64)
        estimates = slices.compute_slice_metrics(
            "classify", LabelledPredictions(truth, predicted), {"room": rooms.astype(str).tolist()}
        )
        flagged += any(estimate.state == slices.WORSE for estimate in estimates)
    assert flagged <= 8


def test_a_slice_that_is_worse_throughout_is_no_dependence() -> None:
    random = np.random.default_rng(1)
    rooms = np.repeat(np.arange(5), 100)
    predicted = (random.random(500) < np.where(rooms == 4, 0.4, 0.1)).astype(np.int64)
    estimates = slices.compute_slice_metrics(
        "classify", LabelledPredictions(np.zeros(500), predicted), {"room": rooms.astype(str).tolist()}
    )
    assert {e.slice for e in estimates if e.state == slices.WORSE} == {"room=4"}
