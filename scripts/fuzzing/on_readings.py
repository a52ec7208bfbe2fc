"""Fuzz targets for producers' input: lines, files, and the chunks they become."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.file_reader import read_blocks
from outstation.device.intake.frames import Frames
from outstation.device.intake.protocol import LineParser
from outstation.device.intake.splitter import Oversized, Splitter
from outstation.device.store.rows import PackedChunk, Rows, pack_chunk, unpack_chunk, validate_columns
from outstation.foundation.errors import RowRejected
from outstation.ml.datasets.formats import open_file
from outstation.protocol.client import _encode_frame
from scripts.fuzzing import as_file, target, unique_keys

NOW_US = 1_764_022_680_000_000
WATCH = StreamConfig(
    fields=[FieldConfig(name="ax", unit="g", min=-16, max=16), FieldConfig(name="ay", min=-16, max=16)]
)
MACHINE = StreamConfig(
    fields=[
        FieldConfig(name="power", type="f64", min=0),
        FieldConfig(name="count", type="i64"),
        FieldConfig(name="mode", type="category"),
        FieldConfig(name="heat", optional=True),
    ]
)
STREAMS = {"watch": WATCH, "machine": MACHINE}
T0 = 1_764_022_680


def lines() -> list[bytes]:
    watch = [{"stream": "watch", "t": T0 + i, "ax": i / 7, "ay": -i} for i in range(4)]
    machine = [{"stream": "machine", "power": 1.5, "count": i, "mode": "a:b", "heat": None} for i in range(3)]
    columns = {"stream": "watch", "columns": {"t": [T0 + 9, T0 + 10], "ax": [1, 2.5], "ay": [0, -0.0]}}
    plain = [{"stream": "watch", "ax": 1, "ay": 2}] * 3
    seeds = ["\n".join(map(json.dumps, rows)).encode() for rows in (watch, machine, [columns], plain)]
    labels = [{"labels": "judge", "row": 7, "label": "up"}, {"labels": "judge", "t": T0, "label": 2, "source": "model"}]
    labels.append({"labels": "judge", "columns": {"row": [1, 2], "label": ["up", "down"]}})
    seeds.append("\n".join(map(json.dumps, labels)).encode())
    return [*seeds, seeds[0] + b"\n" + seeds[1] + b"\n" + seeds[2] + b"\n" + seeds[-1]]


@target("lines", "each line of a producer is accepted or rejected by itself", lines)
def taken_or_named(data: bytes) -> None:
    given = data.split(b"\n")
    together, alone = outcome([given]), outcome([[line] for line in given])
    assert together == alone
    numbers, bad, _ = together
    assert set(numbers) | set(bad) == set(range(1, len(given) + 1))
    for number in numbers:
        json.loads(given[number - 1], object_pairs_hook=unique_keys)


def frames() -> list[bytes]:
    numbers, times = np.array([0.5, 2.5], "<f4"), np.array([1.0 * T0, T0 + 1.0])
    watch = {"ax": numbers, "ay": numbers}
    encoded = [_encode_frame("watch", columns) or b"" for columns in (watch, watch | {"t": times})]
    power = {"power": times, "count": np.array([1, 2], "<i8"), "heat": np.array([np.nan, 1], "<f4")}
    encoded.append(_encode_frame("machine", power) or b"")
    return [*encoded, encoded[0] + b'{"stream":"watch","ax":1,"ay":2}\n' + encoded[1] + encoded[0][:-1]]


@target("frames", "each frame or line of a producer is accepted or rejected, however its bytes arrive", frames)
def frames_and_lines(data: bytes) -> None:
    whole, bytewise = Splitter(), Splitter()
    items = whole.split(memoryview(data))
    pieces = [piece for at in range(len(data)) for piece in bytewise.split(bytewise.partial + data[at : at + 1])]
    assert sum(map(_count, items)) == sum(map(_count, pieces))
    frames = [frame for item in items if isinstance(item, Frames) for frame in item]
    assert frames == [frame for piece in pieces if isinstance(piece, Frames) for frame in piece]
    assert (whole.partial, whole.is_dropping) == (bytewise.partial, bytewise.is_dropping)
    assert len(whole.partial) <= len(data)
    parser, one_by_one = LineParser(STREAMS), LineParser(STREAMS)
    for item in items:
        if isinstance(item, Frames):
            together = parser.parse_frames(item, 1, NOW_US)
            alone = [
                parsed
                for number, frame in enumerate(item, 1)
                for parsed in one_by_one.parse_frames(frame, number, NOW_US)
            ]
            assert [line for parsed in together for line in parsed.lines] == [
                line for parsed in alone for line in parsed.lines
            ]
            assert {n: why for parsed in together for n, why in parsed.rejected.items()} == {
                n: why for parsed in alone for n, why in parsed.rejected.items()
            }
            assert all(parsed.rejected or (parsed.validated and len(parsed.validated.rows)) for parsed in together)


def _count(item: list[bytes] | Frames | Oversized) -> int:
    return 1 if isinstance(item, Oversized) else len(item)


def outcome(calls: list[list[bytes]]) -> tuple[list[int], dict[int, str], dict[str, bytes]]:
    """Return the accepted lines, the reason for each rejected line, and the rows by stream as bytes."""
    reader, first = LineParser(STREAMS), 1
    numbers: list[int] = []
    bad: dict[int, str] = {}
    rows: dict[str, bytes] = {}
    for call in calls:
        for taken in reader.parse(call, first, NOW_US):
            bad |= taken.rejected
            if taken.label_batch is not None:
                numbers += taken.lines
            if taken.validated is not None and len(taken.validated.rows):
                numbers += sorted(set(taken.lines))
                accepted = taken.validated.rows
                for i in range(len(accepted)):
                    row = b"".join(column[i].tobytes() for column in (accepted.t, *accepted.columns))
                    rows[taken.stream] = rows.get(taken.stream, b"") + row
        first += len(call)
    return sorted(set(numbers)), bad, rows


def read_text(name: str, data: bytes, stream: StreamConfig) -> None:
    file = io.BufferedReader(io.BytesIO(data))
    numbers: list[int] = []
    try:
        for block in read_blocks(Path(name), file, "watch", stream):
            checked = validate_columns(block.raw, stream, NOW_US, None)
            assert len(checked.rows) + len(checked.rejected) == block.raw.n == len(block.lines)
            numbers += [*block.lines, *block.rejected]
    except RowRejected:
        return
    assert len(numbers) == len(set(numbers)), "a line was read twice"


@target(
    "csv",
    "each line of a CSV file is accepted once or rejected",
    lambda: [b"t,ax,ay\n1,2,3\n,4,5\n", b'ax,ay\r\n"1",2\r\n'],
)
def csv(data: bytes) -> None:
    read_text("x.csv", data, WATCH)


@target("csv-text", "CSV lines with text columns", lambda: [b'power,count,mode,heat\n1,2,"a\nb",\n0.5,7,off,1e3\n'])
def csv_text(data: bytes) -> None:
    read_text("x.csv", data, MACHINE)


@target("jsonl", "each line of a JSON Lines file is accepted once or rejected", lines)
def jsonl(data: bytes) -> None:
    read_text("x.jsonl", data, WATCH)


def parquet_files() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    files = []
    for compression in ("none", "snappy"):
        out = io.BytesIO()
        table = pyarrow.table({"t": [1.0 * T0, T0 + 1.0], "ax": [1.0, None], "ay": [3, 4]})
        pyarrow.parquet.write_table(table, out, compression=compression)
        files.append(out.getvalue())
    return files


@target("parquet", "a Parquet file is read or rejected as a whole", parquet_files, 8192)
def parquet(data: bytes) -> None:
    with as_file(data, ".parquet") as path, contextlib.suppress(RowRejected), open_file(path) as opened:
        for block in read_blocks(path, opened, "watch", WATCH):
            validate_columns(block.raw, WATCH, NOW_US, None)


FIELDS = [FieldConfig(name="a"), FieldConfig(name="b", type="i64"), FieldConfig(name="c", type="category")]


def chunks() -> list[bytes]:
    columns = (np.array([1.5, np.nan], "<f4"), np.array([-1, 2**62], "<i8"), np.array([0, 7], "<u2"))
    packed = [pack_chunk(Rows(np.array(t, np.int64), columns)) for t in ([NOW_US, NOW_US + 1], [NOW_US, 0])]
    return [json.dumps([p.n, p.first_t, p.time_bytes, p.crc]).encode() + b"\n" + p.data for p in packed]


@target("chunk", "an accepted chunk holds the packed rows", chunks)
def chunk(data: bytes) -> None:
    head, _, body = data.partition(b"\n")
    try:
        n, first_t, time_bytes, crc = json.loads(head)
    except (ValueError, TypeError, RecursionError):
        return
    # The checksum as given, and the correct one, for a chunk that was damaged before its checksum was computed.
    for sum_ in (crc, right_sum(n, first_t, time_bytes, body)):
        try:
            rows = unpack_chunk(PackedChunk(n, first_t, time_bytes, body, sum_), FIELDS)
        except ValueError:
            continue
        assert len(rows) == n
        assert not len(rows) or pack_chunk(unpack_chunk(pack_chunk(rows), FIELDS)) == pack_chunk(rows)


def right_sum(n: object, first_t: object, time_bytes: object, body: bytes) -> int:
    try:
        return zlib.crc32(body, zlib.crc32(struct.pack("<qqq", n, first_t, time_bytes)))
    except struct.error:
        return 0
