"""File reader: every line of a file becomes a row or is rejected by number, from any position."""

from __future__ import annotations

import csv
import io
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.file_reader import MAX_BLOCK_ROWS, FileBlock, read_blocks
from outstation.device.store.rows import validate_columns
from outstation.foundation.errors import RowRejected, UsageError
from outstation.ml.datasets.formats import open_file
from tests.kit.stations import MACHINE, T0, WATCH

HEADER = "t,ax,ay\n"


def read_text(text: str | bytes, stream: StreamConfig = WATCH, name: str = "in.csv", skip: int = 0) -> list[FileBlock]:
    raw = text.encode() if isinstance(text, str) else text
    file = io.BufferedReader(io.BytesIO(raw))
    return list(read_blocks(Path(name) if name else None, file, "watch", stream, skip))


def numbers(blocks: list[FileBlock]) -> list[int]:
    return [number for block in blocks for number in block.lines]


def bad(blocks: list[FileBlock]) -> dict[int, str]:
    return {number: why for block in blocks for number, why in block.rejected.items()}


def values(blocks: list[FileBlock], name: str) -> list[Any]:
    return [value for block in blocks for value in block.raw.values[name]]


def test_csv_columns_may_be_in_any_order() -> None:
    result = read_text(f"ay,t,ax\n2,{T0},1\n4,{T0 + 1},3\n")
    assert values(result, "ax") == [1, 3]
    assert values(result, "ay") == [2, 4]
    assert list(result[0].raw.t) == [T0, T0 + 1]
    assert numbers(result) == [2, 3]


def test_a_csv_needs_no_time() -> None:
    assert read_text("ax,ay\n1,2\n")[0].raw.t is None


def test_time_may_be_given_as_rfc_3339_with_its_zone() -> None:
    result = read_text(
        HEADER + "2025-11-24T22:18:00Z,1,2\n2025-11-24T23:18:00.25+01:00,1,2\n2025-11-24 22:18:00,1,2\n,1,2\n"
    )
    assert result[0].raw.t == [T0, T0 + 0.25, "2025-11-24 22:18:00", ""]
    checked = validate_columns(result[0].raw, WATCH, 0, None)
    assert checked.rejected[2].startswith("t = '2025-11-24 22:18:00' has no time zone; add Z or +01:00")
    assert checked.rejected[3] == "t = '' is no number"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_may_end_as_on_any_system_and_the_last_one_need_not(end: str, last: bool) -> None:
    text = end.join(["ax,ay", "1,2", "", "3,4"]) + (end if last else "")
    result = read_text(text)
    assert values(result, "ax") == [1, 3]
    assert numbers(result) == [2, 4]


def test_a_byte_order_mark_is_no_part_of_the_first_column() -> None:
    assert values(read_text("\ufeffax,ay\n1,2\n"), "ax") == [1]
    assert values(read_text('\ufeff{"ax":1,"ay":2}\n', name="x.jsonl"), "ax") == [1]


def test_an_empty_file_is_refused_and_one_with_its_header_only_has_no_rows() -> None:
    for name in ("x.csv", "x.jsonl"):
        with pytest.raises(RowRejected, match="empty"):
            read_text("", name=name)
    assert read_text(HEADER) == []
    assert read_text("t,ax,ay") == []


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("t,ax,az", "column 'az' is not a field of this stream; did you mean 'ay'"),
        ("t,ax", "column 'ay' is missing; the first line must name the columns"),
        ("t,ax,ay,ax", "column 'ax' is there twice"),
        ("1,2,3", "the first line has only numbers"),
        ("t;ax;az", "column 'az' is not a field"),
        ("t|ax|ay", "column 't|ax|ay' is not a field"),
    ],
)
def test_a_header_that_does_not_fit_the_stream_is_refused(header: str, reason: str) -> None:
    with pytest.raises(RowRejected, match=reason):
        read_text(header + "\n1,2,3\n")


def test_a_blob_without_any_line_is_refused_and_not_read_to_its_end() -> None:
    with pytest.raises(RowRejected, match="no end within"):
        read_text(b"\x01" * (1 << 20))


def test_rows_of_wrong_length_are_rejected_and_empty_lines_skipped() -> None:
    result = read_text("ax,ay\n1,2\n1\n\n1,2,3\n3,4\n,\n")
    assert numbers(result) == [2, 6, 7]
    assert bad(result) == {3: "1 values, the header names 2", 5: "3 values, the header names 2"}
    assert values(result, "ay") == [2, 4, None]


def test_cells_that_are_no_numbers_stay_to_be_named() -> None:
    result = read_text("ax,ay\n 1 ,1e3\nfast,1_000\n,\n")
    assert values(result, "ax") == [1, "fast", None]
    assert values(result, "ay") == [1000, "1_000", None]


def test_integers_keep_all_digits_and_may_have_a_point() -> None:
    stream = StreamConfig(fields=[FieldConfig(name="n", type="i64")])
    result = read_text(f"n\n{2**63 - 1}\n3.0\n0x1\n{'9' * 5000}\n", stream)
    checked = validate_columns(result[0].raw, stream, 0, None)
    assert checked.rows.columns[0].tolist() == [2**63 - 1, 3]
    assert sorted(checked.rejected) == [2, 3]


def test_bytes_that_are_not_utf8_spoil_their_own_line_only() -> None:
    header = b"power,count,mode\n"
    result = read_text(header + b"1,1,on\n1,1,\xff\xfe\n1,\xff,on\n1,1,off\n", MACHINE)
    checked = validate_columns(result[0].raw, MACHINE, 0, None)
    assert numbers(result) == [2, 3, 4, 5]
    assert sorted(checked.rejected) == [1, 2]
    assert checked.categories == {2: ["on", "off"]}
    lines = read_text(b'{"ax":1,"ay":2}\n{"ax":1,"ay":"\xff"}\n{"ax":3,"ay":2}\n', name="x.jsonl")
    assert numbers(lines) == [1, 3]
    assert "JSON" in bad(lines)[2]


def test_a_nul_byte_spoils_its_own_line_only() -> None:
    result = read_text("ax,ay\n1,2\n1,\x00\n3,4\n")
    checked = validate_columns(result[0].raw, WATCH, 0, None)
    assert checked.rows.columns[0].tolist() == [1, 3]


def test_quoted_text_may_hold_commas_quotes_and_newlines() -> None:
    result = read_text('power,count,mode\n1,1,"a,b"\n2,2,"say ""on"""\n3,3,"two\nlines"\n\n4,4,plain\n', MACHINE)
    assert values(result, "mode") == ["a,b", 'say "on"', "two\nlines", "plain"]
    assert numbers(result) == [2, 3, 4, 7]


def test_an_unclosed_quote_costs_its_own_line_only() -> None:
    lines = ["1,2"] * 10_000
    lines[4] = '1,"2'
    lines[7_000] = '"1,2'
    result = read_text("ax,ay\n" + "\n".join(lines))
    assert sorted(bad(result)) == [6, 7_002]
    assert len(numbers(result)) == 9_998
    assert sorted([*numbers(result), *bad(result)]) == list(range(2, 10_002))


def test_two_stray_quotes_do_not_make_one_row_of_what_is_between_them() -> None:
    result = read_text('power,count,mode\n1,1,on\n2,2,"on\n3,3,on\n4,4,on\n5","5",on\n6,6,on\n', MACHINE)
    assert values(result, "count") == [1, 3, 4, 5, 6]
    assert sorted(bad(result)) == [3]
    assert validate_columns(result[0].raw, MACHINE, 0, None).rejected == {3: "power is no number"}


def test_a_cell_of_more_than_the_csv_modules_limit_costs_its_own_line() -> None:
    result = read_text("ax,ay\n1,2\n1," + "x" * 200_000 + "\n3,4\n")
    assert numbers(result) == [2, 4]
    assert "field larger" in bad(result)[3]


@pytest.mark.parametrize(
    "n", [1, MAX_BLOCK_ROWS - 1, MAX_BLOCK_ROWS, MAX_BLOCK_ROWS + 1, 2 * MAX_BLOCK_ROWS, 2 * MAX_BLOCK_ROWS + 1]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_no_row_is_lost_at_the_edge_of_a_block(n: int, kind: str) -> None:
    result = read_text(*numbered(n, kind))
    assert values(result, "ax") == list(range(n))
    assert all(len(block.lines) <= MAX_BLOCK_ROWS for block in result)


@pytest.mark.parametrize(
    "skip", [0, 1, 2, 3, MAX_BLOCK_ROWS, MAX_BLOCK_ROWS + 1, MAX_BLOCK_ROWS + 2, 2 * MAX_BLOCK_ROWS + 1, 9_001, 9_999]
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_reading_goes_on_after_any_line_and_loses_none(skip: int, kind: str) -> None:
    text, stream, name = numbered(9_000, kind)
    everything, rest = read_text(text, stream, name), read_text(text, stream, name, skip)
    assert numbers(rest) == [number for number in numbers(everything) if number > skip]
    assert values(rest, "ax") == values(everything, "ax")[len(numbers(everything)) - len(numbers(rest)) :]


def numbered(n: int, kind: str) -> tuple[str, StreamConfig, str]:
    stream = StreamConfig(fields=[FieldConfig(name="ax", type="i64")])
    if kind == "csv":
        return "ax\n" + "".join(f"{i}\n" for i in range(n)), stream, "x.csv"
    return "".join(f'{{"ax":{i}}}\n' for i in range(n)), stream, "x.jsonl"


CELLS = st.one_of(st.integers(-9, 9).map(str), st.sampled_from(['"', "x", "", ",", "\r", '"1"', "\ufeff", "é", "\x00"]))


@given(st.lists(st.tuples(CELLS, CELLS).map(",".join), max_size=30))
def test_no_line_of_a_csv_vanishes(lines: list[str]) -> None:
    text = HEADER.removeprefix("t,") + "".join(f"{line}\n" for line in lines)
    physical = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    result = read_text(text)
    named = sorted([*numbers(result), *bad(result)])
    assert len(named) == len(set(named))
    assert named == [number for number, line in enumerate(physical, 1) if number > 1 and line]


@given(st.lists(st.tuples(st.floats(-16, 16), st.text('ab\n\r",; é', min_size=1, max_size=9)), max_size=20))
def test_what_the_csv_module_writes_is_read_back(rows: list[tuple[float, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["power", "mode"])
    writer.writerows(rows)
    stream = StreamConfig(fields=[FieldConfig(name="power", type="f64"), FieldConfig(name="mode", type="category")])
    result = read_text(text.getvalue(), stream)
    assert values(result, "power") == [power for power, _ in rows]
    assert values(result, "mode") == [mode for _, mode in rows]


def test_json_lines_stand_each_for_itself() -> None:
    lines = [
        f'{{"stream":"watch","t":{T0},"ax":1,"ay":2}}',
        "",
        '{"ax":3}',
        '{"ax":4,"ay":5,"t":"2025-11-24T22:18:00Z"}',
        '{"ax":6,"ay":7,"az":8}',
        '{"stream":"machine","ax":1,"ay":2}',
        "[1]",
        "[" * 100_000,
        '{"ax":1,"ay":1e400}',
        f'{{"ax":8,"ay":9,"t":1{"0" * 400}}}',
        '{"ax":9,"ay":9,"t":true}',
        '{"ax":1,',
    ]
    result = read_text("\n".join(lines), name="in.jsonl")
    assert numbers(result) == [1, 3, 4, 10, 11]
    assert sorted(bad(result)) == [5, 6, 7, 8, 9, 12]
    assert bad(result)[5] == "'az' is not a field of this stream; did you mean 'ay'?"
    assert bad(result)[6] == "this line is for stream 'machine', not for 'watch'"
    assert result[0].raw.t[:3] == [T0, None, T0]
    checked = validate_columns(result[0].raw, WATCH, round(T0 * 1e6) - 1, None)
    assert {result[0].lines[index]: why for index, why in checked.rejected.items()} == {
        3: "ay is missing",
        10: "t = inf is no finite number",
        11: "t = 'True' is no number",
    }


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"ax":1,"ax":1,"ay":2}', "ax"),
        ('{"stream":"watch","stream":"watch","ax":1,"ay":2}', "stream"),
        (f'{{"t":"2025-11-24T22:18:00Z","t":{T0},"ax":1,"ay":2}}', "t"),
        ('{"ax":{"b":1,"b":2},"ay":2}', "b"),
        ('{"ax":1,"\\u0061x":1,"ay":2}', "ax"),
    ],
)
def test_a_json_line_with_a_key_twice_is_named_and_its_neighbours_are_read(line: str, key: str) -> None:
    good = '{"t":"2025-11-24T22:18:00Z","ax":1,"ay":2}'
    result = read_text(f"{good}\n{line}\n{good}\n", name="in.jsonl")
    assert numbers(result) == [1, 3]
    assert bad(result) == {2: f"duplicate key {key!r} in one object; two readers could see different values"}


def test_without_a_name_the_first_character_tells_json_lines_from_csv() -> None:
    assert values(read_text("ax,ay\n1,2\n", name=""), "ax") == [1]
    assert values(read_text('{"ax":1,"ay":2}\n', name=""), "ax") == [1]


def test_a_format_that_is_not_read_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"\.xlsx is not read; use one of \.csv, \.jsonl"):
        read_text("", name="in.xlsx")


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=3000)
    return path


def read_parquet(path: Path, stream: StreamConfig = WATCH, skip: int = 0) -> list[FileBlock]:
    with open_file(path) as file:
        return list(read_blocks(path, file, "watch", stream, skip))


@pytest.mark.parametrize("skip", [0, 1, 2999, MAX_BLOCK_ROWS, 9_000, 9_001])
def test_parquet_is_read_in_blocks_from_any_row_on(tmp_path: Path, skip: int) -> None:
    n = 9_000
    stream = StreamConfig(fields=[FieldConfig(name="ax", type="i64")])
    result = read_parquet(parquet(tmp_path / "x.parquet", ax=list(range(n))), stream, skip)
    assert numbers(result) == list(range(skip + 1, n + 1))
    assert values(result, "ax") == list(range(skip, n))


def test_times_of_parquet_are_seconds_or_timestamps_with_their_zone(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    moment = datetime.fromtimestamp(T0, UTC)
    for unit in ("s", "ms", "us", "ns"):
        t = pyarrow.array([moment, None], pyarrow.timestamp(unit, "Europe/Vienna"))
        result = read_parquet(parquet(tmp_path / "x.parquet", t=t, ax=[1.0, 2.0], ay=[1.0, 2.0]))
        assert result[0].raw.t[0] == T0
        assert validate_columns(result[0].raw, WATCH, 0, None).rejected == {1: "t = nan is no finite number"}
    result = read_parquet(parquet(tmp_path / "x.parquet", t=[T0], ax=[1.0], ay=[1.0]))
    assert list(result[0].raw.t) == [T0]
    naive = pyarrow.array([moment.replace(tzinfo=None)], pyarrow.timestamp("us"))
    with pytest.raises(RowRejected, match="have no time zone; write them as UTC"):
        read_parquet(parquet(tmp_path / "x.parquet", t=naive, ax=[1.0], ay=[1.0]))


def test_gaps_and_dictionaries_of_parquet_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    modes = pyarrow.array(["on", "off", None]).dictionary_encode()
    path = parquet(tmp_path / "x.parquet", power=[1.0, 2.0, 3.0], count=[1, 2, 3], mode=modes, heat=[1.0, None, 2.0])
    checked = validate_columns(read_parquet(path, MACHINE)[0].raw, MACHINE, 0, None)
    assert checked.rejected == {2: "mode is missing"}
    assert checked.categories == {2: ["on", "off"]}


def test_parquet_with_other_columns_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowRejected, match="column 'ay' is missing"):
        read_parquet(parquet(tmp_path / "x.parquet", ax=[1.0]))
    broken = tmp_path / "broken.parquet"
    for content in (
        b"",
        b"PAR1",
        b"ax,ay\n1,2\n",
        parquet(tmp_path / "y.parquet", ax=[1.0], ay=[1.0]).read_bytes()[:-9],
    ):
        broken.write_bytes(content)
        with pytest.raises(RowRejected, match="not readable as Parquet"):
            read_parquet(broken)


@given(st.sampled_from(["in.csv", "in.jsonl", ""]), st.lists(st.binary(max_size=40), max_size=6), st.booleans())
def test_any_bytes_are_read_line_by_line_or_rejected(name: str, lines: list[bytes], headed: bool) -> None:
    text = (b"ax,ay\n" if headed else b"") + b"\n".join(lines)
    try:
        result = read_text(text, name=name)
    except RowRejected:
        return
    for block in result:
        checked = validate_columns(block.raw, WATCH, 0, None)
        assert len(checked.rows) + len(checked.rejected) == block.raw.n == len(block.lines)
    assert not set(numbers(result)) & set(bad(result))


@pytest.fixture(scope="module")
def sound_parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "x.parquet"
    return parquet(path, t=[T0, T0 + 1], ax=[1.0, 2.0], ay=[3.0, 4.0]).read_bytes()


def test_parquet_with_column_names_that_are_no_text_is_rejected(sound_parquet: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(sound_parquet.replace(b"ay", b"\xff\xfe"))
    with pytest.raises(RowRejected):
        read_parquet(tmp_path / "x.parquet")


@given(data=st.data())
def test_parquet_with_bytes_changed_is_read_or_rejected(sound_parquet: bytes, data: st.DataObject) -> None:
    content = bytearray(sound_parquet)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(content)
        file.flush()
        try:
            result = read_parquet(Path(file.name))
        except RowRejected:
            return
    assert all(len(block.lines) == block.raw.n for block in result)
