"""Summary: what it counts, and that its parts add up."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation.ml.drift.baseline import summary as summaries
from outstation.ml.drift.baseline import window_statistics
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.runs import Tail
from outstation.ml.drift.baseline.sampling import compute_spans
from outstation.ml.drift.baseline.summary import Summary, stack_one
from outstation.ml.drift.numeric.sums import Groups, GroupSums
from outstation.ml.drift.reporting import drift_message
from outstation.ml.drift.reporting.drift_message import MessageSums
from tests.kit.machine import FIELDS, LABELS, ROWS, readings, reference, summarize_rows


@pytest.fixture(scope="module")
def shipped() -> Reference:
    return reference()


@pytest.fixture(scope="module")
def by_row() -> Reference:
    """Return the reference of a model that answers each row."""
    made = readings(1, 40)
    labels = np.repeat(made.labels, ROWS)
    scores = np.repeat(made.scores, ROWS, axis=0)
    return build_reference(made.features, np.arange(len(labels)), 1, labels, scores, 200, fields=FIELDS, labels=LABELS)


def summarize(shipped: Reference, rows: NDArray[np.float64], labels: NDArray[np.int64]) -> Summary:
    return summaries.summarize(shipped, rows, np.arange(len(labels)) * ROWS, labels, np.linspace(0.4, 1.0, len(labels)))


def shown(stack: Summary) -> MessageSums:
    """Return the sums that a message of each window shows."""
    return MessageSums.stack([MessageSums.from_summaries(stack, slice(i, i + 1)) for i in range(len(stack.counts))])


def described(summary: Summary, shipped: Reference) -> dict[str, Any]:
    return drift_message.build_features(shown(stack_one(summary)), shipped)[0]


@st.composite
def parts(draw: st.DrawFn) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """One to five parts of none to four model windows, some values missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for windows in draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)):
        level, spread = draw(st.sampled_from([0.0, 3.0, -50.0])), draw(st.sampled_from([0.1, 2.0]))
        rows = rng.normal(level, spread, (windows * ROWS, 3))
        rows[rng.random(rows.shape) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = np.nan
        made.append((rows, rng.integers(0, 3, windows)))
    return made


@given(parts(), st.randoms())
@settings(deadline=None, max_examples=60)
def test_parts_merged_in_any_order_and_grouping_equal_the_whole(
    shipped: Reference, made: list[tuple[NDArray[np.float64], NDArray[np.int64]]], rng: object
) -> None:
    merged = [summarize(shipped, rows, labels) for rows, labels in made]
    while len(merged) > 1:
        rng.shuffle(merged)  # type: ignore[attr-defined]
        merged = [merged[0].merge(merged[1]), *merged[2:]]
    parts_together = merged[0]
    rows = np.concatenate([rows for rows, _ in made])
    whole = summarize(shipped, rows, np.concatenate([labels for _, labels in made]))
    for member in ("counts", "missing", "outside", "output"):
        np.testing.assert_array_equal(getattr(parts_together, member), getattr(whole, member))
    for name in ("correlation", "sampling_rate"):
        np.testing.assert_array_equal(parts_together.detectors[name], whole.detectors[name])
    origin = shipped.origin[:3]
    ours, theirs = parts_together.row_sums.moments(origin), whole.row_sums.moments(origin)
    np.testing.assert_array_equal(ours.n, theirs.n)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ours.m2, theirs.m2, rtol=1e-9, atol=1e-9)
    if len(rows):
        seen = ~np.isnan(rows)
        np.testing.assert_array_equal(ours.n[0], seen.sum(0))
        means = np.where(seen, rows, 0).sum(0) / np.maximum(seen.sum(0), 1)
        np.testing.assert_allclose(ours.mean[0], means, rtol=1e-9, atol=1e-12)
        squares = (np.where(seen, rows - means, 0) ** 2).sum(0)
        np.testing.assert_allclose(ours.m2[0], squares, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(parts_together.class_sums.n, whole.class_sums.n)
    np.testing.assert_allclose(parts_together.class_sums.total, whole.class_sums.total, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 1000), st.lists(st.integers(0, 200), max_size=6))
@settings(deadline=None, max_examples=60)
def test_rows_added_in_any_batches_give_the_same_bytes(shipped: Reference, seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    rows = np.round(rng.normal(0, 1, (200, 3)), 1)
    rows[rng.random(rows.shape) < 0.05] = np.nan
    rows[40:70, 1] = 0.5
    rows[rng.integers(0, 200, 8), 2] += 500.0
    whole, _ = summarize_rows(shipped, rows)
    pieces, tail = None, None
    for begin, end in pairwise(sorted({0, *cuts, 200})):
        pieces, tail = summarize_rows(shipped, rows[begin:end], pieces, tail)
    assert pieces is not None
    assert pieces.to_bytes() == whole.to_bytes()
    assert whole.longest[1] >= 30
    assert whole.spikes[2] > 0


def test_the_empty_summary_changes_nothing(shipped: Reference) -> None:
    first = summarize(shipped, readings(5, 1).features.astype(np.float64), readings(5, 1).labels)
    assert first.merge(Summary.empty(shipped)).to_bytes() == first.to_bytes()


def test_summaries_under_different_references_are_not_merged(shipped: Reference) -> None:
    with pytest.raises(ValueError, match="bins differ"):
        Summary.empty(shipped).merge(Summary.empty(reference(seed=2)))


def test_a_summary_survives_its_bytes(shipped: Reference) -> None:
    first = summarize(shipped, readings(5, 1).features.astype(np.float64), readings(5, 1).labels)
    again = Summary.from_bytes(first.to_bytes())
    assert again.to_bytes() == first.to_bytes()
    assert described(again, shipped) == described(first, shipped)


@pytest.mark.parametrize("damage", [b"", b"\x00", b"\x80", b"\xc1" * 9])
def test_damaged_bytes_are_a_value_error(damage: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Summary.from_bytes(damage)


def test_values_on_edges_and_limits_count_where_the_format_says(shipped: Reference) -> None:
    low, high, edge = shipped.low[0], shipped.high[0], shipped.edges[0, 10]
    column = np.array([low, high, edge, np.nextafter(low, -9), np.nextafter(high, 99), np.nan])
    rows = np.column_stack([column, np.zeros(6), np.zeros(6)])
    got, _ = summarize_rows(shipped, rows)
    assert got.counts[0, [0, 1, 12, 32, 33]].tolist() == [1, 1, 1, 1, 1]
    assert got.counts[0].sum() == 5
    assert got.missing.tolist() == [1, 0, 0]


def test_rows_outside_every_model_window_are_not_counted(shipped: Reference) -> None:
    rows = readings(5, 1).features.astype(np.float64)
    starts = np.array([5, 5 + 2 * ROWS])
    got = summaries.summarize(shipped, rows, starts, np.array([0, 1]), None)
    assert got.rows == 2 * ROWS
    covered = np.r_[5 : 5 + ROWS, 5 + 2 * ROWS : 5 + 3 * ROWS]
    np.testing.assert_allclose(got.row_sums.moments(shipped.origin[:3]).mean[0], rows[covered].mean(0))


def test_rows_of_overlapping_model_windows_are_counted_once(shipped: Reference) -> None:
    rows = readings(5, 1).features.astype(np.float64)
    got = summaries.summarize(shipped, rows, np.arange(0, 100, ROWS // 2), np.zeros(10, np.int64), None)
    assert got.rows == 110


def test_the_message_has_the_documented_members_and_stays_small(shipped: Reference) -> None:
    r = readings(5, 1)
    first = summarize(shipped, r.features.astype(np.float64), r.labels)
    got, output = described(first, shipped), drift_message.build_output(shown(stack_one(first)), shipped)[0]
    assert tuple(got) == FIELDS
    feature = got["x"]
    assert set(feature) == {"counts", "missing", "below", "above", "mean", "m2", "psi", "js", "ks", "w1"}
    assert len(feature["counts"]) == 32
    assert sum(feature["counts"]) + feature["below"] + feature["above"] == 200
    assert feature["mean"] == pytest.approx(r.features[:, 0].mean(), rel=1e-4)
    assert sum(output["counts"].values()) == 10
    assert set(output["counts"]) <= set(LABELS)
    assert len(json.dumps([got, output])) < 1500


def summarize_in_parts(
    used: Reference,
    rows: NDArray[np.float64],
    t: NDArray[np.int64],
    starts: NDArray[np.int64],
    labels: NDArray[np.int64],
    top: NDArray[np.float64],
    rng: np.random.Generator,
) -> Summary:
    """Summarize a drift window in up to three parts of whole model windows."""
    stack, tail = None, Tail.empty(3)
    for begin, end in pairwise(sorted({0, *rng.integers(0, len(starts), 2).tolist(), len(starts)})):
        part = slice(int(starts[begin]), int(starts[end - 1]) + used.window_rows)
        at = starts[begin:end] - part.start
        stats = window_statistics.compute_statistics(rows[part], at, used.window_rows, used.floor)
        named, scores = labels[begin:end], top[begin:end]
        spans = compute_spans(t[part], at, used.window_rows, tail.t)[None]
        stack, tail = summaries.summarize_windows(
            used, rows[part][None], spans, stats, named, scores, named, before=stack, tail=tail
        )
        tail = replace(tail, t=int(t[part][-1]))
    assert stack is not None
    return summaries.select_window(stack, 0)


@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.sampled_from(["plain", "coarse", "missing", "stuck", "wild"]),
    st.sampled_from([1, ROWS]),
)
@settings(deadline=None, max_examples=60)
def test_windows_summarized_at_once_have_the_bytes_of_one_after_another(
    shipped: Reference, by_row: Reference, seed: int, windows: int, how: str, window_rows: int
) -> None:
    used = shipped if window_rows > 1 else by_row
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(windows, 200, 3)).astype(np.float32).astype(np.float64)
    if how == "coarse":
        rows = np.round(rows)
    elif how == "missing":
        rows[rng.random(rows.shape) < rng.random()] = np.nan
    elif how == "stuck":
        rows[:, 30 : rng.integers(40, 200), 1] = 0.5
    elif how == "wild":
        rows[rng.random(rows.shape) < 0.02] *= 1000
    t = np.cumsum(rng.integers(0, 40_000, (windows, 200)), axis=1)
    starts = np.arange(0, 200, window_rows)
    labels = rng.integers(0, 3, (windows, len(starts)))
    top = rng.random((windows, len(starts)))
    top[rng.random(top.shape) < 0.1] = np.nan
    result = window_statistics.compute_statistics(
        rows.reshape(-1, 3),
        (np.arange(windows)[:, None] * 200 + starts).ravel(),
        window_rows,
        used.floor,
    )
    times = np.diff(t, axis=1) if window_rows == 1 else t[:, starts + window_rows - 1] - t[:, starts]
    stack, _ = summaries.summarize_windows(used, rows, times, result, labels.ravel(), top.ravel(), labels.ravel())
    for number in range(windows):
        first = summarize_in_parts(used, rows[number], t[number], starts, labels[number], top[number], rng)
        assert summaries.select_window(stack, number).to_bytes() == first.to_bytes()
        assert drift_message.build_features(shown(stack), used)[number] == described(first, used)


@given(st.sampled_from(["C", "F"]), st.integers(1, 3), st.lists(st.integers(0, 300), max_size=5))
def test_sums_have_the_same_bits_however_rows_lie_in_memory_and_are_cut(
    order: Literal["C", "F"], columns: int, cuts: list[int]
) -> None:
    rng = np.random.default_rng(columns)
    values, groups = (
        rng.normal(size=(300, columns)) * 10.0 ** rng.integers(-6, 6, 300)[:, None],
        rng.integers(0, 2, 300),
    )
    values[::7, 0] = np.nan
    whole = GroupSums.zeros(2, columns).add(Groups(groups, 2), values)
    parts = GroupSums.zeros(2, columns)
    for begin, end in pairwise([0, *sorted(cuts), 300]):
        parts = parts.add(Groups(groups[begin:end], 2), np.asarray(values[begin:end], order=order))
    assert parts.total.tobytes() == whole.total.tobytes()
    assert parts.squares.tobytes() == whole.squares.tobytes()
    assert parts.n.tolist() == whole.n.tolist()
    first, at_once = (
        GroupSums.zeros(1, columns),
        GroupSums.from_rows(np.asarray(values.reshape(3, 100, columns), order=order)),
    )
    for number in range(3):
        alone = first.add(Groups(np.zeros(100, np.int64), 1), values[100 * number : 100 * (number + 1)])
        assert at_once.total[number].tobytes() == alone.total.tobytes()
        assert at_once.squares[number].tobytes() == alone.squares.tobytes()
        assert at_once.n[number].tolist() == alone.n.tolist()


def test_no_reading_is_in_the_message(shipped: Reference) -> None:
    r = readings(5, 1)
    text = json.dumps(described(summarize(shipped, r.features.astype(np.float64), r.labels), shipped))
    for value in (*r.features.min(0), *r.features.max(0), *r.features[7]):
        assert f"{value:.4g}" not in text
