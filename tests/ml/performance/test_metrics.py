"""Metrics from labels, against their definitions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.ml.performance import metrics
from outstation.ml.performance.estimates import MetricEstimate, compute_metrics
from outstation.ml.performance.labels import LabelSchema
from outstation.ml.performance.metrics import LabelledPredictions

LABELS = ("a", "b", "c")


def by_name(estimates: list[MetricEstimate]) -> dict[tuple[str, str], MetricEstimate]:
    return {(estimate.metric, estimate.slice): estimate for estimate in estimates}


def classified(n: int = 400, seed: int = 0, right: float = 0.8) -> LabelledPredictions:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, n)
    predicted = np.where(random.random(n) < right, truth, random.integers(0, 3, n))
    return LabelledPredictions(truth.astype(float), predicted, random.uniform(0.4, 1, n))


def losses(pairs: LabelledPredictions) -> Any:
    assert pairs.predicted is not None
    return np.array([float(predicted != truth) for predicted, truth in zip(pairs.predicted, pairs.truth, strict=True)])


def test_accuracy_is_the_share_right_within_its_interval() -> None:
    pairs = classified()
    estimates = by_name(compute_metrics("classify", LABELS, pairs))["accuracy", ""]
    assert estimates.value == pytest.approx(1 - losses(pairs).mean(), abs=1e-6)
    assert estimates.low is not None
    assert estimates.high is not None
    assert estimates.value is not None
    assert estimates.low < estimates.value < estimates.high
    assert estimates.n == 400


def test_f1_of_each_class_is_twice_hits_by_meant_and_named() -> None:
    pairs = classified()
    estimates = by_name(compute_metrics("classify", LABELS, pairs))
    each = []
    for index, label in enumerate(LABELS):
        hit = int(((pairs.truth == index) & (pairs.predicted == index)).sum())
        wrong = int(((pairs.truth != index) & (pairs.predicted == index)).sum())
        missed = int(((pairs.truth == index) & (pairs.predicted != index)).sum())
        each.append(2 * hit / (2 * hit + wrong + missed))
        assert estimates["f1", f"class={label}"].value == pytest.approx(each[-1], abs=1e-5)
    assert estimates["f1_macro", ""].value == pytest.approx(np.mean(each), abs=1e-5)
    assert estimates["f1_micro", ""].value == estimates["accuracy", ""].value


def test_a_class_nobody_meant_or_named_is_no_part_of_macro_f1() -> None:
    estimates = by_name(
        compute_metrics("classify", LABELS, LabelledPredictions(np.array([0.0, 1, 0, 1]), np.array([0, 1, 0, 0])))
    )
    assert estimates["f1_macro", ""].value == pytest.approx((0.8 + 2 / 3) / 2, abs=1e-5)


def test_brier_is_of_the_named_class_unless_all_are_known() -> None:
    pairs = classified()
    assert pairs.score is not None
    right = 1 - losses(pairs)
    estimates = by_name(compute_metrics("classify", LABELS, pairs))
    assert estimates["brier_top", ""].value == pytest.approx(((pairs.score - right) ** 2).mean(), abs=1e-5)
    full = np.random.default_rng(1).dirichlet(np.ones(3), 400)
    whole = by_name(
        compute_metrics(
            "classify", LABELS, LabelledPredictions(pairs.truth, pairs.predicted, pairs.score, probabilities=full)
        )
    )
    wanted = np.mean([((row - np.eye(3)[int(t)]) ** 2).sum() for row, t in zip(full, pairs.truth, strict=True)])
    assert whole["brier", ""].value == pytest.approx(wanted, abs=1e-5)
    assert ("brier_top", "") not in whole


def test_ece_is_the_mean_gap_of_bins_of_equal_mass() -> None:
    pairs = classified(500)
    assert pairs.score is not None
    order = np.argsort(pairs.score)
    right = 1 - losses(pairs)
    wanted = np.mean([abs(pairs.score[part].mean() - right[part].mean()) for part in np.array_split(order, 10)])
    estimates = by_name(compute_metrics("classify", LABELS, pairs))["ece", ""]
    assert estimates.value == pytest.approx(wanted, abs=1e-5)


def test_equal_scores_are_in_one_bin_in_any_order() -> None:
    where = metrics.equal_mass_bins(np.array([0.5] * 60 + [0.9] * 40))
    assert len(set(where[:60].tolist())) == 1
    assert len(set(where[60:].tolist())) == 1


def test_without_scores_there_are_no_calibration_metrics() -> None:
    estimates = by_name(compute_metrics("classify", LABELS, LabelledPredictions(np.zeros(30), np.zeros(30, np.int64))))
    assert {name for name, _ in estimates} == {"accuracy", "f1", "f1_macro", "f1_micro"}


def test_regression_metrics_are_their_definitions() -> None:
    random = np.random.default_rng(2)
    truth = random.normal(10, 3, 300)
    value = truth + random.normal(0, 1, 300)
    estimates = by_name(compute_metrics("regress", (), LabelledPredictions(truth, value=value)))
    assert estimates["mae", ""].value == pytest.approx(np.abs(value - truth).mean(), rel=1e-5)
    assert estimates["rmse", ""].value == pytest.approx(math.sqrt(np.square(value - truth).mean()), rel=1e-5)
    wanted = 1 - np.square(value - truth).sum() / np.square(truth - truth.mean()).sum()
    assert estimates["r2", ""].value == pytest.approx(wanted, rel=1e-5)


def test_r2_of_a_constant_truth_is_not_a_number_and_says_so() -> None:
    estimates = by_name(compute_metrics("regress", (), LabelledPredictions(np.ones(50), value=np.arange(50.0))))
    assert estimates["r2", ""].value is None


def by_pairs(value: Any, yes: Any) -> float:
    wins = [(g > b) + (g == b) / 2 for g in value[yes] for b in value[~yes]]
    return float(np.mean(wins))


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({yes for _, yes in rows}) == 2
    )
)
def test_auc_is_the_share_of_pairs_in_order_with_ties_half(rows: list[tuple[int, bool]]) -> None:
    value, yes = np.array([v for v, _ in rows], float), np.array([y for _, y in rows])
    assert metrics.auc(value, yes, np.ones(len(rows))) == pytest.approx(by_pairs(value, yes))


def test_auc_needs_both_kinds() -> None:
    assert math.isnan(metrics.auc(np.arange(5.0), np.ones(5, bool), np.ones(5)))


def test_an_anomaly_model_with_a_threshold_has_accuracy_too() -> None:
    random = np.random.default_rng(5)
    truth = (random.random(200) < 0.2).astype(float)
    value = truth * 2 + random.normal(0, 0.5, 200)
    estimates = by_name(
        compute_metrics("anomaly", (), LabelledPredictions(truth, (value > 1).astype(np.int64), value=value))
    )
    assert {"accuracy", "auc", "f1"} == {name for name, _ in estimates}
    without = by_name(compute_metrics("anomaly", (), LabelledPredictions(truth, value=value)))
    assert {"auc"} == {name for name, _ in without}


def test_the_same_labels_give_the_same_message_to_the_last_bit() -> None:
    first, second = (compute_metrics("classify", LABELS, classified(seed=4)) for _ in range(2))
    assert first == second


def test_neighbours_that_are_alike_make_wider_intervals() -> None:
    blocks = np.repeat(np.random.default_rng(6).random(50) < 0.8, 8).astype(np.int64)
    mixed = np.random.default_rng(7).permutation(blocks)

    def width(right: Any) -> float:
        estimates = by_name(compute_metrics("classify", ("a", "b"), LabelledPredictions(np.ones(400), right)))[
            "accuracy", ""
        ]
        assert estimates.high is not None
        assert estimates.low is not None
        return estimates.high - estimates.low

    assert width(blocks) > 2 * width(mixed)


def test_no_labels_no_metrics() -> None:
    assert compute_metrics("classify", LABELS, LabelledPredictions(np.zeros(0), np.zeros(0, np.int64))) == []


def spans(estimates: list[MetricEstimate]) -> list[tuple[float, float, float]]:
    return [
        (estimate.value, estimate.low, estimate.high)
        for estimate in estimates
        if estimate.value is not None and estimate.low is not None and estimate.high is not None
    ]


FEW = [
    ("classify", LabelledPredictions(np.zeros(1), np.ones(1, np.int64), np.full(1, 0.9))),
    ("regress", LabelledPredictions(np.zeros(1), value=np.ones(1))),
    ("regress", LabelledPredictions(np.zeros(60), value=np.ones(60))),
    ("classify", LabelledPredictions(np.zeros(50), np.zeros(50, np.int64), np.full(50, 0.9))),
    ("classify", LabelledPredictions(np.arange(50.0) % 3, np.arange(50) % 3, np.full(50, 0.9))),
    ("classify", LabelledPredictions(np.arange(50.0) % 3, (np.arange(50) + 1) % 3, np.full(50, 0.9))),
    (
        "anomaly",
        LabelledPredictions((np.arange(50) > 30).astype(float), (np.arange(50) > 30) * 1, value=np.arange(50.0)),
    ),
]


@pytest.mark.parametrize(("kind", "pairs"), FEW)
def test_no_interval_has_the_width_zero(kind: str, pairs: LabelledPredictions) -> None:
    intervals = spans(compute_metrics(kind, LABELS, pairs))
    assert bool(intervals) is (kind != "regress"), "errors that are all equal have no interval"
    for value, low, high in intervals:
        assert low < high
        assert low <= value <= high


@pytest.mark.parametrize("n", [1, 2, 9])
def test_fewer_than_ten_labels_have_an_interval_of_accuracy_only(n: int) -> None:
    for kind, pairs in (
        ("classify", classified(n)),
        ("regress", LabelledPredictions(np.zeros(n), value=np.arange(n, dtype=float))),
    ):
        metrics_with_interval = {
            estimate.metric for estimate in compute_metrics(kind, LABELS, pairs) if estimate.low is not None
        }
        assert metrics_with_interval <= {"accuracy", "f1_micro", "ece_chance"}


def test_a_class_with_few_labels_has_an_f1_without_an_interval() -> None:
    truth = np.r_[np.zeros(99), 1.0]
    estimates = by_name(compute_metrics("classify", LABELS, LabelledPredictions(truth, np.zeros(100, np.int64))))
    assert (estimates["f1", "class=b"].value, estimates["f1", "class=b"].low) == (0.0, None)
    assert estimates["f1_macro", ""].low is None
    assert estimates["f1", "class=a"].low is not None


def test_f1_micro_is_accuracy_and_so_is_its_interval() -> None:
    estimates = by_name(
        compute_metrics("classify", LABELS, LabelledPredictions(np.arange(50.0) % 3, np.arange(50) % 3))
    )
    accuracy, micro = estimates["accuracy", ""], estimates["f1_micro", ""]
    assert (micro.value, micro.low, micro.high) == (accuracy.value, accuracy.low, accuracy.high)
    assert accuracy.low == pytest.approx(0.9287, abs=1e-4)


def test_ece_of_a_calibrated_model_is_that_of_chance() -> None:
    random, seen, expected, within, at_zero = np.random.default_rng(0), [], [], 0, 0
    for _ in range(100):
        score = random.uniform(0.5, 1, 200)
        predicted = (random.random(200) < score).astype(np.int64)
        estimates = by_name(
            compute_metrics("classify", ("a", "b"), LabelledPredictions(np.ones(200), predicted, score))
        )
        ece, chance = estimates["ece", ""], estimates["ece_chance", ""]
        assert ece.value is not None
        assert chance.value is not None
        assert chance.high is not None
        seen.append(ece.value)
        expected.append(chance.value)
        within += ece.value <= chance.high
        at_zero += ece.low == 0.0
    assert np.mean(seen) == pytest.approx(np.mean(expected), abs=0.004)
    assert within >= 90
    assert at_zero == within


def test_ece_of_a_calibrated_model_is_within_chance_where_whole_sessions_are_harder() -> None:
    random, within = np.random.default_rng(2), 0
    sessions, offsets = np.repeat(np.arange(20), 50), np.linspace(-3, 3, 41)
    density = np.exp(-(offsets**2) / 2)
    for _ in range(60):
        logit = random.normal(1.5, 1.2, 1000)
        # The mean over all sessions, as a model gives it that cannot know which session it is.
        score = (density / (1 + np.exp(-logit[:, None] - offsets))).sum(1) / density.sum()
        right = random.random(1000) < 1 / (1 + np.exp(-logit - random.normal(0, 1, 20)[sessions]))
        pairs = LabelledPredictions(np.ones(1000), right.astype(np.int64), score)
        estimates = by_name(compute_metrics("classify", ("a", "b"), pairs))
        ece, chance = estimates["ece", ""], estimates["ece_chance", ""]
        assert ece.value is not None
        assert chance.high is not None
        within += ece.value <= chance.high
    assert within >= 54


def test_ece_of_an_overconfident_model_lies_above_chance() -> None:
    predicted = (np.random.default_rng(1).random(300) < 0.6).astype(np.int64)
    score = np.random.default_rng(2).uniform(0.85, 0.99, 300)
    estimates = by_name(compute_metrics("classify", ("a", "b"), LabelledPredictions(np.ones(300), predicted, score)))
    assert estimates["ece", ""].low is not None
    assert estimates["ece_chance", ""].high is not None
    assert estimates["ece", ""].low > estimates["ece_chance", ""].high


def test_results_without_a_score_are_left_out_of_calibration_only() -> None:
    pairs = classified(100)
    assert pairs.score is not None
    pairs.score[3] = np.nan
    estimates = by_name(compute_metrics("classify", LABELS, pairs))
    assert (estimates["accuracy", ""].n, estimates["brier_top", ""].n, estimates["ece", ""].n) == (100, 99, 99)
    rest = by_name(compute_metrics("classify", LABELS, pairs[np.arange(100) != 3]))
    assert estimates["brier_top", ""].value == rest["brier_top", ""].value
    assert estimates["ece", ""].value == rest["ece", ""].value


def test_an_overflowing_square_has_no_squared_error() -> None:
    estimates = by_name(compute_metrics("regress", (), LabelledPredictions(np.full(30, 1e200), value=np.zeros(30))))
    assert (estimates["mae", ""].value, estimates["rmse", ""].value) == (1e200, None)


def test_a_multilabel_result_is_right_if_all_labels_are() -> None:
    truth = LabelSchema("several", ("wet", "hot"))
    codes = [truth.parse(text) for text in ("wet|hot", "wet", "-", "hot | wet")]
    assert codes == [3, 1, 0, 3]
    estimates = by_name(
        compute_metrics("several", truth.labels, LabelledPredictions(np.array(codes), np.array([3, 1, 2, 1])))
    )
    assert estimates["accuracy", ""].value == 0.5
    assert estimates["f1", "class=wet"].value == 1
    assert estimates["f1", "class=hot"].value == 0.5
    assert estimates["f1_macro", ""].value == 0.75


def test_an_unknown_label_of_a_multilabel_model_is_refused_with_the_known() -> None:
    with pytest.raises(ValueError, match=r"this is no label of this model; it knows any of wet\|hot"):
        LabelSchema("several", ("wet", "hot")).parse("wet|dry")
    with pytest.raises(ValueError, match="more than 16 at once are not taken"):
        LabelSchema("several", tuple("abcdefghijklmnopq")).parse("a")
