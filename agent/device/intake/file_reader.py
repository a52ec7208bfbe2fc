"""Files of readings to blocks of columns: CSV, JSON Lines and Parquet, never the whole file in memory."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from agent.clock import epoch_us
from agent.config import Stream
from agent.device.store.rows import Raw, row_bytes
from agent.errors import Rejected, UsageError
from agent.strict_json import RepeatedKey, check_count
from agent.toml_files import suggestion

BLOCK = 4096
# A block goes into one transaction.
_BLOCK_BYTES = 512 << 10
_LONGEST_HEAD = 1 << 17
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


class Block(msgspec.Struct, frozen=True):
    """Rows of a file with the number of the line (row, in Parquet) each began on; `bad` line → reason."""

    raw: Raw
    lines: list[int]
    bad: dict[int, str]


def open_text(file: Path | int) -> IO[str]:
    """A file or an open descriptor for `blocks`: bytes that are not UTF-8 spoil their own line only. Raises OSError."""
    return open(file, encoding="utf-8", errors="surrogateescape", newline="", closefd=not isinstance(file, int))


def blocks(path: Path | None, text: IO[str], name: str, stream: Stream, skip: int = 0) -> Iterator[Block]:
    """Blocks of `text` as `open_text` gives it, in the format of its path's suffix, from the line after `skip` on.

    Without a path the first character tells JSON Lines from CSV. `name` is the stream's. Raises Rejected where the
    file as a whole is not what the stream needs, UsageError for a format that cannot be read.
    """
    suffix = path.suffix.lower() if path else ""
    if suffix == ".parquet" and path is not None:
        yield from _parquet(path, stream, skip)
        return
    first = text.readline(_LONGEST_HEAD).removeprefix("\ufeff")
    if len(first) >= _LONGEST_HEAD:
        raise Rejected(f"the first line has no end within {_LONGEST_HEAD} characters")
    if suffix in (".jsonl", ".ndjson") or (suffix != ".csv" and first.lstrip().startswith("{")):
        yield from _json_lines(first, text, name, stream, skip)
    elif suffix in (".csv", ".txt", ""):
        yield from _csv(first, text, stream, skip)
    else:
        raise UsageError(f"{path}: {suffix} is not read; use one of {', '.join(SUFFIXES)}")


def most_rows(stream: Stream) -> int:
    """Of a block."""
    return max(1, min(BLOCK, _BLOCK_BYTES // row_bytes(stream)))


def _csv(first: str, text: IO[str], stream: Stream, skip: int) -> Iterator[Block]:
    if not first:
        raise Rejected("the file is empty; its first line must name the columns")
    header = [cell.strip() for cell in next(csv.reader([first]), [])]
    _check_header(header, stream)
    texts = {f.name for f in stream.fields if f.type == "category"}
    records = _records(text, [name in texts for name in header])
    while chunk := list(islice(records, most_rows(stream))):
        good = [(number, row) for number, row in chunk if number > skip and not isinstance(row, str)]
        bad = {number: row for number, row in chunk if number > skip and isinstance(row, str)}
        if good or bad:
            columns = dict(zip(header, zip(*(row for _, row in good), strict=True), strict=True)) if good else {}
            yield Block(_typed(columns, len(good), stream), [number for number, _ in good], bad)


def _records(text: IO[str], may_be_long: list[bool]) -> Iterator[tuple[int, list[str] | str]]:
    """The line each record begins on, with its cells or the reason why it is none. Empty lines are left out.

    `may_be_long`, one a column: whether a cell of it may hold a newline, as text in quotes may.
    """
    width = len(may_be_long)
    taken: list[str] = []

    def tap() -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    reader = csv.reader(tap(), strict=True)
    number = 2
    while True:
        taken.clear()
        row = _record(reader, width)
        if row is None:
            return
        if len(taken) > 1 and (isinstance(row, str) or _swallowed(row, may_be_long)):
            # A quote that nothing closes has swallowed the lines after it: each for itself.
            for line in taken:
                alone = _record(csv.reader([line], strict=True), width)
                if alone:
                    yield number, alone
                number += 1
            continue
        if row:
            yield number, row
        number += len(taken)


def _swallowed(row: list[str], may_be_long: list[bool]) -> bool:
    broken = [
        ("\n" in cell or "\r" in cell) and not (text and len(cell) <= 64)
        for cell, text in zip(row, may_be_long, strict=True)
    ]
    return any(broken)


def _record(reader: Any, width: int) -> list[str] | str | None:
    """The next record, the reason why it is none, or None at the end. An empty line is an empty list."""
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        return f"not readable as CSV: {error}"
    if row and len(row) != width:
        return f"{len(row)} values, the header names {width}"
    return row


def _typed(columns: dict[str, Any], n: int, stream: Stream) -> Raw:
    """CSV cells as numbers where they are numbers; an empty cell is missing."""
    kinds = {f.name: f.type for f in stream.fields}
    values: dict[str, Any] = {}
    t = None
    for name, cells in columns.items():
        if name == "t":
            t = [_time(cell) for cell in cells]
        elif kinds[name] == "category":
            values[name] = [cell or None for cell in cells]
        else:
            values[name] = _numbers(cells, int if kinds[name] == "i64" else float)
    return Raw(n, t, values if columns else {f.name: [] for f in stream.fields})


def _numbers(cells: Any, kind: type) -> list[Any]:
    # Python reads 1_000 as a number; nobody who writes it into a CSV means one.
    if "_" not in "".join(cells):
        try:
            return list(map(kind, cells))
        except (ValueError, OverflowError):
            pass
    return [_number(cell, kind) for cell in cells]


def _number(cell: str, kind: type) -> Any:
    if cell.strip() == "":
        return None
    if "_" not in cell:
        for reading in (kind, float):
            try:
                return reading(cell)
            except ValueError:
                continue
    return cell


def _time(cell: Any) -> Any:
    """Epoch seconds, given as such or as RFC 3339; what is neither comes back as it is, to be named."""
    if not isinstance(cell, str):
        return cell
    try:
        return float(cell) if "_" not in cell else cell
    except ValueError:
        pass
    try:
        return epoch_us(cell) / 1e6
    except ValueError:
        return cell


def _json_lines(first: str, text: IO[str], name: str, stream: Stream, skip: int) -> Iterator[Block]:
    decoder = msgspec.json.Decoder(dict[str, Any])

    def everything() -> Iterator[tuple[int, str]]:
        yield 1, first
        yield from enumerate(text, 2)

    lines = everything()
    while chunk := list(islice(lines, most_rows(stream))):
        rows: list[tuple[int, dict[str, Any]]] = []
        bad: dict[int, str] = {}
        for number, line in chunk:
            if number <= skip or not line.strip():
                continue
            try:
                row = decoder.decode(line)
                if line.count(":") != len(row):
                    check_count(line.encode(), len(row), row.values())
            except RepeatedKey as error:
                bad[number] = str(error)
                continue
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                bad[number] = f"not one JSON object on one line: {str(error)[:120]}"
                continue
            problem = _foreign(row, name, stream)
            if problem:
                bad[number] = problem
            else:
                rows.append((number, row))
        if rows or bad:
            yield Block(_by_column(rows, stream), [number for number, _ in rows], bad)


def _foreign(row: dict[str, Any], name: str, stream: Stream) -> str | None:
    """What in a JSON line does not belong into this stream."""
    if row.get("stream", name) != name:
        return f"this line is for stream {str(row['stream'])[:40]!r}, not for {name!r}"
    known = {f.name for f in stream.fields} | {"t", "stream"}
    extra = next((key for key in row if key not in known), None)
    return None if extra is None else f"{extra!r} is not a field of this stream{suggestion(extra, known)}"


def _by_column(rows: list[tuple[int, dict[str, Any]]], stream: Stream) -> Raw:
    t = [_time(row.get("t")) for _, row in rows]
    return Raw(len(rows), t, {f.name: [row.get(f.name) for _, row in rows] for f in stream.fields})


def _parquet(path: Path, stream: Stream, skip: int) -> Iterator[Block]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: Parquet needs pyarrow: pip install 'outstation[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, stream)
            number = 0
            for batch in file.iter_batches(most_rows(stream)):
                start = min(max(0, skip - number), batch.num_rows)
                lines = list(range(number + start + 1, number + batch.num_rows + 1))
                number += batch.num_rows
                if lines:
                    columns = {field.name: column[start:] for field, column in zip(batch.schema, batch, strict=True)}
                    t = _parquet_time(columns.pop("t")) if "t" in columns else None
                    values = {name: column.to_pylist() for name, column in columns.items()}
                    yield Block(Raw(len(lines), t, values), lines, {})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise Rejected(f"not readable as Parquet: {error}") from None


def _parquet_time(column: Any) -> list[Any]:
    """Epoch seconds, given as such or as timestamps; NaN, which is refused, where the column has a gap."""
    import pyarrow

    if not pyarrow.types.is_timestamp(column.type):
        return [math.nan if moment is None else moment for moment in column.to_pylist()]
    if column.type.tz is None:
        raise Rejected("column 't' holds timestamps without a time zone; write them with one, as UTC, or as seconds")
    moments = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False).cast(pyarrow.int64()).to_pylist()
    return [math.nan if moment is None else moment / 1e6 for moment in moments]


def _check_header(header: list[str], stream: Stream) -> None:
    names = [f.name for f in stream.fields]
    for name in header:
        if name not in names and name != "t":
            raise Rejected(f"column {name[:40]!r} is not a field of this stream{suggestion(name, [*names, 't'])}")
    for name in header:
        if header.count(name) > 1:
            raise Rejected(f"column {name!r} is there twice")
    for column in stream.fields:
        if column.name not in header and not column.optional:
            raise Rejected(f"column {column.name!r} is missing; the first line must name the columns")
