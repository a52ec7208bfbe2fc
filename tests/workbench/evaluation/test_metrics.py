"""Metrics of an evaluation: equal to those of devices, with intervals over groups or neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.ml.performance import intervals
from outstation.ml.performance import metrics as quality
from outstation.ml.performance.estimates import compute_metrics
from outstation.ml.performance.metrics import LabelledPredictions
from outstation.workbench.evaluation import bootstrap, evaluation_metrics

LABELS = ["a", "b", "c"]


def classified(n: int, seed: int, right: float = 0.8) -> LabelledPredictions:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    full = rng.dirichlet([0.6] * 3, n)
    full[np.arange(n), truth] += rng.random(n) < right
    full /= full.sum(axis=1, keepdims=True)
    predicted = full.argmax(axis=1)
    return LabelledPredictions(
        truth.astype(float), predicted=predicted, score=full[np.arange(n), predicted], probabilities=full
    )


def alone(n: int, off: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None) -> bootstrap.BootstrapUnits:
    return bootstrap.build_units(np.zeros(n) if off is None else off, None, None, 0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(30, 300), seed=st.integers(0, 1000))
def test_figures_are_those_that_devices_report(n: int, seed: int) -> None:
    pairs = classified(n, seed)
    reported = {(m.metric, m.slice): m.value for m in compute_metrics("classify", LABELS, pairs)}
    report = evaluation_metrics.compute("classify", LABELS, pairs, alone(n))
    for estimate in report.metrics:
        if (estimate.metric, "") in reported:
            assert estimate.value == pytest.approx(reported[estimate.metric, ""], rel=1e-5)
    for each in report.classes:
        if ("f1", f"class={each.label}") in reported:
            assert each.f1.value == pytest.approx(reported["f1", f"class={each.label}"], rel=1e-5)
    assert {m.metric for m in report.metrics} >= {"accuracy", "f1_macro", "brier", "ece", "top_2"}


def test_numbers_are_measured_as_devices_do_also_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    truth = np.asarray(1e6 + rng.normal(0, 1, 500), np.float64)
    pairs = LabelledPredictions(truth, value=np.asarray(truth + rng.normal(0.2, 0.5, 500), np.float64))
    reported = {m.metric: m.value for m in compute_metrics("regress", [], pairs)}
    report = {m.metric: m for m in evaluation_metrics.compute("regress", [], pairs, alone(500)).metrics}
    for name in ("mae", "rmse", "r2"):
        assert report[name].value == pytest.approx(reported[name], rel=1e-4)
    assert report["bias"].value == pytest.approx(0.2, abs=0.07)


def test_anomalies_are_ranked_and_judged_at_the_threshold() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1], float)
    value = np.array([0.1, 0.2, 0.3, 0.9, 0.8, 0.7])
    pairs = LabelledPredictions(truth, predicted=(value > 0.75).astype(np.int64), value=value)
    report = {m.metric: m.value for m in evaluation_metrics.compute("anomaly", [], pairs, alone(6)).metrics}
    assert report["auc"] == pytest.approx(0.75)
    assert report["average_precision"] == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-5)
    assert (report["precision"], report["recall"]) == (0.5, 0.5)


@pytest.mark.parametrize("chances", [0.2, 0.5])
def test_average_precision_of_chance_is_the_share_of_anomalies(chances: float) -> None:
    rng = np.random.default_rng(3)
    yes = rng.random(20_000) < chances
    assert quality.average_precision(rng.random(20_000), yes, np.ones(20_000)) == pytest.approx(chances, abs=0.02)


def test_an_interval_by_group_or_in_order_covers_what_one_of_shuffled_windows_does_not() -> None:
    """Twenty people with a hundred windows each and different accuracies: the interval must cover the mean person."""
    inside = {"groups": 0, "order": 0, "shuffled": 0}
    for seed in range(30):
        rng = np.random.default_rng(seed)
        person = np.clip(rng.normal(0.8, 0.1, 20), 0, 1)
        right = rng.random((20, 100)) < person[:, None]
        names, in_order = np.repeat(np.arange(20), 100).astype(str), np.arange(2000)
        shuffled = rng.permutation(2000)
        for kind, group, order in (
            ("groups", names[shuffled], shuffled),
            ("order", None, in_order),
            ("shuffled", None, shuffled),
        ):
            losses = np.where(right.ravel()[order], 0, 1)
            pairs = LabelledPredictions(np.zeros(2000), predicted=losses)
            units = bootstrap.build_units(losses.astype(np.float64), group, "person", seed)
            report = evaluation_metrics.primary_interval(
                "classify", evaluation_metrics.primary_metric("classify", pairs, units), pairs.truth, units
            )
            assert report.low is not None
            assert report.high is not None
            inside[kind] += report.low <= 0.8 <= report.high
    assert min(inside["groups"], inside["order"]) >= 25
    assert inside["shuffled"] < inside["groups"]


def test_all_right_is_not_certainly_all_right() -> None:
    pairs = LabelledPredictions(np.asarray(np.arange(40) % 2, np.float64), predicted=np.arange(40) % 2)
    values = evaluation_metrics.primary_metric("classify", pairs, alone(40))
    report = evaluation_metrics.primary_interval("classify", values, pairs.truth, alone(40))
    low, high = intervals.wilson(1.0, 40)
    assert (report.value, report.high) == (1.0, high)
    assert report.low == pytest.approx(low, rel=1e-4)


def test_no_metric_is_certainly_perfect_because_few_results_are_right() -> None:
    truth = np.arange(40) % 2
    sets = np.zeros((40, 2, 3), bool)
    sets[:, :, 0] = (truth == 1)[:, None]
    sets[::4, :, 1] = True
    perfect = {
        "classify": LabelledPredictions(truth.astype(float), predicted=truth),
        "several": LabelledPredictions(truth.astype(float), predicted=truth, label_sets=sets),
        "anomaly": LabelledPredictions(truth.astype(float), predicted=truth, value=truth.astype(float)),
    }
    for kind, pairs in perfect.items():
        report = evaluation_metrics.compute(
            kind, ["a", "b"] if kind == "classify" else ["a", "b", "c"], pairs, alone(40)
        ).metrics
        assert len(report) >= 2
        for estimate in report:
            assert estimate.value == 1
            assert estimate.low is not None
            assert 0.6 < estimate.low < 0.97, (kind, estimate)


def test_the_auc_of_a_robustness_curve_is_not_certainly_perfect() -> None:
    truth = np.array([1.0] * 3 + [0.0] * 37)
    pairs = LabelledPredictions(truth, predicted=truth.astype(np.int64), value=truth)
    values = evaluation_metrics.primary_metric("anomaly", pairs, alone(40))
    report = evaluation_metrics.primary_interval("anomaly", values, truth, alone(40))
    assert report.value == 1.0
    assert report.low == pytest.approx(intervals.wilson(1.0, 3)[0], rel=1e-4)
    # Errors of numbers have no bounds.
    assert evaluation_metrics.primary_interval("regress", np.zeros(9), truth, alone(40)).high == 0.0


def test_the_average_precision_of_anomalies_alone_is_not_certain() -> None:
    truth = np.ones(3)
    pairs = LabelledPredictions(truth, predicted=truth.astype(np.int64), value=truth)
    report = evaluation_metrics.compute("anomaly", [], pairs, alone(3)).metrics
    estimate = next(each for each in report if each.metric == "average_precision")
    assert estimate.value == 1.0
    assert estimate.low == pytest.approx(intervals.wilson(1.0, 3)[0], rel=1e-4)


def test_as_many_results_count_as_one_as_groups_are_alike() -> None:
    group = np.repeat(np.arange(50), 20)
    rng = np.random.default_rng(0)
    free, same = rng.random(1000), np.repeat(rng.random(50), 20)
    assert bootstrap.cluster_design_effect(same, group) == pytest.approx(20)
    assert bootstrap.cluster_design_effect(free, group) < 2
    assert bootstrap.cluster_design_effect(free, np.arange(1000)) == 1


def test_the_same_seed_draws_the_same_and_another_one_others() -> None:
    a, b, c = (bootstrap.build_units(np.zeros(50), None, None, seed).weights.tobytes() for seed in (1, 1, 2))
    assert a == b != c


def test_a_part_of_the_results_keeps_its_units() -> None:
    units = bootstrap.build_units(np.zeros(6), np.array(["x", "x", "y", "y", "z", "z"]), "who", 0)
    part = units.subset(np.array([0, 5]))
    assert part.unit_index.tolist() == [0, 2]
    assert part.sums(np.array([1.0, 2.0]))[0, 0] == 3.0
