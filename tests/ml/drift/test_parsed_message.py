"""Parsed drift messages: read as they are, or refused as a whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.fleet.drift.merge import PerformanceEstimates
from outstation.ml.drift.reporting import parsed_message
from outstation.ml.drift.reporting.parsed_message import ExpectedPerformance
from outstation.ml.drift.reporting.timeline import MAX_POINTS, Timeline

T = (1_795_000_000_000_000, 1_795_000_060_000_000)
FIELD = {
    "counts": [1] * 32, "missing": 2, "below": 3, "above": 4, "mean": 0.5, "m2": 7.0, "state": "ok", "fault": None,
    "cusum": {"mean": [1.0, 2.0], "spread": [3.0, 0.0], "limit": 5.5},
}  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*FIELD, "limit", "score"]), inner),
    max_leaves=12,
)


def body(**changes: Any) -> dict[str, Any]:
    whole = {
        "features": {"ax": FIELD},
        "output": {
            "counts": {"PEN": 20},
            "state": "ok",
            "score": {"cusum": [0.5, 0.0], "limit": 5.0, "state": "drift"},
        },
        "joint": {"cusum": 1.5, "limit": 3.5, "state": "ok"},
        "estimate": {"accuracy": 0.9, "low": 0.8, "high": 1.0, "method": "cbpe"},
        "state": "drift",
    }
    return {**whole, **changes}


def test_a_whole_message_is_read() -> None:
    parsed = parsed_message.from_message(body(), T)
    assert parsed.fields["ax"].n == 39
    assert parsed.fields["ax"].histogram().tolist() == [3, *[1] * 32, 4]
    reported = {name: (s.state, s.mean, s.spread, s.limit) for name, s in parsed.subjects.items()}
    assert reported == {
        "ax": ("ok", 2.0, 3.0, 5.5),
        "output": ("ok", 0.0, 0.0, None),
        "score": ("drift", 0.5, 0.0, 5.0),
        "joint": ("ok", 1.5, 0.0, 3.5),
    }
    assert parsed.expected == ExpectedPerformance(0.9, 0.8, 1.0)


def test_an_expected_error_is_read_in_units_of_the_label() -> None:
    estimate = {"mae": 12.5, "mae_low": 11.0, "mae_high": 14.0, "rmse": 20.0, "method": "dle"}
    parsed = parsed_message.from_message(body(estimate=estimate), T)
    assert parsed.expected == ExpectedPerformance(12.5, 11.0, 14.0, is_error=True)


def with_further(**estimates: Any) -> dict[str, Any]:
    further = {name: {"state": "ok", "cusum": [1.0, 0], "limit": 5.0, "estimate": e} for name, e in estimates.items()}
    return body(output={"state": "ok", "further": further})


def test_estimates_of_further_outputs_are_read_and_those_that_labels_contradict_marked() -> None:
    wear = {"mae": 2.0, "mae_low": 1.0, "mae_high": 3.0, "outside": True}
    flags = {"accuracy": 0.7, "low": 0.6, "high": 0.8}
    parsed = parsed_message.from_message(with_further(wear=wear, flags=flags, pose=None), T)
    assert parsed.further_expected == {
        "wear": ExpectedPerformance(2.0, 1.0, 3.0, is_error=True, is_contradicted=True),
        "flags": ExpectedPerformance(0.7, 0.6, 0.8),
    }
    fleet = PerformanceEstimates()
    fleet.add(parsed, 3)
    other = PerformanceEstimates()
    other.add(parsed_message.from_message(with_further(wear={**wear, "mae": 6.0}), T), 1)
    fleet.merge(other)
    assert fleet.further["wear"].error == 3.0
    assert fleet.further["flags"].accuracy == pytest.approx(0.7)
    assert fleet.further["wear"].accuracy is None
    first, second = Timeline(), Timeline()
    for timeline, later in ((first, wear), (second, {**wear, "mae": 6.0})):
        timeline.add(parsed_message.from_message(with_further(wear=later, flags=flags), T))
    merged = first.points[0].merge(second.points[0]).further_expected
    assert (merged["wear"].value, merged["flags"].value) == (6.0, 0.7)


@pytest.mark.parametrize(
    "changed", [body(estimate={"mae": -1.0}), with_further(wear={"mae": -1.0}), with_further(wear={"mae_low": 1e101})]
)
def test_a_negative_or_endless_expected_error_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="mae"):
        parsed_message.from_message(changed, T)


def test_merged_points_show_the_largest_expected_error() -> None:
    small, large = (ExpectedPerformance(value, 0.0, 9.0, is_error=True) for value in (1.0, 2.0))
    assert small.find_worse(large) == large.find_worse(small) == large


def test_a_message_of_another_version_is_read() -> None:
    field = {name: value for name, value in FIELD.items() if name != "cusum"} | {"new": [1]}
    parsed = parsed_message.from_message(
        body(features={"ax": field}, joint=None, output={}, estimate={"error": 0.2}), T
    )
    assert set(parsed.subjects) == {"ax", "output"}
    assert parsed.expected is None


def test_fields_next_to_a_faulty_one_are_untested_and_not_learned() -> None:
    fields = {
        "ax": {**FIELD, "state": "fault"},
        "ay": {**FIELD, "state": "insufficient"},
        "az": {**FIELD, "state": "drift"},
    }
    parsed = parsed_message.from_message(body(features=fields, state="fault"), T)
    assert [parsed.subjects[name].state for name in fields] == ["fault", "untested", "drift"]


@given(st.dictionaries(st.sampled_from(["features", "output", "joint", "estimate"]), anything))
def test_other_content_is_read_or_refused(changes: dict[str, Any]) -> None:
    whole = body(**changes)
    try:
        parsed = parsed_message.from_message(whole, T)
    except ValueError:
        # Nothing but what was changed is a reason.
        assert changes
        return
    assert parsed.fields.keys() <= set(whole["features"])
    assert all(field.n >= 0 for field in parsed.fields.values())


@given(st.sampled_from(sorted(FIELD)), anything)
def test_a_field_with_a_strange_member_is_read_or_refused(name: str, value: Any) -> None:
    try:
        parsed = parsed_message.from_message(body(features={"ax": {**FIELD, name: value}}), T)
    except ValueError:
        return
    assert json.dumps(parsed.fields["ax"].histogram().tolist())


@pytest.mark.parametrize(
    "changes", [{"mean": 1e200}, {"m2": -1.0}, {"counts": []}, {"counts": [1] * 300}, {"below": -1}, {"missing": 2**50}]
)
def test_numbers_that_cannot_be_or_would_overflow_a_sum_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        parsed_message.from_message(body(features={"ax": {**FIELD, **changes}}), T)


def test_a_course_of_many_windows_keeps_its_ends_and_every_spell() -> None:
    line = Timeline()
    for i in range(5 * MAX_POINTS):
        state = "drift" if 1000 <= i < 1010 else "ok"
        span = (T[0] + i * 60_000_000, T[0] + (i + 1) * 60_000_000 - 1)
        line.add(parsed_message.from_message(body(features={"ax": {**FIELD, "state": state}}), span))
    assert line.points[0].t[0] == T[0]
    assert line.points[-1].t[1] == T[0] + 5 * MAX_POINTS * 60_000_000 - 1
    [(begin, end, goes_on)] = line.spells("ax", "drift")
    assert begin <= T[0] + 1000 * 60_000_000
    assert end >= T[0] + 1010 * 60_000_000 - 1
    assert not goes_on
    assert line.histograms["ax"]["drift"].windows == 10
    assert int(line.histograms["ax"]["ok"].counts.sum()) == (5 * MAX_POINTS - 10) * 39
