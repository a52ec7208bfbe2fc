"""Intake protocol: each line becomes rows or is rejected with a reason, independent of its neighbours."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.protocol import MAX_LINE_BYTES, LineParser
from outstation.device.store.rows import PackedChunk, Rows, concatenate, pack_chunk
from tests.kit.stations import MACHINE, STREAMS, T0, WATCH

NOW_US = 1_764_022_680_000_000
GOOD = b'{"stream":"watch","ax":1,"ay":2}'


@dataclass
class Got:
    """Result of parsed lines: rows and texts by stream, in order; line → reason; lines with rows."""

    rows: dict[str, list[Rows]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)

    def chunks(self) -> dict[str, PackedChunk]:
        return {stream: pack_chunk(concatenate(parts)) for stream, parts in self.rows.items()}


def read(*calls: list[bytes], reader: LineParser | None = None) -> Got:
    """All lines through one reader, in as many calls."""
    reader, got, first = reader or LineParser(STREAMS), Got(), 1
    for lines in calls:
        for taken in reader.parse(lines, first, NOW_US):
            assert not got.bad.keys() & taken.rejected.keys()
            got.bad |= taken.rejected
            if taken.validated is not None and len(taken.validated.rows):
                got.rows.setdefault(taken.stream, []).append(taken.validated.rows)
                for texts in taken.validated.categories.values():
                    got.texts.setdefault(taken.stream, []).extend(texts)
                got.lines += taken.lines
        first += len(lines)
    return got


def reason(line: bytes) -> str:
    got = read([line])
    assert got.lines == [], f"{line[:80]!r} was taken"
    return got.bad[1]


def row(stream: str, **values: Any) -> bytes:
    return json.dumps({"stream": stream, **values}).encode()


WATCH_ROWS = st.builds(
    lambda t, ax: row("watch", ax=ax, ay=-1, **t),
    st.one_of(st.just({}), st.builds(lambda t: {"t": T0 + t}, st.integers(0, 9))),
    st.one_of(st.floats(-20, 20), st.integers(-20, 20), st.none(), st.booleans(), st.just("x"), st.just(2**70)),
)
MACHINE_ROWS = st.builds(
    lambda count, mode, more: row("machine", power=1.5, count=count, mode=mode, **more),
    st.one_of(st.integers(-(2**66), 2**66), st.floats(-3, 3), st.just(2.0)),
    st.one_of(st.text(max_size=3), st.none(), st.just("}"), st.just("{")),
    st.sampled_from([{}, {"heat": None}, {"heat": 1}, {"hot": 1}]),
)
COLUMNS = st.builds(
    lambda t, ax, ay: row("watch", columns={"t": [T0 + s for s in t], "ax": ax, "ay": ay}),
    *[st.lists(st.integers(0, 20), min_size=1, max_size=3)] * 3,
)
HALVES = st.sampled_from(
    [GOOD[:20], GOOD[20:], b'{"stream":"watch","ax":1', b'"ay":2}', GOOD + b"," + GOOD, b"{", b"}"]
)
NOISE = st.one_of(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), HALVES, st.just(b"[]"), st.just(b"{}"))
LINES = st.lists(
    st.one_of(st.just(GOOD), st.just(GOOD + b"\r"), WATCH_ROWS, MACHINE_ROWS, COLUMNS, NOISE), min_size=1, max_size=90
)


@given(LINES)
@example([GOOD, GOOD + b"," + GOOD, b'{"stream":"watch","ax":1', b'"ay":2}'])
@example([GOOD, GOOD, b'{"stream":"watch","ax":1,"ay":2},{"stream":"watch","ax":1', b'"ay":2}'])
@example(
    [row("machine", power=1, count=1, mode="a"), b'{"stream":"machine","power":1,"count":1,"mode":"}', b'{","x":1}']
)
@example([GOOD, GOOD, b"\x0b" + GOOD])
def test_every_line_is_taken_once_or_named_just_as_if_it_had_come_alone(lines: list[bytes]) -> None:
    together = read(lines)
    alone = read(*[[line] for line in lines])
    assert together.bad == alone.bad
    assert together.lines == alone.lines
    assert together.chunks() == alone.chunks()
    assert together.texts == alone.texts
    assert set(together.lines) | set(together.bad) == set(range(1, len(lines) + 1))


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=40))
def test_random_bytes_are_named_and_never_taken(lines: list[bytes]) -> None:
    got = read([GOOD, *lines])
    assert got.lines == [1]
    assert list(got.bad) == list(range(2, len(lines) + 2))


@settings(max_examples=30)
@given(st.integers(0, len(GOOD) - 1))
def test_half_a_line_is_named(cut: int) -> None:
    assert "JSON" in reason(GOOD[:cut] or b"x")


@pytest.mark.parametrize(
    ("line", "expected_reason"),
    [
        (b'{"stream":"wacth","ax":1,"ay":2}', "unknown stream 'wacth'; did you mean 'watch'?"),
        (b'{"ax":1,"ay":2}', 'no "stream" in this line'),
        (b'{"stream":"watch","ax":1}', "field 'ay' is missing"),
        (b'{"stream":"watch","ax":1,"columns":{"ax":[1],"ay":[2]}}', "'ax' is beside columns; a line holds one row"),
        (b'{"stream":"watch","ax":1,"ay":2,"az":3}', "'az' is not a field of stream watch; did you mean 'ay'?"),
        (b'{"stream":"watch","ax":null,"ay":2}', "ax: expected `float`, got `null`"),
        (b'{"stream":"watch","ax":"1","ay":2}', "ax: expected `float`, got `str`"),
        (b'{"stream":"watch","ax":true,"ay":2}', "ax: expected `float`, got `bool`"),
        (b'{"stream":"watch","ax":[1],"ay":2}', "ax: expected `float`, got `array`"),
        (b'{"stream":"watch","ax":{"x":1},"ay":2}', "ax: expected `float`, got `object`"),
        (b'{"stream":"watch","ax":1e400,"ay":2}', "ax: number out of range"),
        (b'{"stream":"watch","ax":NaN,"ay":2}', "NaN and Infinity are no JSON numbers; leave out an optional field"),
        (b'{"stream":"watch","ax":17,"ay":2}', "ax is above max 16"),
        (b'{"stream":"watch","ax":1180591620717411303424,"ay":2}', "ax is above max 16"),
        (b'{"stream":"watch","t":"now","ax":1,"ay":2}', "t: expected `float | null`, got `str`"),
        (b'{"stream":"watch","t":1764022680123,"ax":1,"ay":2}', "give seconds since 1970, not milliseconds"),
        (b"\xef\xbb\xbf" + GOOD, "a byte order mark before the line"),
        (b"\x00\x01\x02", "not text: binary data on a line protocol"),
        (b"\xff\xfe\x7b", "not text: binary data on a line protocol"),
        (b'{"stream":"machine","power":1,"count":1,"mode":"\xff"}', "not text"),
        (b"12", "not one JSON object on one line"),
        (b'[{"stream":"watch","ax":1,"ay":2}]', "not one JSON object on one line"),
        (GOOD + GOOD, "not one JSON object on one line"),
        (b'{"stream":"watch","x":' + b"[" * 100_000, "not one JSON object on one line"),
        (b'{"stream":"watch","columns":{"ax":' + b"[" * 100_000, "not one JSON object on one line"),
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_reason(line: bytes, expected_reason: str) -> None:
    assert expected_reason in reason(line)


@pytest.mark.parametrize(
    ("columns", "expected_reason"),
    [
        ({"ax": [1], "ay": [1, 2]}, "columns must be of one length of at least 1, these have [1, 2]"),
        ({"ax": [], "ay": []}, "columns must be of one length of at least 1, these have [0]"),
        ({}, "columns must be of one length of at least 1, these have []"),
        ({"t": [1, 2], "ax": [1], "ay": [1]}, "t has 2 values, 1 are needed"),
        ({"ax": [1]}, "field 'ay' is missing"),
        ({"ax": [1], "ay": [1], "az": [1]}, "'az' is not a field of this stream; did you mean 'ay'?"),
        ({"ax": 1, "ay": [1]}, "columns[...]: expected `array`, got `int`"),
        ({"ax": [[1]], "ay": [1]}, "row 1 of the columns: ax is no number"),
        ({"ax": [True], "ay": [1]}, "row 1 of the columns: ax is no number"),
        ([1], "columns: expected `object`, got `array`"),
    ],
)
def test_columns_that_are_none_are_named_with_their_reason(columns: Any, expected_reason: str) -> None:
    assert reason(row("watch", columns=columns)) == expected_reason


def test_valid_rows_of_columns_are_accepted_and_others_named() -> None:
    got = read([row("watch", columns={"t": [T0, T0 - 1, T0, T0], "ax": [1, 2, 99, None], "ay": [1, 2, 3, 4]})])
    assert got.lines == [1]
    assert [column.tolist() for column in got.rows["watch"][0].columns] == [[1], [1]]
    assert got.bad == {
        1: f"row 2 of the columns: t = {T0 - 1:.6f} runs backwards, {T0:.6f} came before; "
        "row 3 of the columns: ax is above max 16; row 4 of the columns: ax is missing"
    }


def packed(**columns: Any) -> dict[str, list[str]]:
    """Numpy arrays as the client sends them."""
    return {name: [c.dtype.str[1:], base64.b64encode(c.tobytes()).decode()] for name, c in columns.items()}


@given(
    st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(width=32) | st.just(np.nan)), min_size=1, max_size=40),
    st.sampled_from(["<f4", "<f8"]),
)
def test_packed_columns_are_taken_and_refused_as_the_same_columns_in_full(
    values: list[tuple[float, float]], kind: str
) -> None:
    ax, ay = (np.array(column, kind) for column in zip(*values, strict=True))
    t = T0 + np.arange(len(ax))
    full = {
        name: [None if v != v else 1e999 if v == np.inf else -1e999 if v == -np.inf else v for v in c.tolist()]
        for name, c in {"t": t, "ax": ax, "ay": ay}.items()
    }
    line = json.dumps({"stream": "watch", "columns": full}).replace("Infinity", "1e999").encode()
    in_full, as_bytes = read([line]), read([row("watch", packed=packed(t=t, ax=ax, ay=ay))])
    finite = bool(np.isfinite(ay[~np.isnan(ay)]).all())
    assert as_bytes.chunks() == in_full.chunks() if finite else len(as_bytes.bad) == 1
    assert as_bytes.bad.keys() == in_full.bad.keys()


def test_whole_numbers_packed_and_texts_in_full_make_one_row() -> None:
    columns = {"mode": ["idle", "busy"]}
    numbers = packed(power=np.array([1.5, 2.5]), count=np.array([2**53 + 1, -3]), heat=np.array([np.nan, 1], "<f4"))
    got = read([row("machine", columns=columns, packed=numbers)])
    assert got.bad == {}
    assert [c.tolist() for c in got.rows["machine"][0].columns[:2]] == [[1.5, 2.5], [2**53 + 1, -3]]
    assert got.texts["machine"] == ["idle", "busy"]


@pytest.mark.parametrize(
    ("members", "expected_reason"),
    [
        ({"packed": {"ax": ["f4", "AAAA"], "ay": ["f4", "AAAAAA=="]}}, "ax: 3 bytes are no f4 values of 4 bytes"),
        ({"packed": {"ax": ["f2", "AAAA"]}}, "packed[...][0]: invalid enum value 'f2'"),
        ({"packed": {"ax": ["f4", "A!"]}}, "packed[...][1]: invalid base64 encoded string"),
        ({"packed": {"ax": "AAAA"}}, "packed[...]: expected `array`, got `str`"),
        ({"packed": {}}, "columns must be of one length of at least 1, these have []"),
        (
            {"columns": {"ax": [1], "ay": [2]}, "packed": {"ax": ["i4", "AQAAAA=="]}},
            "'ax' is in columns and in packed; give it once",
        ),
        ({"packed": {"zz": ["i4", "AQAAAA=="]}}, "'zz' is not a field of this stream"),
        (
            {"packed": {"ax": ["i4", "AQAAAA=="], "ay": ["i4", "AQAAAAEAAAA="]}},
            "columns must be of one length of at least 1, these have [1, 2]",
        ),
    ],
)
def test_packed_columns_that_are_none_are_named_with_their_reason(
    members: dict[str, Any], expected_reason: str
) -> None:
    assert expected_reason in reason(row("watch", **members))


@pytest.mark.parametrize(
    "line",
    [
        GOOD,
        row("watch", packed={}),
        row("watch"),
        row("watch", columns={"ax": [1], "ay": [2]}, more=1),
        row("machine", columns={"power": [1], "count": [1], "mode": ["idle"]}),
        row("nowhere", columns={"ax": [1], "ay": [2]}),
        row("watch", columns={"ax": [1], "ay": [99]}),
        row("watch", packed={"ax": ["f4", "AAAA"]}),
        b'{"stream":"machine","stream":"watch","columns":{"ax":[1],"ay":[2]}}',
        b'{"stream":"watch","columns":{"ax":[1],"ay":[2],"ax":[3]}}',
        b'{"labels":"exercise","row":1,"label":"idle"}',
        b"{",
    ],
)
def test_a_line_behind_columns_is_taken_or_named_as_if_it_had_come_alone(line: bytes) -> None:
    before = row("watch", packed=packed(ax=np.array([1.0]), ay=np.array([2.0])))
    alone, behind = read([line]), read([before, before, line])
    assert behind.bad == {2 + number: why for number, why in alone.bad.items()}
    assert behind.lines == [1, 2, *(2 + number for number in alone.lines)]


def test_a_packed_column_that_is_there_twice_is_refused() -> None:
    line = b'{"stream":"watch","packed":{"ax":["i4","AQAAAA=="],"ay":["i4","AQAAAA=="],"ax":["i4","AgAAAA=="]}}'
    assert "ax" in reason(line)


def test_many_bad_rows_of_columns_are_counted_and_not_all_named() -> None:
    text = reason(row("watch", columns={"ax": [99] * 100, "ay": [1] * 100}))
    assert text.count("above max") == 5
    assert text.endswith("; and 95 more rows")


def test_a_line_of_ten_megabytes_is_refused_by_its_length() -> None:
    long = b'{"stream":"watch","ax":1,"ay":' + b"1" * (10 << 20) + b"}"
    assert reason(long) == f"line of {len(long)} bytes, the limit is {MAX_LINE_BYTES}; split it"
    padded = b'{"stream":"watch","ax":1,"ay":2' + b" " * MAX_LINE_BYTES + b"}"
    assert read([GOOD, GOOD, padded]).lines == [1, 2]


def test_lines_may_end_as_on_windows() -> None:
    assert read([GOOD + b"\r"] * 3).lines == [1, 2, 3]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"stream":"machine","stream":"watch","ax":1,"ay":2}', "stream"),
        (b'{"stream":"watch","ax":1,"ax":2,"ay":2}', "ax"),
        (b'{"stream":"watch","ax":1,"a\\u0078":2,"ay":2}', "ax"),
        (b'{"stream":"watch","t":null,"t":1764022680,"ax":1,"ay":2}', "t"),
        (b'{"stream":"machine","power":1,"count":1,"mode":"a:b","mode":"a"}', "mode"),
        (b'{"stream":"machine","power":1,"power":2,"count":1,"mode":"\\u003a"}', "power"),
        (b'{"stream":"machine","power":1,"count":1,"mode":"a","heat":1,"heat":null}', "heat"),
        (b'{"stream":"watch","columns":{"ax":[1],"ay":[2],"ax":[3]}}', "ax"),
        (b'{"stream":"watch","columns":{"ax":[1],"ay":[2]},"columns":{"ax":[1],"ay":[3]}}', "columns"),
        (b'{"stream":"watch","columns":{"ax":[{"x":1,"x":2}],"ay":[2]}}', "x"),
    ],
)
def test_a_line_with_a_key_twice_is_named_alone_and_in_a_run(line: bytes, key: str) -> None:
    text = f"duplicate key {key!r} in one object; two readers could see different values"
    good = row("machine", power=1, count=1, mode="a") if b"machine" in line else GOOD
    assert read([good, good, line, good, good]).bad == {3: text}
    assert read([good], [good] * 50 + [line] + [good] * 50).bad == {52: text}
    assert reason(line) == text


def test_colons_in_text_do_not_confuse_the_key_count() -> None:
    more: list[dict[str, Any]] = [{}, {"heat": None}, {"heat": 1}]
    lines = [
        row("machine", power=1, count=i, mode=mode, **more[i % 3]) for i in range(60) for mode in ("a:b", ":", "\\:")
    ]
    got = read([row("machine", power=1, count=0, mode="a")], lines)
    assert got.bad == {}
    assert got.lines == list(range(1, 182))
    heat = concatenate(got.rows["machine"]).columns[3]
    assert [value == 1 for value in heat.tolist()] == [False] + [i % 3 == 2 for i in range(60) for _ in range(3)]


def test_rows_with_and_without_a_time_may_take_turns() -> None:
    lines = [row("watch", ax=1, ay=1, t=T0 - 50), GOOD, row("watch", ax=1, ay=1, t=T0 - 40), GOOD]
    got = read([GOOD], lines)
    times = concatenate(got.rows["watch"]).t.tolist()
    assert times == [NOW_US, round((T0 - 50) * 1e6), NOW_US, round((T0 - 40) * 1e6), NOW_US]


def test_time_runs_on_its_own_in_each_stream_of_a_connection() -> None:
    late = row("watch", ax=1, ay=1, t=T0 + 100)
    early = row("machine", power=1, count=1, mode="on", t=T0)
    got = read([late, early, row("watch", ax=1, ay=1, t=T0)])
    assert got.lines == [1, 2]
    assert "runs backwards" in got.bad[3]


def test_a_row_refused_for_its_value_does_not_move_the_time_on() -> None:
    got = read([GOOD], [row("watch", ax=99, ay=1, t=T0 + 100), row("watch", ax=1, ay=1, t=T0)])
    assert got.lines == [1, 3]


def test_streams_may_be_mixed_line_by_line() -> None:
    machine = row("machine", power=1, count=7, mode="on", heat=None)
    got = read([GOOD, machine] * 500)
    assert {stream: len(concatenate(parts)) for stream, parts in got.rows.items()} == {"watch": 500, "machine": 500}
    assert got.texts == {"machine": ["on"] * 500}
    assert got.bad == {}


def test_five_invalid_lines_among_ten_thousand_are_rejected() -> None:
    lines = [GOOD] * 10_000
    for number in (1, 2, 5_000, 9_999, 10_000):
        lines[number - 1] = b'{"stream":"watch","ax":"?","ay":2}'
    got = read(lines)
    assert sorted(got.bad) == [1, 2, 5_000, 9_999, 10_000]
    assert sorted([*got.lines, *got.bad]) == list(range(1, 10_001))


def test_a_field_may_have_any_name_that_the_config_allows() -> None:
    names = ["a.b", "class", "_", "__init__", "__slots__", "__dict__", "self", "Row", "A" * 64, "msgspec", "kw_only"]
    stream = StreamConfig(fields=[FieldConfig(name=name) for name in names])
    reader = LineParser({"odd": stream})
    lines = [row("odd", **dict.fromkeys(names, 1))] * 3 + [row("odd", columns={name: [1] for name in names})]
    assert read(lines, reader=reader).lines == [1, 2, 3, 4]


def test_whole_numbers_keep_all_their_digits() -> None:
    lines = [row("machine", power=1, count=n, mode="on") for n in (2**63 - 1, 2**53 + 1, 3.0, 2**63, 0.5)]
    got = read(lines[:1], lines)
    assert concatenate(got.rows["machine"]).columns[1].tolist() == [2**63 - 1, 2**63 - 1, 2**53 + 1, 3]
    assert sorted(got.bad) == [5, 6]


def test_the_streams_of_these_tests_are_valid() -> None:
    assert [f.name for f in WATCH.fields] == ["ax", "ay"]
    assert [f.type for f in MACHINE.fields] == ["f64", "i64", "category", "f32"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["t", "ax", "ay", "x:"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["t", "ax", "ay", "az", "stream"]), st.lists(JSON, max_size=3) | JSON))
def test_columns_of_anything_are_taken_in_part_or_named(columns: dict[str, Any]) -> None:
    got = read([GOOD, row("watch", columns=columns)])
    assert 2 in got.lines or 2 in got.bad


@given(st.dictionaries(st.sampled_from(["t", "power", "count", "mode", "heat", "stream", "columns"]), JSON))
def test_a_row_of_anything_is_taken_or_named(values: dict[str, Any]) -> None:
    got = read([json.dumps({"stream": "machine", **values}).encode()])
    assert sorted([*got.lines, *(n for n in got.bad if n not in got.lines)]) == [1]
