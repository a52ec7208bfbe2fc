"""Binary frames: the same rows, limits and reasons as JSON lines, and nothing else for hostile bytes."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.frames import MAGIC, Frames, read_columns, read_layout
from outstation.device.intake.protocol import MAX_LINE_BYTES, LineParser, ParsedLines
from outstation.device.intake.splitter import Oversized, Splitter
from outstation.device.store.rows import concatenate, pack_chunk
from outstation.foundation.errors import RowRejected
from outstation.protocol.client import _encode_frame, _frame_type
from tests.kit.stations import STREAMS, T0

NOW_US = 1_764_022_680_000_000
LINE = b'{"stream":"watch","ax":1,"ay":2}'
AX, AY = np.array([0.1, 0.2, 0.3], "<f4"), np.array([1, 2, 3], "<f8")
TYPES = ("<f4", "<f8", "<i4", "<i8")
NUMBERS = st.one_of(st.floats(-20, 20, width=32), st.integers(-20, 20), st.just(float("nan")))
Items = list[list[bytes] | Frames | Oversized]


def frame(stream: str = "watch", **columns: Any) -> bytes:
    encoded = _encode_frame(stream, columns)
    assert encoded is not None
    return encoded


def json_line(stream: str = "watch", **columns: Any) -> bytes:
    values = {
        name: [None if number != number else number for number in column.tolist()] for name, column in columns.items()
    }
    return json.dumps({"stream": stream, "columns": values}).encode()


def parse(content: bytes, parser: LineParser | None = None) -> ParsedLines:
    [parsed] = (parser or LineParser(STREAMS)).parse_frames(Frames(content, len(content)), 1, NOW_US)
    return parsed


def outcome(parsed: ParsedLines) -> tuple[Any, ...]:
    """Return everything that a line or a frame comes to."""
    rows = parsed.validated and len(parsed.validated.rows) and pack_chunk(parsed.validated.rows)
    latest = parsed.validated and (parsed.validated.latest_us, parsed.validated.rejected)
    return parsed.stream, rows, latest, parsed.rejected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_frame_comes_to_exactly_what_the_same_columns_as_a_json_line_come_to(data: st.DataObject) -> None:
    frames_parser, lines_parser = LineParser(STREAMS), LineParser(STREAMS)
    for number in range(1, 4):
        n = data.draw(st.integers(1, 5))
        columns: dict[str, Any] = {}
        for name in data.draw(st.sampled_from([("ax", "ay"), ("ax",), ("ax", "ay", "az"), ("ay", "ax")])):
            kind = data.draw(st.sampled_from(TYPES))
            values = data.draw(st.lists(NUMBERS, min_size=n, max_size=n))
            columns[name] = np.array([0 if kind[1] == "i" and v != v else v for v in values]).astype(kind)
        if data.draw(st.booleans()):
            times = st.one_of(st.floats(T0, T0 + 9), st.just(-1.0), st.just(1e11))
            columns["t"] = np.array(data.draw(st.lists(times, min_size=n, max_size=n)))
        [line] = lines_parser.parse([json_line(**columns)], number, NOW_US)
        content = frame(**columns)
        [parsed] = frames_parser.parse_frames(Frames(content, len(content)), number, NOW_US)
        assert outcome(parsed) == outcome(line)


def test_a_rejected_row_of_a_frame_does_not_move_the_time_of_its_producer() -> None:
    parser = LineParser(STREAMS)
    bad = frame(ax=np.array([1, np.nan], "<f4"), ay=AY[:2], t=np.array([T0, T0 + 9]))
    assert parse(bad, parser).rejected == {1: "row 2 of the columns: ax is missing"}
    assert parse(frame(ax=AX[:1], ay=AY[:1], t=np.array([T0 + 5])), parser).rejected == {}


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_of_any_type_are_whole_numbers_or_are_rejected_one_by_one(kind: str) -> None:
    counts = {"meter": StreamConfig(fields=[FieldConfig(name="count", type="i64")])}
    parsed = parse(frame("meter", count=np.array([1, 2, 3]).astype(kind)), LineParser(counts))
    assert parsed.rejected == {}
    assert parsed.validated is not None
    assert parsed.validated.rows.columns[0].tolist() == [1, 2, 3]
    if kind[1] == "f":
        mixed = parse(frame("meter", count=np.array([1, 2.5, 3]).astype(kind)), LineParser(counts))
        assert "row 2 of the columns: count is no whole number of 64 bits" in mixed.rejected[1]
        assert mixed.validated is not None
        assert mixed.validated.rows.columns[0].tolist() == [1, 3]


def test_a_masked_array_is_no_frame() -> None:
    masked = np.ma.masked_array(np.array([1, 7, 3], "<f4"), mask=[False, True, False])
    assert _encode_frame("watch", {"ax": masked, "ay": AY}) is None
    assert _frame_type(masked) == 0


def test_a_view_with_gaps_is_sent_as_its_values() -> None:
    table = np.arange(12, dtype="<f4").reshape(4, 3)
    parsed = parse(frame(ax=table[:, 0], ay=table[::-1, 1]))
    assert parsed.validated is not None
    assert [column.tolist() for column in parsed.validated.rows.columns] == [[0, 3, 6, 9], [10, 7, 4, 1]]


def test_times_of_a_frame_are_exact_to_the_microsecond_until_2100() -> None:
    micros = np.array([0, 1, NOW_US + 1, 4_102_444_799_999_999, 4_102_444_800_000_000])
    head = frame(ax=np.ones(5, "<f4"), ay=np.ones(5, "<f4"), t=np.zeros(5))
    at = len(head) - 5 * 8 - 2 * 24
    parsed = parse(head[:at] + micros.astype("<i8").tobytes() + head[at + 40 :])
    assert parsed.validated is not None
    assert parsed.validated.rows.t.tolist() == micros.tolist()
    late = parse(head[:at] + (micros + 1).astype("<i8").tobytes() + head[at + 40 :])
    assert "t = 4.1024448e+09 is after 2100" in late.rejected[1]


HEAD = frame(ax=AX, ay=AY)
KIND_AT = 16 + len("watch")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (frame("wacth", ax=AX, ay=AY), "unknown stream 'wacth'; did you mean 'watch'?"),
        (frame(ax=AX), "field 'ay' is missing"),
        (frame(ax=AX, ay=AY, zz=AX), "'zz' is not a field of this stream"),
        (frame(ax=np.array([1, 99, 3], "<f4"), ay=AY), "row 2 of the columns: ax is above max 16"),
        (HEAD[:12] + b"\x02" + HEAD[13:], "frame with flags 2, known are 0 and 1"),
        (HEAD[:KIND_AT] + b"\x05" + HEAD[KIND_AT + 1 :], "'ax' has type 5, known are 1 to 4"),
        (HEAD[:KIND_AT] + b"\x00" + HEAD[KIND_AT + 1 :], "'ax' has type 0, known are 1 to 4"),
        (HEAD.replace(b"ax", b"ay"), "a column is twice in this frame; give it once"),
        (HEAD.replace(b"ax", b"a\xff"), "not text: "),
        (HEAD[:12], "frame of 12 bytes ends inside its head"),
        (HEAD[:8], "frame of 8 bytes ends inside its head"),
        (HEAD[:8] + bytes(4) + HEAD[12:], "columns must be of one length of at least 1, these have [0]"),
        (HEAD[:14] + bytes(2) + HEAD[16:], "columns must be of one length of at least 1, these have []"),
        (HEAD[:14] + b"\xff\xff" + HEAD[16:], "'' has type 0, known are 1 to 4"),
        (HEAD[: KIND_AT + 3], f"frame of {KIND_AT + 3} bytes ends inside its head"),
        (HEAD + bytes(8), f"frame of {len(HEAD) + 8} bytes, but 3 rows of its columns take {len(HEAD)}"),
    ],
    ids=range(16),
)
def test_a_bad_frame_is_rejected_with_a_reason(content: bytes, reason: str) -> None:
    parsed = parse(content)
    assert reason in parsed.rejected[1]


def test_a_lying_row_count_is_refused_before_anything_is_allocated() -> None:
    lying = HEAD[:8] + b"\xff" * 4 + HEAD[12:]
    tracemalloc.start()
    parsed = parse(lying)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "but 4294967295 rows of its columns take 51" in parsed.rejected[1]
    assert peak < 1 << 20


def test_the_layout_of_the_last_frame_is_not_taken_for_another_one() -> None:
    parser = LineParser(STREAMS)
    for content in (HEAD, frame(ay=AY, ax=AX), HEAD, frame(ax=AY, ay=AX), frame(ax=AX, ay=AY, t=AY + T0)):
        assert outcome(parse(content, parser)) == outcome(parse(content))


@settings(max_examples=300)
@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_behind_the_prefix_are_rows_or_a_reason(content: bytes, is_watch: bool) -> None:
    """The head of a real stream comes first in half of the cases, so that its columns are reached."""
    start = HEAD[8:KIND_AT] if is_watch else b""
    whole = MAGIC + struct.pack("<I", len(start + content)) + start + content
    parsed = parse(whole)
    assert parsed.rejected or (parsed.validated is not None and len(parsed.validated.rows))
    try:
        frames = Frames(whole, len(whole))
        columns = read_columns(frames, read_layout(frames, None))
    except RowRejected:
        return
    assert {len(column) for column in columns.values.values()} == {columns.n}


# --- several frames together


def check_together(contents: list[bytes]) -> None:
    """Check that frames of one size come to the same rows, reasons and times, together or one after the other."""
    one_by_one, at_once = LineParser(STREAMS), LineParser(STREAMS)
    expected = [
        at
        for number, content in enumerate(contents, 1)
        for at in one_by_one.parse_frames(alone(content), number, NOW_US)
    ]
    buffer = bytearray(b"".join(contents))
    parsed = at_once.parse_frames(Frames(memoryview(buffer), len(contents[0])), 1, NOW_US)
    # The next read overwrites it.
    buffer[:] = bytes(len(buffer))

    def total(parts: list[ParsedLines]) -> tuple[Any, ...]:
        rows = [part.validated.rows for part in parts if part.validated is not None]
        rejected = {line: reason for part in parts for line, reason in part.rejected.items()}
        joined = concatenate([part for part in rows if len(part)])
        return [line for part in parts for line in part.lines], rejected, len(joined) and pack_chunk(joined)

    assert total(parsed) == total(expected)
    assert len(parsed) in (1, len(contents))
    assert at_once._latest == one_by_one._latest


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_frames_that_arrive_together_come_to_what_each_comes_to_by_itself(data: st.DataObject) -> None:
    n, names = (
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([("ax", "ay"), ("ay", "ax"), ("ax", "ay", "az")])),
    )
    kinds = {name: data.draw(st.sampled_from(TYPES[:3:2])) for name in names}
    usual = st.floats(-15, 15, width=32)
    numbers = data.draw(st.sampled_from([usual, st.one_of(usual, st.just(99.0), st.just(float("nan")))]))
    times = [np.arange(n), None, np.array([5.0] * n), np.array([5e9] * n), np.arange(n)[::-1]]
    contents = []
    for second in range(data.draw(st.integers(2, 5))):
        columns: dict[str, Any] = {}
        for name in names:
            values = data.draw(st.lists(numbers, min_size=n, max_size=n))
            columns[name] = np.array([0 if kinds[name][1] == "i" and v != v else v for v in values]).astype(kinds[name])
        t = data.draw(st.sampled_from(times[: data.draw(st.integers(1, 5))]))
        contents.append(frame(**columns, **({} if t is None else {"t": T0 + 10.0 * second + t})))
    check_together([content for content in contents if len(content) == len(contents[0])])


@pytest.mark.parametrize("kind", TYPES[:2])
def test_one_row_frames_outlive_their_receive_buffer(kind: str) -> None:
    numbers = np.arange(4).astype(kind)
    check_together([frame(ax=x, ay=x, t=np.array([T0]) + x) for x in numbers.reshape(4, 1)])


def test_a_frame_with_another_head_of_the_same_size_is_read_by_its_own_head() -> None:
    ints = np.array([1, 2, 3], "<i4")
    check_together([HEAD, HEAD.replace(b"ax", b"ay"), HEAD.replace(b"ax", b"zz"), HEAD])
    check_together([frame(ax=AX, ay=AX), frame(ax=ints, ay=AX), frame("machi", ax=AX, ay=AX)])
    check_together([HEAD[:8] + b"\xff" * 4 + HEAD[12:], HEAD])


# --- lines and frames among each other


def split_all(data: bytes, cuts: list[int]) -> tuple[Items, Splitter]:
    """Split data that arrives in pieces, as a socket's buffer has it, and join what came one after another."""
    splitter, items = Splitter(), Items()
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        buffer = bytearray(splitter.partial + data[start:end])
        for item in splitter.split(memoryview(buffer)):
            if isinstance(item, Frames):
                items += item
            elif isinstance(item, list) and items and isinstance(items[-1], list):
                items[-1] += item
            else:
                items.append(item)
        buffer[:] = bytes(len(buffer))
    return items, splitter


def alone(content: bytes) -> Frames:
    return Frames(content, len(content))


MIXED = LINE + b"\n" + HEAD + LINE + b"\n\n" + frame(ax=AX, ay=AY, t=AY + T0) + HEAD + b"\x9cOX\n\x9c\n" + LINE + b"\n"
EXPECTED = [[LINE], alone(HEAD), [LINE, b""], alone(frame(ax=AX, ay=AY, t=AY + T0)), alone(HEAD)]


def test_lines_and_frames_cut_at_every_byte_come_out_the_same() -> None:
    whole = [*EXPECTED, [b"\x9cOX", b"\x9c", LINE]]
    for cut in range(len(MIXED) + 1):
        assert split_all(MIXED, [cut])[0] == whole
        items, splitter = split_all(MIXED[:cut], [])
        again = splitter.split(splitter.partial + MIXED[cut:])
        assert b"".join(i.content for i in [*items, *again] if isinstance(i, Frames)).count(MAGIC) == 3
    assert split_all(MIXED, list(range(1, len(MIXED))))[0] == whole


@settings(max_examples=100)
@given(st.lists(st.one_of(st.binary(max_size=30), st.just(HEAD), st.just(3 * HEAD), st.just(LINE + b"\n"))), st.data())
def test_any_bytes_are_split_the_same_however_they_arrive(parts: list[bytes], data: st.DataObject) -> None:
    content = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    items, splitter = split_all(content, cuts)
    whole, other = split_all(content, [])
    assert (items, splitter.partial, splitter.kind) == (whole, other.partial, other.kind)


def test_an_oversized_frame_is_dropped_without_being_held_and_the_next_line_counts() -> None:
    for size in (MAX_LINE_BYTES - 8, MAX_LINE_BYTES - 7, 3 * MAX_LINE_BYTES):
        content = MAGIC + struct.pack("<I", size) + b"\n" * size
        items, splitter = split_all(content + LINE + b"\n", list(range(60_000, len(content), 60_000)))
        whole = alone(content) if len(content) <= MAX_LINE_BYTES else Oversized("frame", len(content))
        assert items == [whole, [LINE]]
        assert splitter.partial == b""
    splitter = Splitter()
    assert splitter.split(MAGIC + b"\xff" * 4 + b"x" * 1000) == []
    assert (splitter.partial, splitter.is_dropping, splitter.kind) == (b"", True, "frame")
