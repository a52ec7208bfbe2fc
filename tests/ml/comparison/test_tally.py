"""Comparison statistics of two bundles over the same windows."""

from __future__ import annotations

import json
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from outstation.evidence.format.contents import WRITE_LIMITS
from outstation.evidence.gather import comparisons
from outstation.ml.comparison import tally
from outstation.ml.comparison.tally import ComparisonStats, OutputKind, Predictions
from outstation.protocol.wire import verification
from outstation.protocol.wire.messages import MAX_OUTPUTS, ModelRef, Moments, ShadowPayload

AB = OutputKind("classify", ("a", "b", "c"))
NUMBERS = st.floats(-1e6, 1e6)
COUNTS = st.integers(0, 1000)


def predictions(row: Any, **more: Any) -> Predictions:
    members: dict[str, Any] = {name: np.asarray(value) for name, value in more.items()}
    return Predictions(np.asarray(row, np.int64), 0.5, **members)


@st.composite
def tallies(draw: st.DrawFn) -> ComparisonStats:
    n = draw(st.integers(0, 6))
    pairs = draw(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=n, max_size=n))
    chance = draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    others = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    rows = np.arange(n)
    first = predictions(
        rows,
        label=np.array(labels, np.int64),
        score=np.array([a for a, _ in pairs]),
        correct_probability=np.array(chance),
    )
    two = predictions(rows, label=np.array(others, np.int64), score=np.array([b for _, b in pairs]))
    right = draw(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=5))
    outcomes = tally.from_correctness([a for a, _ in right], [b for _, b in right])
    if draw(st.booleans()):
        first, two = replace(first, outputs={"wear": first}), replace(two, outputs={"wear": two, "more": two})
        outcomes = replace(outcomes, outputs={"wear": tally.from_correctness([True], [False])})
    kind = replace(AB, outputs={"wear": AB, "more": AB})
    return (
        tally.compare_batch(kind, first, kind, two)
        + outcomes
        + tally.from_abs_errors(np.array(chance), np.array(chance) * 2)
    )


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, float) or isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-9, atol=1e-3))
    return bool(a == b)


@given(st.lists(tallies(), max_size=6), st.randoms())
def test_statistics_add_up_in_any_order_and_grouping(parts: list[ComparisonStats], random: Any) -> None:
    whole = reduce(add, parts, ComparisonStats())
    mixed = list(parts)
    random.shuffle(mixed)
    while len(mixed) > 1:
        at = random.randrange(len(mixed) - 1)
        mixed[at : at + 2] = [mixed[at] + mixed[at + 1]]
    other = reduce(add, mixed, ComparisonStats())
    assert close(whole.to_body(), other.to_body())


@given(tallies())
def test_adding_empty_statistics_changes_nothing(stats: ComparisonStats) -> None:
    assert stats + ComparisonStats() == stats == ComparisonStats() + stats


@given(st.lists(st.lists(NUMBERS, max_size=5), max_size=5))
def test_merged_moments_equal_those_of_all_values(parts: list[list[float]]) -> None:
    stats = reduce(tally.merge_moments, [tally.compute_moments(np.array(part)) for part in parts], Moments())
    every = np.array([value for part in parts for value in part])
    assert stats.n == len(every)
    if len(every):
        assert np.isclose(stats.mean, every.mean(), rtol=1e-9, atol=1e-6)
        assert np.isclose(stats.m2, np.square(every - every.mean()).sum(), rtol=1e-6, atol=1e-3)


def decode_message(body: dict[str, Any], rows: tuple[int, int] = (1, 9)) -> ShadowPayload:
    head = {"v": 1, "kind": "shadow", "device": "pi-07", "log": "0" * 8 + "-0000" * 3 + "-" + "0" * 12, "seq": 1}
    head |= {"prev": "", "boot": 1, "time": "2026-11-24T00:00:00Z", "clock": "synced"}
    model = {"name": "m", "version": "1", "digest": "sha256:" + "0" * 64}
    where = {"task": "t", "rollout": "r", "model": model, "other": model, "rows": rows}
    message = verification.decode(json.dumps({**head, **where, **body}).encode())
    assert isinstance(message, ShadowPayload)
    return message


@given(tallies())
def test_statistics_survive_the_round_trip_through_a_message(stats: ComparisonStats) -> None:
    stats = replace(stats, errors=stats.errors + 1, error="did not answer")
    assert ComparisonStats.from_message(decode_message(stats.to_body())) == stats


def test_labels_are_compared_by_name_in_any_order() -> None:
    other = OutputKind("classify", ("c", "a", "d"))
    stats = tally.compare_batch(
        AB, predictions([1, 2, 3, 4], label=[0, 1, 2, 2]), other, predictions([1, 2, 3, 4], label=[1, 2, 0, 1])
    )
    assert (stats.n, stats.agreeing) == (4, 2)


def test_windows_are_matched_by_the_row_they_end_at() -> None:
    stats = tally.compare_batch(
        AB, predictions([10, 20, 30], label=[0, 1, 2]), AB, predictions([20, 25, 30, 40], label=[1, 1, 0, 0])
    )
    assert (stats.n, stats.agreeing) == (2, 1)
    assert (stats.model.windows, stats.other.windows) == (3, 4)


def test_expected_accuracy_covers_matched_windows_only() -> None:
    ours = predictions([10, 20, 30], label=[0, 1, 2], correct_probability=[0.1, 0.8, 0.9])
    theirs = predictions([20, 30, 40], label=[1, 1, 0], correct_probability=[0.5, 0.7, 0.0])
    stats = tally.compare_batch(AB, ours, AB, theirs)
    assert (stats.model.expected_accuracy.n, stats.other.expected_accuracy.n) == (2, 2)
    assert stats.model.expected_accuracy.mean == pytest.approx(0.85)
    assert stats.other.expected_accuracy.mean == pytest.approx(0.6)


def test_multi_label_predictions_agree_if_all_labels_do() -> None:
    kind, other = OutputKind("several", ("x", "y")), OutputKind("several", ("y", "x", "z"))
    ours = predictions([1, 2, 3], label_mask=np.array([[1, 0], [1, 1], [0, 0]], bool))
    theirs = predictions([1, 2, 3], label_mask=np.array([[0, 1, 0], [1, 1, 1], [0, 0, 0]], bool))
    assert tally.compare_batch(kind, ours, other, theirs).agreeing == 2


def test_numeric_predictions_have_a_difference_and_no_agreement() -> None:
    kind = OutputKind("regress")
    stats = tally.compare_batch(
        kind, predictions([1, 2], value=[1.0, 2.0]), kind, predictions([1, 2], value=[1.5, np.nan])
    )
    assert (stats.n, stats.agreeing, stats.difference) == (2, None, Moments(1, 0.5, 0.0))


def test_anomaly_predictions_agree_by_their_flag() -> None:
    kind = OutputKind("anomaly")
    ours = predictions([1, 2], is_anomaly=[True, False], value=[3.0, 1.0])
    theirs = predictions([1, 2], is_anomaly=[True, True], value=[9.0, 8.0])
    assert tally.compare_batch(kind, ours, kind, theirs).agreeing == 1


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (OutputKind("regress"), "one bundle answers as classify, the other as regress"),
        (OutputKind("classify", ("x", "y")), r"one bundle names a, b, c, the other x, y: they have no label in common"),
    ],
)
def test_bundles_of_different_kinds_are_reported(other: OutputKind, reason: str) -> None:
    theirs = (
        predictions([1, 2], value=[1.0, 2.0]) if other.problem_type == "regress" else predictions([1, 2], label=[0, 1])
    )
    stats = tally.compare_batch(AB, predictions([1, 2], label=[0, 1], score=[0.5, 0.6]), other, theirs)
    assert (stats.n, stats.agreeing, stats.difference.n) == (2, None, 0)
    assert stats.error.startswith(reason)


def test_incomparable_windows_make_agreement_unknown() -> None:
    compared = ComparisonStats(1, 5, 4)
    assert (compared + ComparisonStats(1, 5, None)).agreeing is None
    assert (compared + ComparisonStats(1, 0, None)).agreeing == 4


def test_nan_and_too_large_values_are_left_out() -> None:
    assert tally.compute_moments(np.array([np.nan, np.inf, 1e200, 2.0])) == Moments(1, 2.0, 0.0)


def test_a_failed_batch_counts_with_a_short_error() -> None:
    stats = ComparisonStats(3, 9, 9) + tally.from_failure("the model\ncrashed: " + "x" * 900)
    assert (stats.batches, stats.errors, stats.n) == (4, 1, 9)
    assert stats.error.startswith("the model crashed: x")
    assert len(stats.error) == 500


def test_labelled_windows_are_counted_by_outcome() -> None:
    stats = tally.from_correctness([True, True, False, False], [True, False, True, False])
    assert stats.labelled == (1, 1, 1, 1)
    assert (stats.model.correct, stats.other.correct) == (2, 2)


def test_further_outputs_are_compared_over_the_same_windows() -> None:
    kind = replace(AB, outputs={"wear": OutputKind("regress"), "more": AB})
    ours = predictions([10, 20], label=[0, 1])
    ours = replace(ours, outputs={"wear": predictions([10, 20], value=[1.0, 2.0], expected_error=[0.1, 0.3])})
    theirs = predictions([20, 30], label=[1, 1])
    wear = predictions([20, 30], value=[2.5, 0.0], expected_error=[0.2, 9.0])
    theirs = replace(theirs, outputs={"wear": wear, "more": theirs})
    stats = tally.compare_batch(kind, ours, kind, theirs)
    assert (stats.n, stats.agreeing, stats.batches, sorted(stats.outputs)) == (1, 1, 1, ["more", "wear"])
    compared = stats.outputs["wear"]
    assert (compared.n, compared.agreeing, compared.difference.mean, compared.batches) == (1, None, 0.5, 0)
    assert (compared.model.expected_error.mean, compared.other.expected_error.mean) == (0.3, 0.2)
    alone = stats.outputs["more"]
    assert (alone.agreeing, alone.model.windows, alone.other.windows) == (None, 0, 2)
    assert alone.error == "only one of the two bundles has this output"


def test_a_text_that_does_not_fit_is_cut_and_the_counts_stay() -> None:
    stats = ComparisonStats(1, errors=1, error="e" * 500, outputs={"wear": ComparisonStats(n=3, error="w" * 500)})
    first, second = stats.to_bodies(lambda body: len(str(body)) < 500)
    assert (first["errors"], second["outputs"]["wear"]["n"]) == (1, 3)
    assert 0 < len(first["error"]) < 500 > len(second["outputs"]["wear"]["error"]) > 0
    assert stats.to_bodies(lambda _: False)[0].get("error") is None


OTHER_MODEL = ModelRef("m", "2", "sha256:" + "1" * 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"log": "1" * 8 + "-0000" * 3 + "-" + "0" * 12},
        {"time": "2026-11-24T00:00:01Z"},
        {"rows": (10, 19)},
        {"rollout": "s"},
        {"model": OTHER_MODEL},
        {"other": OTHER_MODEL},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_only_parts_of_the_same_comparison_are_joined(changes: dict[str, Any]) -> None:
    head = decode_message(ComparisonStats(1, 5, 4).to_body())
    part = decode_message(ComparisonStats(outputs={"wear": ComparisonStats(n=3)}).to_body())
    for messages, count in (([head, part], 1), ([head, replace(part, **changes)], 2)):
        joined: list[ShadowPayload] = []
        for body in messages:
            tally.join_part(joined, body)
        assert len(joined) == count


@pytest.mark.attack("devices")
@pytest.mark.parametrize("names", [["wear"], [f"more-{i}" for i in range(MAX_OUTPUTS)]], ids=["again", "many"])
def test_a_part_that_repeats_an_output_or_has_too_many_is_not_joined(names: list[str]) -> None:
    wear = ComparisonStats(n=3)
    head = decode_message(ComparisonStats(1, 5, 4, outputs={"wear": wear}).to_body())
    part = decode_message(ComparisonStats(outputs=dict.fromkeys(names, wear)).to_body())
    joined: list[ShadowPayload] = [head]
    tally.join_part(joined, part)
    assert joined == [head, part]


@pytest.mark.parametrize("place", [0, 1])
def test_a_part_that_names_an_error_keeps_its_text_and_count(place: int) -> None:
    wear = ComparisonStats(outputs={"wear": ComparisonStats(n=3)}, errors=1, error="ran out of memory")
    bodies = [decode_message(ComparisonStats(1, 5, 4).to_body())]
    bodies.insert(place, decode_message(wear.to_body()))
    joined: list[ShadowPayload] = []
    for body in bodies:
        tally.join_part(joined, body)
    [whole] = joined
    assert (whole.batches, whole.errors, whole.error, [*whole.outputs]) == (1, 1, "ran out of memory", ["wear"])


def test_evidence_that_drops_an_old_comparison_drops_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "WRITE_LIMITS", replace(WRITE_LIMITS, messages_per_comparison=3))
    collector = comparisons.ComparisonCollector()
    part = ComparisonStats(outputs={"wear": ComparisonStats(n=5)}).to_body()
    for rows in [(1, 9), (10, 19)]:
        collector.add(decode_message(ComparisonStats(1, 5, 4).to_body(), rows))
        collector.add(decode_message(part, rows))
    [compared] = collector.build_comparisons({})
    assert (compared.batches, compared.windows, len(compared.messages), compared.omitted) == (1, 5, 2, 2)


def test_a_model_of_one_output_says_nothing_of_others() -> None:
    assert "outputs" not in ComparisonStats(1, 5, 4).to_body()
