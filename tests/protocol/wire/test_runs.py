"""Run-length encoded result columns: accepted forms, and bounds on hostile messages."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.protocol.wire.messages import ResultColumns
from outstation.protocol.wire.runs import MAX_RESULTS

NOW = 1_764_022_680_000_000
MANY = [[1, 1, MAX_RESULTS]]


def read(**columns: Any) -> ResultColumns:
    return msgspec.json.decode(msgspec.json.encode({"row": [], "t": [], **columns}), type=ResultColumns)


def test_plain_numbers_and_runs_may_be_mixed() -> None:
    columns = read(
        row=[7, [10, 5, 3], 90],
        t=[[NOW, 20_000, 2], [NOW + 40_000, 0, 2], 0],
        label=["up", ["down", 3], "up"],
        score=[0.5, None, 1, 0.25, 0],
    )
    assert len(columns) == 5
    assert columns.expand_rows() == [7, 10, 15, 20, 90]
    assert columns.expand_times() == [NOW, NOW + 20_000, NOW + 40_000, NOW + 40_000, 0]
    assert columns.expand_labels() == ["up", "down", "down", "down", "up"]


def test_jittered_times_are_a_grid_with_offsets() -> None:
    columns = read(row=[[1, 1, 4]], t={"first": NOW, "step": 1000, "offsets": [0, -3, 12, 0]})
    assert columns.expand_times() == [NOW, NOW + 997, NOW + 2012, NOW + 3000]
    assert columns.expand_labels() is None


def test_repeated_labels_may_fill_a_message() -> None:
    columns = read(row=MANY, t=MANY, label=[["é" * 32, MAX_RESULTS]])
    assert columns.expand_labels() == ["é" * 32] * MAX_RESULTS


def test_a_column_without_results_is_an_empty_list() -> None:
    columns = read()
    assert (len(columns), columns.expand_rows(), columns.expand_times()) == (0, [], [])


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param({"row": [[1, 1, 10**18]]}, id="a quintillion rows"),
        pytest.param({"row": [[1, 1, MAX_RESULTS + 1]]}, id="one row too many in a run"),
        pytest.param({"row": [[1, 1, MAX_RESULTS], 1]}, id="one row too many in all"),
        pytest.param({"row": [[1, 1, 10_000]] * 10}, id="many long runs"),
        pytest.param({"row": [[1, 1, 2**64]]}, id="a count beyond 64 bits"),
        pytest.param({"row": [[1, 1, 0]], "t": []}, id="a run of none"),
        pytest.param({"row": [[1, 1, -3]]}, id="a negative count"),
        pytest.param({"row": [[1, 1, 3.5]]}, id="a broken count"),
        pytest.param({"row": [[1, 1, "3"]]}, id="a count in text"),
        pytest.param({"row": [[1, 1, True]]}, id="a count that is true"),
        pytest.param({"row": [[1, 1.5, 3]]}, id="a broken step"),
        pytest.param({"row": [[1.5, 1, 3]]}, id="a broken first row"),
        pytest.param({"row": [[1, 2**53, 2]]}, id="a step no double holds"),
        pytest.param({"row": [[0, 1, 3]]}, id="a run from row 0"),
        pytest.param({"row": [[3, -1, 4]]}, id="a run down to row 0"),
        pytest.param({"row": [[2**53 - 2, 1, 3]]}, id="a run past the last row"),
        pytest.param({"row": [[1, 2**53 - 1, 3]]}, id="a run far past the last row"),
        pytest.param({"row": [[1, 1]]}, id="a run of two numbers"),
        pytest.param({"row": [[1, 1, 3, 4]]}, id="a run of four numbers"),
        pytest.param({"row": [[[1, 1, 1], 1, 3]]}, id="a run of runs"),
        pytest.param({"row": [1, 1, [], 3]}, id="a run of nothing"),
        pytest.param({"row": {"first": 1, "step": 1, "offsets": [0, 0, 0]}}, id="jittered rows"),
        pytest.param({"row": [None, 2, 3]}, id="a row that is null"),
        pytest.param({"t": [[2**63 - 2, 1, 3]]}, id="times past 64 bits"),
        pytest.param({"t": [[-(2**63), -1, 3]]}, id="times before 64 bits"),
        pytest.param({"t": [[1, 1, 2]]}, id="too few times"),
        pytest.param({"t": [[1, 1, 4]]}, id="too many times"),
        pytest.param({"t": {"first": 1, "step": 1, "offsets": [0, 0]}}, id="too few offsets"),
        pytest.param({"t": {"first": 1, "step": 1, "offsets": [0, 0, 0.5]}}, id="a broken offset"),
        pytest.param({"t": {"first": 1, "step": 1, "offsets": [0, 0, 2**53]}}, id="an offset no double holds"),
        pytest.param({"t": {"first": 1, "step": 1, "offsets": [0] * (MAX_RESULTS + 1)}}, id="offsets without end"),
        pytest.param({"t": {"first": 2**63 - 3, "step": 1, "offsets": [0, 0, 1]}}, id="offsets past 64 bits"),
        pytest.param({"t": {"first": 1, "step": 1}}, id="no offsets"),
        pytest.param({"label": [["up", 10**18]]}, id="a quintillion labels"),
        pytest.param({"label": [["up", 2]]}, id="too few labels"),
        pytest.param({"label": [["up", 2], ["up", 2]]}, id="too many labels"),
        pytest.param({"label": [["up", 3, 1]]}, id="a label with a step"),
        pytest.param({"label": [[3, "up"]]}, id="a label run backwards"),
        pytest.param({"label": ["up", "up", ["x" * 5000, 1]]}, id="a label too long"),
        pytest.param({"row": MANY, "t": MANY, "label": [["x" * 4096, MAX_RESULTS]]}, id="67 MB of one label"),
        pytest.param({"row": MANY, "t": MANY, "label": [["é" * 33, MAX_RESULTS]]}, id="a byte a label too many"),
        pytest.param({"row": MANY, "t": MANY, "label": [["x" * 4096, 512]] * 32}, id="67 MB of many short runs"),
        pytest.param({"score": [[0.5, 3]]}, id="scores in runs"),
    ],
)
def test_an_invalid_column_is_refused_before_expansion(columns: dict[str, Any]) -> None:
    sent = msgspec.json.encode({"row": [[1, 1, 3]], "t": [[NOW, 1, 3]], **columns})
    tracemalloc.start()
    try:
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(sent, type=ResultColumns)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


WILD = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 3, 2**31, 2**53, 2**63, -(2**63), 10**18])
NESTED = st.recursive(
    WILD | st.none() | st.booleans() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["first", "step", "offsets"]), inner),
    max_leaves=12,
)


@given(row=NESTED, t=NESTED, label=NESTED)
def test_any_columns_are_refused_or_expand_to_one_length(row: Any, t: Any, label: Any) -> None:
    try:
        columns = msgspec.json.decode(msgspec.json.encode({"row": row, "t": t, "label": label}), type=ResultColumns)
    except msgspec.ValidationError:
        return
    rows, times, labels = columns.expand_rows(), columns.expand_times(), columns.expand_labels()
    assert len(rows) == len(times) == len(columns) <= MAX_RESULTS
    assert labels is None or len(labels) == len(columns)
    assert all(1 <= entry < 2**53 for entry in rows)
    assert all(-(2**63) <= entry < 2**63 for entry in times)
