"""Least count: what an observer of all messages tries, to learn single readings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.drift.merge import MergedField
from outstation.ml.drift.reporting import parsed_message
from outstation.protocol.wire.privacy import least_count
from outstation.protocol.wire.runs import TimeRun

pytestmark = pytest.mark.attack("privacy")

K = 10


def field(bins: list[int], missing: int = 0) -> dict[str, Any]:
    return {
        "counts": bins[1:-1],
        "missing": missing,
        "below": bins[0],
        "above": bins[-1],
        "mean": 36.6,
        "m2": 0.25,
        **dict.fromkeys(("psi", "js", "ks", "w1"), 0.5),
        "cusum": {"mean": [0.1, 3.25], "spread": [0, 0.5], "limit": 8.5},
        "state": "ok",
        "fault": None,
    }


def drift(n: int, **fields: dict[str, Any]) -> dict[str, Any]:
    score = {"cusum": [0.5, 0.25], "limit": 8.5, "state": "ok"}
    return {
        "window": {"n": n},
        "features": fields,
        "output": {"counts": {"well": 40, "ill": 20}, "psi": 0.125, "state": "ok", "score": score},
        "estimate": {"accuracy": 0.75, "low": 0.5, "high": 1.0},
        "joint": {"cusum": 4.75, "limit": 8.5, "state": "ok"},
        "rate": {"step_us": 1e6, "usual_us": 1e6, "repeated": 0.0, "cusum": [0, 0], "limit": 9.5, "state": "ok"},
        "state": "ok",
    }


def bins_of(body: Any, name: str) -> list[int]:
    shown = body["features"][name]
    return [shown["below"], *shown["counts"], shown["above"]]


def test_the_mean_of_one_reading_does_not_leave() -> None:
    body = least_count.apply("drift", drift(60, t=field([0, 1, 0, 0], missing=59), u=field([20, 20, 20, 0])), K)
    own = body["features"]["t"]
    assert (own["mean"], own["m2"], own["psi"], own["w1"], own["withheld"]) == (None, None, None, None, 1)
    assert bins_of(body, "t") == [0, 0, 0, 0]
    assert own["cusum"] == {"limit": 8.5}
    # All fields together would show it, too.
    assert (body["joint"]["cusum"], body["output"]["score"]["cusum"]) == (None, [])
    assert body["features"]["u"]["mean"] == 36.6


def test_a_bin_with_one_row_is_merged_into_its_neighbor() -> None:
    body = least_count.apply("drift", drift(60, t=field([1, 30, 28, 1])), K)
    assert bins_of(body, "t") == [0, 31, 29, 0]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=34), st.integers(2, 40))
def test_no_bin_is_left_below_the_least_count_and_no_row_is_lost(counts: list[int], k: int) -> None:
    merged = least_count.merge_small_bins(counts, k)
    assert (sum(merged), len(merged)) == (sum(counts), len(counts))
    assert all(n == 0 or n >= k for n in merged) or sum(counts) < k


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 30), max_size=6), st.integers(2, 40))
def test_no_class_is_named_below_the_least_count_nor_shown_by_the_total(counts: dict[str, int], k: int) -> None:
    merged = least_count.merge_small_classes(counts, k)
    assert sum(merged.values()) == sum(counts.values())
    if sum(counts.values()) >= k:
        assert all(n == 0 or n >= k for n in merged.values())


def test_predictions_of_few_windows_do_not_leave() -> None:
    body = drift(600, t=field([0, 300, 300, 0]))
    body["output"]["counts"] = {"well": 4, "ill": 1}
    limited = least_count.apply("drift", body, K)
    assert (limited["output"]["counts"], limited["output"]["withheld"], limited["estimate"]) == ({}, 5, None)
    body["output"]["counts"] = {"well": 57, "ill": 2, "dying": 1}
    assert least_count.apply("drift", body, K)["output"]["counts"] == {"other": 60}


def test_a_run_hides_how_near_a_small_window_is_to_its_limit() -> None:
    body = drift(63, t=field([0, 31, 32, 0]))
    body["windows"] = {"n": [TimeRun(30, 0, 2), 3], "nearest": [0.5, 0.25, 0.75]}
    assert least_count.apply("drift", body, K)["windows"]["nearest"] == [0.5, 0.25, None]


def test_an_alert_about_a_window_of_few_readings_has_no_numbers() -> None:
    alert = {
        "alert": "drift",
        "subject": "t",
        "state": "raised",
        "severity": "warning",
        "id": "1",
        "summary": "t: mean rose from 36.6 to 41.7",
        "evidence": {"seq": 7, "test": "mean", "from": 36.6, "to": 41.7, "window": 3, "rows": [1, 60]},
    }
    few, many = drift(60, t=field([0, 1, 0, 0], missing=59)), drift(60, t=field([0, 30, 30, 0]))
    assert least_count.apply_to_alert(alert, many, K) == alert
    limited = least_count.apply_to_alert(alert, few, K)
    assert "41.7" not in str(limited)
    assert limited["evidence"] == {"seq": 7, "test": "mean", "window": 3, "rows": [1, 60]}


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=60), min_size=2, max_size=5))
def test_the_difference_of_successive_messages_shows_no_cell_of_few(batches: list[list[str]]) -> None:
    """Cells are published over growing, sliding windows; an observer subtracts what was published before."""
    published: dict[str, list[int]] = {}
    values: list[str] = []
    for batch in batches:
        values += batch
        window = range(max(0, len(values) - 80), len(values))
        cells: dict[str, list[int]] = {}
        for number in window:
            cells.setdefault(values[number], []).append(number)
        shown = least_count.select_cells(cells, published, K)
        for name, members in shown.items():
            difference = set(members) ^ set(published.get(name, []))
            assert len(members) >= K
            assert not difference or len(difference) >= K
        hidden = [number for name, members in cells.items() if name not in shown for number in members]
        assert not shown or not hidden or len(hidden) >= K
        published |= shown


def test_metrics_of_a_patient_with_one_label_do_not_leave() -> None:
    metrics = [
        {"metric": "accuracy", "value": 0.9, "low": 0.8, "high": 1.0, "n": 60},
        {"metric": "accuracy", "slice": "patient=Ada", "value": 0.0, "low": 0.0, "high": 0.9, "n": 1},
    ]
    labels = {
        "n": 60,
        "delay_s": {"median": 1.0, "p90": 2.0},
        "coverage": 1.0,
        "sources": {"nurse": 57, "Dr. Who": 3},
        "classes": {"well": 59, "ill": 1},
        "imbalance": 59.0,
    }
    body = {"window": {"n": 60}, "labels": labels, "estimate": None, "metrics": metrics}
    limited = least_count.apply("quality", body, K)
    assert "Ada" not in str(limited)
    assert (len(limited["metrics"]), limited["withheld"]) == (1, 1)
    assert limited["labels"]["classes"] == {"other": 60}
    assert limited["labels"]["sources"] == {"other": 60}
    assert limited["labels"]["imbalance"] is None


def test_a_comparison_of_two_bundles_shows_no_single_score_or_label() -> None:
    single, many = {"n": 1, "mean": 0.625, "m2": 0.0}, {"n": 50, "mean": 0.5, "m2": 2.0}
    side = {
        "windows": 50,
        "seconds": 0.1,
        "scores": many,
        "expected_accuracy": single,
        "correct": 1,
        "abs_error": single,
    }
    body = {"n": 50, "agreeing": 49, "difference": single, "stats": side, "other_stats": side, "labelled": [1, 0, 0, 0]}
    limited = least_count.apply("shadow", {**body, "outputs": {"wear": body}}, K)
    assert "0.625" not in str(limited)
    assert limited["outputs"]["wear"] == {name: limited[name] for name in body}
    assert limited["labelled"] == [0, 0, 0, 0]
    assert (limited["stats"]["correct"], limited["stats"]["scores"]) == (0, many)


@pytest.mark.parametrize("agreeing", [0, 1, 3])
def test_a_comparison_of_few_windows_hides_also_that_none_agrees(agreeing: int) -> None:
    side = {"windows": 3, "seconds": 0.1}
    body = {"n": 3, "agreeing": agreeing, "stats": side, "other_stats": side}
    limited = least_count.apply("shadow", body, K)
    assert (limited["n"], limited["agreeing"]) == (0, 0)


def test_a_comparison_gets_no_member_that_makes_its_message_longer() -> None:
    side = {"windows": 50}
    body = {"n": 50, "stats": side, "other_stats": side, "labelled": [1, 0, 0, 0]}
    limited = least_count.apply("shadow", {**body, "outputs": {"wear": body}}, K)
    assert limited == {**body, "labelled": [0, 0, 0, 0], "outputs": {"wear": {**body, "labelled": [0, 0, 0, 0]}}}


@pytest.mark.parametrize("kind", ["alerts", "audit", "health", "reply"])
def test_a_sample_of_few_is_left_out_of_any_other_message(kind: str) -> None:
    body = {"evidence": {"site": [{"n": 2, "mean": 36.6}, {"n": 20, "mean": 37.5}]}}
    assert least_count.apply(kind, body, K) == {"evidence": {"site": [{"withheld": 2}, {"n": 20, "mean": 37.5}]}}


def test_readers_take_a_window_without_numbers() -> None:
    body = least_count.apply("drift", drift(60, t=field([0, 1, 0, 0], missing=59)), K)
    report = parsed_message.from_message(dict(body), (0, 60_000_000))
    assert (report.fields["t"].mean, report.fields["t"].withheld, report.subjects["joint"].mean) == (None, 1, 0.0)
    merged = MergedField.sum_of([report.fields["t"]])
    assert (merged.moments.n, merged.counts.tolist(), merged.missing) == (0, [0, 0, 0, 0], 59)


def test_a_least_count_of_one_lets_everything_pass() -> None:
    body = drift(1, t=field([0, 1, 0, 0]))
    assert least_count.apply("drift", body, 1) is body
