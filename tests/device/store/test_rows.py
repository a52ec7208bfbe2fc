"""Rows: packing is lossless, and input that is no reading is rejected with a reason."""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from msgspec.structs import replace

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.store.rows import (
    BlockLimits,
    PackedChunk,
    RawColumns,
    Rows,
    ValidatedRows,
    concatenate,
    pack_chunk,
    unpack_chunk,
    validate_columns,
)
from outstation.foundation.errors import RowRejected

FIELDS = [
    FieldConfig(name="small", type="f32"),
    FieldConfig(name="exact", type="f64"),
    FieldConfig(name="count", type="i64"),
    FieldConfig(name="mode", type="category"),
]
DTYPES = ["<f4", "<f8", "<i8", "<u2"]
NOW_US = 1_764_022_680_000_000
INT64 = st.integers(-(2**63), 2**63 - 1)


@st.composite
def any_rows(draw: st.DrawFn, times: st.SearchStrategy[int] = INT64) -> Rows:
    n = draw(st.integers(1, 20))
    t = np.array(draw(st.lists(times, min_size=n, max_size=n)), np.int64)
    return Rows(t, tuple(draw(hn.arrays(dtype, n)) for dtype in DTYPES))


def validate_field(field: FieldConfig, *values: Any, **others: Any) -> ValidatedRows:
    """`values` of a stream with this one field, checked."""
    return validate_columns(
        RawColumns(len(values), others.pop("t", None), {field.name: list(values)}),
        StreamConfig(fields=[field]),
        NOW_US,
        None,
        show_values=True,
    )


def reason(field: FieldConfig, value: Any) -> str:
    """Why `value` alone was refused between two good values."""
    good = "on" if field.type == "category" else 1
    checked = validate_field(field, good, value, good)
    assert list(checked.rejected) == [1], f"{value!r} was taken"
    assert len(checked.rows) == 2
    return checked.rejected[1]


def same(a: Rows, b: Rows) -> bool:
    """Bit by bit, so that NaN equals itself and -0.0 is not 0.0."""
    return len(a) == len(b) and pack_chunk(a) == pack_chunk(b)


@given(any_rows())
def test_unpacking_gives_back_every_bit(rows: Rows) -> None:
    assert same(unpack_chunk(pack_chunk(rows), FIELDS), rows)


@given(any_rows(st.integers(NOW_US, NOW_US + 2**32 - 1)))
def test_times_that_only_grow_a_little_take_four_bytes_each(rows: Rows) -> None:
    rows = Rows(np.sort(rows.t), rows.columns)
    assert pack_chunk(rows).time_bytes == 4
    assert same(unpack_chunk(pack_chunk(rows), FIELDS), rows)


@pytest.mark.parametrize("t", [[5, 3], [0, 2**32], [0, -1], [-(2**63), 2**63 - 1]])
def test_times_that_run_back_or_span_more_than_71_minutes_take_eight_bytes(t: list[int]) -> None:
    rows = Rows(np.array(t, np.int64), ())
    assert pack_chunk(rows).time_bytes == 8
    assert unpack_chunk(pack_chunk(rows), []).t.tolist() == t


@given(any_rows(), st.data())
def test_one_flipped_bit_anywhere_in_a_chunk_is_detected(rows: Rows, data: st.DataObject) -> None:
    packed = pack_chunk(rows)
    bit = data.draw(st.integers(0, 8 * len(packed.data) - 1))
    flipped = bytearray(packed.data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="CRC"):
        unpack_chunk(replace(packed, data=bytes(flipped)), FIELDS)


@pytest.mark.parametrize("wrong", [{"first_t": 7}, {"n": 2}, {"time_bytes": 8}, {"crc": 0}])
def test_a_chunk_with_a_changed_time_or_count_is_detected(wrong: dict[str, Any]) -> None:
    packed = pack_chunk(Rows(np.array([1, 2, 3]), (np.zeros(3, "<f4"),)))
    with pytest.raises(ValueError, match="CRC"):
        unpack_chunk(replace(packed, **wrong), FIELDS[:1])


def test_a_chunk_is_not_read_with_the_fields_of_another_stream() -> None:
    packed = pack_chunk(Rows(np.array([1, 2, 3]), (np.zeros(3, "<f4"),)))
    with pytest.raises(ValueError, match="fields"):
        unpack_chunk(packed, FIELDS)


@given(any_rows(), st.data())
def test_the_digest_is_the_same_however_rows_were_cut_into_chunks(rows: Rows, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows)), max_size=5)) | {0, len(rows)})
    parts = [rows.slice(a, b) for a, b in pairwise(cuts)]
    stored = [unpack_chunk(pack_chunk(part), FIELDS) for part in parts]
    assert same(concatenate(stored), rows)


@pytest.mark.parametrize(
    ("field", "value", "expected_reason"),
    [
        (FieldConfig(name="ax"), "fast", "ax = 'fast' is no number"),
        (FieldConfig(name="ax"), "1.5", "ax = '1.5' is no number"),
        (FieldConfig(name="ax"), True, "ax = 'True' is no number"),
        (FieldConfig(name="ax"), [1.0], "ax = '[1.0]' is no number"),
        (FieldConfig(name="ax"), {}, "ax = '{}' is no number"),
        (FieldConfig(name="ax"), None, "ax is missing"),
        (FieldConfig(name="ax"), float("nan"), "ax = nan is no finite number"),
        (FieldConfig(name="ax", optional=True), float("nan"), "ax = nan is no finite number"),
        (FieldConfig(name="ax", optional=True), "", "ax = '' is no number"),
        (FieldConfig(name="ax"), float("inf"), "ax = inf is no finite number"),
        (FieldConfig(name="ax"), float("-inf"), "ax = -inf is no finite number"),
        (FieldConfig(name="ax"), 10**400, "ax = inf is no finite number"),
        (FieldConfig(name="ax"), 3.41e38, "ax = 3.41e+38 is too large for f32"),
        (FieldConfig(name="ax", unit="g", min=-16, max=16), 16.5, "ax = 16.5 g is above max 16"),
        (FieldConfig(name="ax", unit="g", min=-16, max=16), -17, "ax = -17 g is below min -16"),
        (FieldConfig(name="hot", type="f64", max=16), 16.0000001, "hot = 16.0000001 is above max 16"),
        (FieldConfig(name="n", type="i64"), 1.5, "n = 1.5 is no whole number of 64 bits"),
        (FieldConfig(name="n", type="i64"), float("nan"), "n = nan is no whole number of 64 bits"),
        (FieldConfig(name="n", type="i64"), float("inf"), "n = inf is no whole number of 64 bits"),
        (FieldConfig(name="n", type="i64"), 2**63, "n = 9223372036854775808 is no whole number of 64 bits"),
        (FieldConfig(name="n", type="i64"), 2.0**60, "n = 1.152921504606847e+18 is no whole number of 64 bits"),
        (FieldConfig(name="n", type="i64"), True, "n = 'True' is no number"),
        (FieldConfig(name="n", type="i64"), None, "n is missing"),
        (FieldConfig(name="n", type="i64", min=0), -1, "n = -1 is below min 0"),
        (FieldConfig(name="mode", type="category"), 3, "mode = '3' is no category: text of 1-64 characters"),
        (FieldConfig(name="mode", type="category"), "", "mode = '' is no category: text of 1-64 characters"),
        (
            FieldConfig(name="mode", type="category"),
            "\udcff",
            "mode = '\\udcff' is no category: text of 1-64 characters",
        ),
        (FieldConfig(name="mode", type="category"), None, "mode is missing"),
    ],
)
def test_an_invalid_value_is_rejected_with_a_reason_and_others_stay(
    field: FieldConfig, value: Any, expected_reason: str
) -> None:
    assert reason(field, value) == expected_reason


def test_a_rejected_reading_is_in_no_reason_by_default() -> None:
    """Reasons go to journals and to files beside the rejected ones."""
    pulse, who = FieldConfig(name="pulse", max=250), FieldConfig(name="who", type="category")
    fields = [pulse, FieldConfig(name="n", type="i64"), who]
    planted: list[dict[str, Any]] = [{"pulse": 731.129}, {"pulse": "731.129"}, {"n": 731.5}, {"who": "731" * 30}]
    for values in planted:
        raw = RawColumns(1, None, {"pulse": [1.0], "n": [1], "who": ["x"]} | {k: [v] for k, v in values.items()})
        for show_values in (False, True):
            checked = validate_columns(raw, StreamConfig(fields=fields), NOW_US, None, show_values=show_values)
            assert ("731" in checked.rejected[0]) is show_values, values


def test_a_category_has_at_most_64_characters() -> None:
    field = FieldConfig(name="mode", type="category")
    assert validate_field(field, "x" * 64).categories == {0: ["x" * 64]}
    assert "64 characters" in reason(field, "x" * 65)


@pytest.mark.parametrize("kind", ["f32", "f64", "i64"])
def test_a_truth_value_among_numbers_is_not_taken_for_one(kind: Any) -> None:
    checked = validate_field(FieldConfig(name="x", type=kind), 1, True, 2)
    assert list(checked.rejected) == [1]
    assert checked.rows.columns[0].tolist() == [1, 2]


def test_integers_keep_all_64_bits_in_a_mixed_column() -> None:
    checked = validate_field(FieldConfig(name="n", type="i64"), 2**63 - 1, -(2**63), 2**53 + 1, 3.0, 2**70)
    assert checked.rows.columns[0].tolist() == [2**63 - 1, -(2**63), 2**53 + 1, 3]
    assert list(checked.rejected) == [4]


def test_missing_optional_values_are_nan_or_category_zero() -> None:
    fields = [FieldConfig(name="x", optional=True), FieldConfig(name="m", type="category", optional=True)]
    checked = validate_columns(
        RawColumns(2, None, {"x": [None, 1], "m": [None, "on"]}), StreamConfig(fields=fields), NOW_US, None
    )
    assert np.isnan(checked.rows.columns[0]).tolist() == [True, False]
    assert checked.categories == {1: ["", "on"]}
    left_out = validate_columns(RawColumns(2, None, {}), StreamConfig(fields=fields), NOW_US, None)
    assert np.isnan(left_out.rows.columns[0]).all()
    assert left_out.categories == {1: ["", ""]}


@pytest.mark.parametrize(
    ("values", "t", "expected_reason"),
    [
        ({"ax": [1]}, None, "field 'ay' is missing"),
        ({"ax": [1], "ay": [1], "az": [1]}, None, "'az' is not a field of this stream; did you mean 'ay'?"),
        ({"ax": [1], "ay": [1, 2]}, None, "field 'ay' has 2 values, 1 are needed"),
        ({"ax": [1], "ay": [1]}, [1, 2], "t has 2 values, 1 are needed"),
    ],
)
def test_columns_that_do_not_fit_the_stream_are_refused_as_a_whole(values: Any, t: Any, expected_reason: str) -> None:
    stream = StreamConfig(fields=[FieldConfig(name="ax"), FieldConfig(name="ay")])
    with pytest.raises(RowRejected, match=expected_reason.replace("?", r"\?")):
        validate_columns(RawColumns(1, t, values), stream, NOW_US, None)


@pytest.mark.parametrize(
    ("t", "expected_reason"),
    [
        (-1.0, "t = -1 is before 1970"),
        (1_764_022_680_000, "t = 1.76402268e+12 is after 2100; give seconds since 1970, not milliseconds"),
        (float("nan"), "t = nan is no finite number"),
        (float("inf"), "t = inf is no finite number"),
        (10**400, "t = inf is no finite number"),
        ("now", "t = 'now' is no number"),
        (False, "t = 'False' is no number"),
    ],
)
def test_a_time_that_is_none_is_refused_with_its_reason(t: Any, expected_reason: str) -> None:
    checked = validate_field(FieldConfig(name="x"), 1, 2, t=[t, 1_764_022_680.5])
    assert checked.rejected == {0: expected_reason}
    assert checked.rows.t.tolist() == [1_764_022_680_500_000]


def test_times_that_run_backwards_are_rejected() -> None:
    checked = validate_field(FieldConfig(name="x"), 1, 2, 3, 4, 5, t=[10, 30, 20, 30, 31])
    assert checked.rejected == {2: "t = 20.000000 runs backwards, 30.000000 came before"}
    assert checked.rows.t.tolist() == [10_000_000, 30_000_000, 30_000_000, 31_000_000]
    assert checked.latest_us == 31_000_000


def test_time_runs_on_from_the_producers_last_rows() -> None:
    raw = RawColumns(2, [10, 30], {"x": [1, 2]})
    checked = validate_columns(raw, StreamConfig(fields=[FieldConfig(name="x")]), NOW_US, 20_000_000)
    assert checked.rejected == {0: "t = 10.000000 runs backwards, 20.000000 came before"}


def test_the_time_of_a_refused_row_does_not_hold_back_the_rows_after_it() -> None:
    checked = validate_field(FieldConfig(name="x", max=5), 1, 9, 2, t=[10, 99, 11])
    assert list(checked.rejected) == [1]
    assert checked.latest_us == 11_000_000


def test_rows_without_a_time_get_the_current_time() -> None:
    checked = validate_field(FieldConfig(name="x"), 1, 2, 3, t=[10, None, 11])
    assert checked.rows.t.tolist() == [10_000_000, NOW_US, 11_000_000]
    assert checked.latest_us == 11_000_000
    assert validate_field(FieldConfig(name="x"), 1).rows.t.tolist() == [NOW_US]
    assert validate_field(FieldConfig(name="x"), 1).latest_us is None


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_what_was_taken_once_is_taken_again_when_it_comes_back_as_f32(value: float, low: float, high: float) -> None:
    field = FieldConfig(name="x", min=min(low, high), max=max(low, high))
    once = validate_field(field, value)
    assume(not once.rejected)
    back = once.rows.columns[0].tolist()
    again = validate_field(field, *back)
    assert again.rejected == {}
    assert len(back) == 1
    assert again.rows.columns[0].tolist() == back


@given(
    st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3)), min_size=1),
    st.sampled_from(["f32", "f64", "i64", "category"]),
    st.booleans(),
)
def test_each_row_is_either_taken_or_named(values: list[Any], kind: Any, optional: bool) -> None:
    field = FieldConfig(name="x", type=kind, optional=optional and kind != "i64")
    checked = validate_field(field, *values)
    assert len(checked.rows) + len(checked.rejected) == len(values)
    alone = [validate_field(field, value) for value in values]
    assert checked.rejected == {i: one_alone.rejected[0] for i, one_alone in enumerate(alone) if one_alone.rejected}
    remaining = [one_alone.rows for one_alone in alone if not one_alone.rejected]
    if remaining:
        assert same(checked.rows, concatenate(remaining))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=8),
    st.tuples(st.none() | st.floats(-5, 0, width=32), st.none() | st.floats(0, 5, width=32)),
    st.sampled_from(["<f4", "<f8"]),
    st.sampled_from(["f32", "f64"]),
)
def test_a_numpy_column_is_judged_as_its_values_one_by_one(
    values: list[float], limits: tuple[float | None, float | None], dtype: str, kind: Any
) -> None:
    field = FieldConfig(name="x", type=kind, min=limits[0], max=limits[1])
    raw = RawColumns(len(values), None, {"x": np.array(values, dtype)})
    together = validate_columns(raw, StreamConfig(fields=[field]), NOW_US, None, show_values=True)
    alone = [validate_field(field, value) for value in values]
    assert together.rejected == {i: one_alone.rejected[0] for i, one_alone in enumerate(alone) if one_alone.rejected}
    assert together.rows.columns[0].dtype == alone[0].rows.columns[0].dtype
    remaining = [one_alone.rows for one_alone in alone if not one_alone.rejected]
    if remaining:
        assert same(together.rows, concatenate(remaining))


@given(
    hn.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-6, 6, width=32)),
    st.lists(st.tuples(st.none() | st.floats(-5, 0), st.none() | st.floats(0, 5)), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.sampled_from([np.nan, np.inf, -np.inf])), max_size=2),
    st.booleans(),
    st.lists(st.integers(-2, 12), min_size=5, max_size=5),
)
def test_a_block_is_judged_as_its_columns_one_by_one(
    block: Any, limits: list[tuple[float | None, float | None]], odd: list[tuple[int, int, float]], whole: bool, t: Any
) -> None:
    fields, n = len(block), block.shape[1]
    for row, column, value in odd:
        if row < fields and column < n:
            block[row, column] = value
    stream = StreamConfig(
        fields=[
            FieldConfig(name=f"x{i}", min=low, max=high, optional=whole)
            for i, (low, high) in enumerate(limits[:fields])
        ]
    )
    times = np.array(t[:n], np.int64) * 1_000_000
    raw = RawColumns(n, times, dict(zip(["x0", "x1", "x2"], block, strict=False)), nan_is_missing=True, t_in_us=True)
    alone = validate_columns(raw, stream, NOW_US, 1_000_000, show_values=True)
    known, as_block = BlockLimits.from_fields(stream.fields), replace(raw, block=block)
    assert known is not None
    together = validate_columns(as_block, stream, NOW_US, 1_000_000, show_values=True, limits=known)
    assert (together.rejected, together.latest_us) == (alone.rejected, alone.latest_us)
    assert len(together.rows) == len(alone.rows)
    assert not len(alone.rows) or same(together.rows, alone.rows)
    assert known.accept(as_block) == (
        np.isfinite(block).all() and all("x" not in why for why in alone.rejected.values())
    )


@pytest.mark.parametrize("names", [["b", "a"], ["a"], ["a", "c"]])
def test_a_block_of_other_columns_is_not_taken_as_it_is(names: list[str]) -> None:
    limits = BlockLimits.from_fields([FieldConfig(name="a"), FieldConfig(name="b")])
    assert limits is not None
    block = np.ones((len(names), 2), np.float32)
    assert not limits.accept(RawColumns(2, None, dict(zip(names, block, strict=True)), block=block))


@given(st.lists(st.integers(-2, 12), min_size=1, max_size=8), st.integers(0, 10))
def test_times_in_order_are_judged_as_among_others_that_are_not(seconds: list[int], after: int) -> None:
    stream, n = StreamConfig(fields=[FieldConfig(name="x")]), len(seconds)
    checked = validate_columns(
        RawColumns(n, [float(s) for s in seconds], {"x": [1.0] * n}), stream, NOW_US, after * 1_000_000
    )
    # A last row that is refused has each of the others looked at by itself.
    looked = validate_columns(
        RawColumns(n + 1, [*seconds, -1.0], {"x": [1.0] * (n + 1)}), stream, NOW_US, after * 1_000_000
    )
    assert checked.rejected == {index: why for index, why in looked.rejected.items() if index < n}
    assert checked.rows.t.tolist() == looked.rows.t.tolist()
    assert checked.latest_us == looked.latest_us


def test_numpy_columns_are_taken_as_they_are() -> None:
    stream = StreamConfig(fields=[FieldConfig(name="x"), FieldConfig(name="n", type="i64")])
    raw = RawColumns(2, np.array([1.0, 2.0]), {"x": np.array([1.5, 2.5]), "n": np.array([7, 8])})
    checked = validate_columns(raw, stream, NOW_US, None)
    assert checked.rejected == {}
    assert [column.tolist() for column in checked.rows.columns] == [[1.5, 2.5], [7, 8]]


@given(
    n=st.integers(-2, 40) | INT64,
    first_t=INT64 | st.just(2**70),
    time_bytes=st.sampled_from([4, 8, 0, -1, 2**40]),
    data=st.binary(max_size=200),
    crc=st.none() | st.integers(0, 2**32 - 1),
)
def test_any_bytes_are_unpacked_or_raise_a_value_error(
    n: int, first_t: int, time_bytes: int, data: bytes, crc: int | None
) -> None:
    # Without a CRC of its own the chunk gets the right one: damage before it was computed.
    fits = all(-(2**63) <= value < 2**63 for value in (n, first_t, time_bytes))
    right = zlib.crc32(data, zlib.crc32(struct.pack("<qqq", n, first_t, time_bytes))) if fits else 0
    try:
        rows = unpack_chunk(PackedChunk(n, first_t, time_bytes, data, right if crc is None else crc), FIELDS)
    except ValueError:
        return
    assert len(rows) == n
    assert all(len(column) == n for column in rows.columns)
