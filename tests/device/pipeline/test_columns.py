"""Result columns: one canonical form, which decodes to the same rows, times and labels."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.batch_parts import columns
from outstation.device.batch_parts.columns import encode_labels, encode_runs, encode_times
from outstation.ml.model.inference.scores import Labels, Scores
from outstation.protocol.wire.messages import ResultColumns
from outstation.protocol.wire.runs import JitteredTimes, LabelRun

NOW = 1_764_022_680_000_000


def array(values: list[int]) -> Any:
    return np.array(values, np.int64)


def read(row: Any, t: Any, label: Any = None) -> ResultColumns:
    return msgspec.json.decode(msgspec.json.encode({"row": row, "t": t, "label": label}), type=ResultColumns)


@pytest.mark.parametrize(
    ("values", "written"),
    [
        ([], []),
        ([7], [7]),
        ([7, 9], [7, 9]),
        ([7, 9, 11], [[7, 2, 3]]),
        ([7, 7, 7, 7], [[7, 0, 4]]),
        ([9, 6, 3], [[9, -3, 3]]),
        ([1, 2, 4, 8], [1, 2, 4, 8]),
        ([1, 2, 3, 50, 51, 52], [[1, 1, 3], [50, 1, 3]]),
        ([1, 2, 3, 5, 7], [[1, 1, 3], 5, 7]),
        ([1, 2, 3, 5, 7, 9], [[1, 1, 3], [5, 2, 3]]),
        ([5, 1, 2, 3, 9], [5, [1, 1, 3], 9]),
        ([-(2**63), 0, 2**63 - 1], [-(2**63), 0, 2**63 - 1]),
    ],
)
def test_three_or_more_in_a_row_are_a_run(values: list[int], written: list[Any]) -> None:
    assert msgspec.to_builtins(encode_runs(array(values))) == written


def test_times_that_jitter_are_offsets_from_a_grid() -> None:
    times = NOW + 10_000 * np.arange(50) + array([0, 3, -2, 7, 1] * 10)
    written = encode_times(times)
    assert isinstance(written, JitteredTimes)
    assert (written.first, written.step, written.offsets[0]) == (NOW, 10_000, 0)
    assert len(msgspec.json.encode(written)) < len(msgspec.json.encode(times.tolist())) / 4


def test_labels_that_repeat_are_counted() -> None:
    assert encode_labels(Labels.from_list(["up", "up", "up", "down", "up"])) == [LabelRun("up", 3), "down", "up"]


def runs_one_by_one(values: list[int]) -> list[Any]:
    """Return the canonical form as documented: from the left, the longest run that starts here."""
    items: list[Any] = []
    at = 0
    while at < len(values):
        end = at + 2
        while end < len(values) and values[end] - values[end - 1] == values[at + 1] - values[at]:
            end += 1
        run = end - at >= 3 and end <= len(values)
        items.append([values[at], values[at + 1] - values[at], end - at] if run else values[at])
        at = end if run else at + 1
    return items


STEPS = st.lists(st.tuples(st.integers(-3, 9), st.integers(1, 5)), max_size=30)
TIMES = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30)


@given(st.integers(1, 10**6), STEPS)
def test_rows_are_written_in_the_canonical_form(first: int, steps: list[tuple[int, int]]) -> None:
    values = np.cumsum([first, *(step for step, count in steps for _ in range(count))], dtype=np.int64)
    assert msgspec.to_builtins(encode_runs(values)) == runs_one_by_one(values.tolist())


@given(st.lists(st.integers(1, 2**53 - 1), max_size=40) | st.lists(st.integers(1, 6), max_size=40), st.data())
def test_any_rows_times_and_labels_read_back_as_they_were(rows: list[int], data: st.DataObject) -> None:
    n = len(rows)
    near = st.integers(NOW, NOW + 50)
    times = data.draw(st.lists(near | st.integers(-(2**63), 2**63 - 1), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.sampled_from(["", "up", "down", 'q"|\\', "é"]), min_size=n, max_size=n))
    columns = read(encode_runs(array(rows)), encode_times(array(times)), encode_labels(Labels.from_list(labels)))
    assert (columns.expand_rows(), columns.expand_times(), columns.expand_labels()) == (rows, times, labels)


@given(st.integers(3, 60), st.integers(0, 20_000), st.lists(st.integers(-400, 400), min_size=60, max_size=60))
def test_jittered_times_read_back_and_are_never_longer_than_a_list(n: int, step: int, noise: list[int]) -> None:
    times = NOW + step * np.arange(n) + array(noise[:n])
    written = encode_times(times)
    assert read([(1, 1, n)], written).expand_times() == times.tolist()
    assert len(msgspec.json.encode(written)) <= len(msgspec.json.encode(encode_runs(times)))
    assert len(msgspec.json.encode(written)) <= 17 * n + 2 + 34


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.sampled_from([0.5, float("nan"), 3.0, -1e30]))
def test_results_that_fit_in_any_case_never_exceed_the_message(seed: int, n: int, score: float) -> None:
    rng = np.random.default_rng(seed)
    is_regular, has_gaps = rng.random(2) < 0.5
    noise = rng.integers(0, 2**50, n)
    rows = np.arange(n, dtype=np.int64) if is_regular else np.cumsum(noise % 7 + 1)
    times = NOW + (np.arange(n, dtype=np.int64) * 1000 if is_regular else noise)
    labels = Labels.from_list(rng.choice(["up", 'q"|', "é"], n).tolist())
    drawn = np.array([0.0, float("nan"), -1234570000000000.0, -1.23457e-319, 1.5e300, float(rng.normal())])
    value = drawn[rng.integers(0, len(drawn), n)]
    missing = np.where(noise % 2 == 0, 0.123, 0).astype(np.float32) * has_gaps
    scores = Scores(np.zeros(n, np.int64), np.full(n, score), value, extra_columns={"value_x": value})
    for max_bytes in (600, 5000):
        count = min(n, columns.max_results(max_bytes, scores, labels, missing, rows, times))
        part = slice(0, count)
        listing = columns.build(scores, labels, missing, np.arange(count), rows[part], times[part])
        # Names of columns and the ends of runs have a reserve of their own.
        assert len(msgspec.json.encode(listing)) <= max_bytes + 300
