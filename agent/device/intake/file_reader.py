"""Files of readings to blocks of columns: CSV, JSON Lines and Parquet, never the whole file in memory."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from agent.clock import parse_rfc3339
from agent.config import StreamConfig
from agent.device.store.rows import RawColumns, row_bytes
from agent.errors import RowRejected, UsageError
from agent.strict_json import DuplicateKey, check_key_count
from agent.toml_files import did_you_mean

MAX_BLOCK_ROWS = 4096
# A block goes into one transaction.
_MAX_BLOCK_BYTES = 512 << 10
_MAX_HEADER_CHARS = 1 << 17
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


class FileBlock(msgspec.Struct, frozen=True):
    """Rows of a file with the number of the line (row, in Parquet) each began on; `bad` line → reason."""

    raw: RawColumns
    lines: list[int]
    bad: dict[int, str]


def open_text(file: Path | int) -> IO[str]:
    """A file or an open descriptor for `blocks`: bytes that are not UTF-8 spoil their own line only. Raises OSError."""
    return open(file, encoding="utf-8", errors="surrogateescape", newline="", closefd=not isinstance(file, int))


def read_blocks(
    path: Path | None, text: IO[str], name: str, stream: StreamConfig, skip: int = 0
) -> Iterator[FileBlock]:
    """Blocks of `text` as `open_text` gives it, in the format of its path's suffix, from the line after `skip` on.

    Without a path the first character tells JSON Lines from CSV. `name` is the stream's. Raises Rejected where the
    file as a whole is not what the stream needs, UsageError for a format that cannot be read.
    """
    suffix = path.suffix.lower() if path else ""
    if suffix == ".parquet" and path is not None:
        yield from _read_parquet(path, stream, skip)
        return
    first = text.readline(_MAX_HEADER_CHARS).removeprefix("\ufeff")
    if len(first) >= _MAX_HEADER_CHARS:
        raise RowRejected(f"the first line has no end within {_MAX_HEADER_CHARS} characters")
    if suffix in (".jsonl", ".ndjson") or (suffix != ".csv" and first.lstrip().startswith("{")):
        yield from _read_json_lines(first, text, name, stream, skip)
    elif suffix in (".csv", ".txt", ""):
        yield from _read_csv(first, text, stream, skip)
    else:
        raise UsageError(f"{path}: {suffix} is not read; use one of {', '.join(SUFFIXES)}")


def max_block_rows(stream: StreamConfig) -> int:
    """Of a block."""
    return max(1, min(MAX_BLOCK_ROWS, _MAX_BLOCK_BYTES // row_bytes(stream)))


def _read_csv(first: str, text: IO[str], stream: StreamConfig, skip: int) -> Iterator[FileBlock]:
    if not first:
        raise RowRejected("the file is empty; its first line must name the columns")
    header = [cell.strip() for cell in next(csv.reader([first]), [])]
    _check_header(header, stream)
    texts = {f.name for f in stream.fields if f.type == "category"}
    records = _read_records(text, [name in texts for name in header])
    while chunk := list(islice(records, max_block_rows(stream))):
        good = [(number, row) for number, row in chunk if number > skip and not isinstance(row, str)]
        bad = {number: row for number, row in chunk if number > skip and isinstance(row, str)}
        if good or bad:
            columns = dict(zip(header, zip(*(row for _, row in good), strict=True), strict=True)) if good else {}
            yield FileBlock(_parse_cells(columns, len(good), stream), [number for number, _ in good], bad)


def _read_records(text: IO[str], may_hold_newline: list[bool]) -> Iterator[tuple[int, list[str] | str]]:
    """The line each record begins on, with its cells or the reason why it is none. Empty lines are left out.

    `may_be_long`, one a column: whether a cell of it may hold a newline, as text in quotes may.
    """
    width = len(may_hold_newline)
    taken: list[str] = []

    def record_lines() -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    reader = csv.reader(record_lines(), strict=True)
    number = 2
    while True:
        taken.clear()
        row = _read_record(reader, width)
        if row is None:
            return
        if len(taken) > 1 and (isinstance(row, str) or _has_unclosed_quote(row, may_hold_newline)):
            # A quote that nothing closes has swallowed the lines after it: each for itself.
            for line in taken:
                alone = _read_record(csv.reader([line], strict=True), width)
                if alone:
                    yield number, alone
                number += 1
            continue
        if row:
            yield number, row
        number += len(taken)


def _has_unclosed_quote(row: list[str], may_hold_newline: list[bool]) -> bool:
    broken = [
        ("\n" in cell or "\r" in cell) and not (text and len(cell) <= 64)
        for cell, text in zip(row, may_hold_newline, strict=True)
    ]
    return any(broken)


def _read_record(reader: Any, width: int) -> list[str] | str | None:
    """The next record, the reason why it is none, or None at the end. An empty line is an empty list."""
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        return f"not readable as CSV: {error}"
    if row and len(row) != width:
        return f"{len(row)} values, the header names {width}"
    return row


def _parse_cells(columns: dict[str, Any], n: int, stream: StreamConfig) -> RawColumns:
    """CSV cells as numbers where they are numbers; an empty cell is missing."""
    kinds = {f.name: f.type for f in stream.fields}
    values: dict[str, Any] = {}
    t = None
    for name, cells in columns.items():
        if name == "t":
            t = [_parse_time(cell) for cell in cells]
        elif kinds[name] == "category":
            values[name] = [cell or None for cell in cells]
        else:
            values[name] = _parse_numbers(cells, int if kinds[name] == "i64" else float)
    return RawColumns(n, t, values if columns else {f.name: [] for f in stream.fields})


def _parse_numbers(cells: Any, kind: type) -> list[Any]:
    # Python reads 1_000 as a number; nobody who writes it into a CSV means one.
    if "_" not in "".join(cells):
        try:
            return list(map(kind, cells))
        except (ValueError, OverflowError):
            pass
    return [_parse_number(cell, kind) for cell in cells]


def _parse_number(cell: str, kind: type) -> Any:
    if cell.strip() == "":
        return None
    if "_" not in cell:
        for reading in (kind, float):
            try:
                return reading(cell)
            except ValueError:
                continue
    return cell


def _parse_time(cell: Any) -> Any:
    """Epoch seconds, given as such or as RFC 3339; what is neither comes back as it is, to be named."""
    if not isinstance(cell, str):
        return cell
    try:
        return float(cell) if "_" not in cell else cell
    except ValueError:
        pass
    try:
        return parse_rfc3339(cell) / 1e6
    except ValueError:
        return cell


def _read_json_lines(first: str, text: IO[str], name: str, stream: StreamConfig, skip: int) -> Iterator[FileBlock]:
    decoder = msgspec.json.Decoder(dict[str, Any])

    def numbered_lines() -> Iterator[tuple[int, str]]:
        yield 1, first
        yield from enumerate(text, 2)

    lines = numbered_lines()
    while chunk := list(islice(lines, max_block_rows(stream))):
        rows: list[tuple[int, dict[str, Any]]] = []
        bad: dict[int, str] = {}
        for number, line in chunk:
            if number <= skip or not line.strip():
                continue
            try:
                row = decoder.decode(line)
                if line.count(":") != len(row):
                    check_key_count(line.encode(), len(row), row.values())
            except DuplicateKey as error:
                bad[number] = str(error)
                continue
            except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                bad[number] = f"not one JSON object on one line: {str(error)[:120]}"
                continue
            problem = _find_foreign_field(row, name, stream)
            if problem:
                bad[number] = problem
            else:
                rows.append((number, row))
        if rows or bad:
            yield FileBlock(_to_columns(rows, stream), [number for number, _ in rows], bad)


def _find_foreign_field(row: dict[str, Any], name: str, stream: StreamConfig) -> str | None:
    """What in a JSON line does not belong into this stream."""
    if row.get("stream", name) != name:
        return f"this line is for stream {str(row['stream'])[:40]!r}, not for {name!r}"
    known = {f.name for f in stream.fields} | {"t", "stream"}
    extra = next((key for key in row if key not in known), None)
    return None if extra is None else f"{extra!r} is not a field of this stream{did_you_mean(extra, known)}"


def _to_columns(rows: list[tuple[int, dict[str, Any]]], stream: StreamConfig) -> RawColumns:
    t = [_parse_time(row.get("t")) for _, row in rows]
    return RawColumns(len(rows), t, {f.name: [row.get(f.name) for _, row in rows] for f in stream.fields})


def _read_parquet(path: Path, stream: StreamConfig, skip: int) -> Iterator[FileBlock]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path}: Parquet needs pyarrow: pip install 'outstation[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, stream)
            number = 0
            for batch in file.iter_batches(max_block_rows(stream)):
                start = min(max(0, skip - number), batch.num_rows)
                lines = list(range(number + start + 1, number + batch.num_rows + 1))
                number += batch.num_rows
                if lines:
                    columns = {field.name: column[start:] for field, column in zip(batch.schema, batch, strict=True)}
                    t = _parse_parquet_time(columns.pop("t")) if "t" in columns else None
                    values = {name: column.to_pylist() for name, column in columns.items()}
                    yield FileBlock(RawColumns(len(lines), t, values), lines, {})
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise RowRejected(f"not readable as Parquet: {error}") from None


def _parse_parquet_time(column: Any) -> list[Any]:
    """Epoch seconds, given as such or as timestamps; NaN, which is refused, where the column has a gap."""
    import pyarrow

    if not pyarrow.types.is_timestamp(column.type):
        return [math.nan if moment is None else moment for moment in column.to_pylist()]
    if column.type.tz is None:
        raise RowRejected("column 't' holds timestamps without a time zone; write them with one, as UTC, or as seconds")
    moments = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False).cast(pyarrow.int64()).to_pylist()
    return [math.nan if moment is None else moment / 1e6 for moment in moments]


def _check_header(header: list[str], stream: StreamConfig) -> None:
    names = [f.name for f in stream.fields]
    for name in header:
        if name not in names and name != "t":
            raise RowRejected(f"column {name[:40]!r} is not a field of this stream{did_you_mean(name, [*names, 't'])}")
    for name in header:
        if header.count(name) > 1:
            raise RowRejected(f"column {name!r} is there twice")
    for column in stream.fields:
        if column.name not in header and not column.optional:
            raise RowRejected(f"column {column.name!r} is missing; the first line must name the columns")
