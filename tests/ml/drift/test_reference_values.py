"""Our sizes, calibration measures and estimates beside what SciPy, scikit-learn, Evidently and NannyML say of the same
data (tests/kit/reference_values.json; scripts/reference_values.py asked them).

Exact to rounding: PSI, JS, KS with a bin for each value, ECE, Brier. Binned KS: never above the exact one, and at most
the largest gap within a bin below it. W1: within the bins' widths. CBPE: within 0.002 at 40,000 reference answers,
where both are asked how often an answer with such a top score is right; at 1620, as many as the shipped model's table
has, 0.0013 apart on average and 0.004 at most. Where NannyML calibrates both answers of a model apart: 0.009 at most,
and 0.013 for the seven of the shipped model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.foundation.indices import bincount
from outstation.ml.drift.numeric import divergence
from outstation.ml.performance import cbpe, metrics
from outstation.ml.performance.estimates import compute_metrics
from outstation.ml.performance.metrics import LabelledPredictions
from scripts.kit import reference_data as data
from scripts.kit.reference_data import Values

REPORTED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "kit" / "reference_values.json").read_text())
EXACT = 1e-9
REFERENCE, OTHERS = data.samples()
EDGES = data.edges(REFERENCE)


def counts(values: Values, edges: Values) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return bincount(data.binned(values, edges), minlength=len(edges) + 1)


@pytest.mark.parametrize("name", OTHERS)
def test_psi_and_js_on_given_bins_are_those_of_evidently_and_scipy(name: str) -> None:
    p, q, reported = counts(REFERENCE, EDGES), counts(OTHERS[name], EDGES), REPORTED["sizes"][name]
    assert float(divergence.psi(p, q)) == pytest.approx(reported["psi_evidently"], rel=EXACT)
    assert float(divergence.js(p, q)) == pytest.approx(reported["js_scipy"], rel=EXACT)
    # Evidently's has base e: the divergence is ln 2 times ours, its root the distance.
    assert float(divergence.js(p, q)) * np.sqrt(np.log(2)) == pytest.approx(reported["js_evidently_base_e"], rel=EXACT)


@pytest.mark.parametrize("name", OTHERS)
def test_ks_equals_scipy_and_on_32_bins_is_a_lower_bound(name: str) -> None:
    reported, other = REPORTED["sizes"][name]["ks_scipy_exact"], OTHERS[name]
    each = np.unique(np.concatenate([REFERENCE, other]))
    assert float(divergence.ks(counts(REFERENCE, each), counts(other, each))) == pytest.approx(reported, rel=EXACT)
    on_bins = float(divergence.ks(counts(REFERENCE, EDGES), counts(other, EDGES)))
    assert on_bins <= reported + EXACT
    assert reported - on_bins <= largest_within_a_bin(REFERENCE, other, EDGES) + EXACT


@pytest.mark.parametrize("name", OTHERS)
def test_w1_is_scipys_within_the_bins_widths(name: str) -> None:
    reported, other, sd = REPORTED["sizes"][name], OTHERS[name], np.asarray(REFERENCE.std())
    low, high = np.minimum(REFERENCE.min(), other.min()), np.maximum(REFERENCE.max(), other.max())
    bounds = np.array([low, *EDGES, high])
    ours = float(divergence.w1(counts(REFERENCE, EDGES), counts(other, EDGES), bounds, sd))
    assert abs(ours - reported["w1_evidently_sd"]) <= w1_tolerance(REFERENCE, other, bounds) / float(sd)
    assert reported["w1_evidently_sd"] * float(sd) == pytest.approx(reported["w1_scipy"], rel=EXACT)


def largest_within_a_bin(p: Values, q: Values, edges: Values) -> float:
    """Return by how much the gap of the cumulative curves inside a bin exceeds that at its ends, at most."""
    each = np.unique(np.concatenate([p, q]))
    gap = np.cumsum(counts(p, each)[1:] / len(p) - counts(q, each)[1:] / len(q))
    places, most = data.binned(each, edges), 0.0
    for place in np.unique(places):
        inside = np.abs(gap[places == place])
        before = gap[places < place]
        ends = max(abs(float(before[-1])) if len(before) else 0.0, float(inside[-1]))
        most = max(most, float(inside.max()) - ends)
    return most


def w1_tolerance(p: Values, q: Values, bounds: Values) -> float:
    """To spread a bin's rows evenly moves none of them further than the bin is wide."""
    width = np.diff(bounds)
    return float(sum((counts(x, bounds[1:-1]) / len(x) * width).sum() for x in (p, q)))


# Few and even numbers, for ties; and any.
value = st.integers(-20, 20).map(float) | st.floats(-100, 100)
values = st.lists(value, min_size=1, max_size=60).map(np.array)


@given(values, values, st.lists(value, min_size=1, max_size=31, unique=True))
def test_binned_ks_is_at_most_a_bins_gap_below_the_exact_one(p: Values, q: Values, cuts: list[float]) -> None:
    edges, each = np.sort(cuts), np.unique(np.concatenate([p, q]))
    exact = np.abs(
        np.searchsorted(np.sort(p), each, side="right") / len(p)
        - np.searchsorted(np.sort(q), each, side="right") / len(q)
    ).max()
    on_bins = float(divergence.ks(counts(p, edges), counts(q, edges)))
    assert on_bins <= exact + EXACT
    assert exact - on_bins <= largest_within_a_bin(p, q, edges) + EXACT


@given(values, values, st.lists(value, min_size=1, max_size=31, unique=True))
def test_w1_is_within_the_bins_widths_of_the_area_between_the_curves(p: Values, q: Values, cuts: list[float]) -> None:
    edges, each = np.sort(cuts), np.unique(np.concatenate([p, q]))
    low, high = min(each[0], edges[0]), max(each[-1], edges[-1])
    gap = np.searchsorted(np.sort(p), each, side="right") / len(p) - np.searchsorted(
        np.sort(q), each, side="right"
    ) / len(q)
    exact = float((np.abs(gap[:-1]) * np.diff(each)).sum())
    bounds = np.array([low, *edges, high])
    ours = float(divergence.w1(counts(p, edges), counts(q, edges), bounds, np.array(1.0)))
    assert abs(ours - exact) <= w1_tolerance(p, q, bounds) + 1e-6


def test_ece_is_nannymls_and_brier_scikit_learns() -> None:
    few, reported = data.answers(7, 1000), REPORTED["calibration"]
    result = _metrics(("a", "b"), LabelledPredictions(few.truth.astype(float), few.named, few.top))
    assert result["ece"] == pytest.approx(reported["ece_nannyml"], abs=1e-6)
    assert result["brier_top"] == pytest.approx(reported["brier_top_sklearn"], abs=1e-6)
    exact = metrics.compute_value("ece", "classify", LabelledPredictions(few.truth.astype(float), few.named, few.top))
    assert exact == pytest.approx(reported["ece_nannyml"], rel=EXACT)
    scores, truth = data.read_exercise("crossval")
    seven = LabelledPredictions(truth.astype(float), scores.argmax(1), scores.max(1), probabilities=scores)
    assert _metrics(tuple("abcdefg"), seven)["brier"] == pytest.approx(reported["brier_sklearn"], abs=1e-6)


def _metrics(labels: tuple[str, ...], pairs: LabelledPredictions) -> dict[str, float | None]:
    return {metric.metric: metric.value for metric in compute_metrics("classify", labels, pairs) if not metric.slice}


# --- expected accuracy ---


def ours(known_top: Values, right: Any, top: Values) -> float:
    """From a score table of the reference answers, as a bundle's is made."""
    edges = data.edges(known_top)
    table, correct = counts(known_top, edges), counts(known_top[right], edges)
    result = cbpe.estimate_accuracy(table, correct, counts(top, edges))
    assert result is not None
    return float(result["accuracy"])


def cbpe_differences(name: str, n: int) -> Values:
    """Ours less NannyML's, of each seed."""
    reported = REPORTED["cbpe"][name]
    pairs = [(data.answers(seed, n), data.less_sure(seed)) for seed in range(len(reported))]
    return np.array([ours(a.top, a.right, b.top) - entry for (a, b), entry in zip(pairs, reported, strict=True)])


def test_expected_accuracy_equals_nannyml_at_40_000_reference_predictions() -> None:
    assert np.abs(cbpe_differences("40000_named", 40_000)).max() <= 0.002


def test_expected_accuracy_is_near_nannyml_at_1620_predictions() -> None:
    off = np.abs(cbpe_differences("1620_named", 1620))
    assert off.mean() <= 0.002
    assert off.max() <= 0.004


def test_nannyml_with_separate_calibration_differs_by_a_hundredth() -> None:
    """One table for both answers cannot tell that one of them is surer than it should be by more than the other."""
    assert np.abs(cbpe_differences("40000", 40_000)).max() <= 0.005
    assert np.abs(cbpe_differences("1620", 1620)).max() <= 0.01


def test_our_accuracy_estimate_is_as_near_to_the_truth_as_nannymls() -> None:
    """NannyML calibrates each of the seven scores of each answer; we have its top score only."""
    scores, truth = data.read_exercise("crossval")
    later, true = data.read_exercise("leave_one_out")
    result, share = ours(scores.max(1), scores.argmax(1) == truth, later.max(1)), (later.argmax(1) == true).mean()
    assert result == pytest.approx(share, abs=0.01)
    assert REPORTED["cbpe"]["exercise"] == pytest.approx(share, abs=0.01)


def test_neither_estimate_is_nearer_the_truth_at_1620_predictions() -> None:
    many = [(data.answers(seed, 1620), data.less_sure(seed)) for seed in range(20)]
    share = np.array([later.right.mean() for _, later in many])
    mine = np.array([ours(known.top, known.right, later.top) for known, later in many])
    assert np.abs(mine - share).mean() <= np.abs(REPORTED["cbpe"]["1620"] - share).mean() + 0.001
