"""Files of readings to blocks of columns: CSV, JSON Lines and Parquet, never the whole file in memory."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from agent.clock import epoch_us
from agent.config import Stream, suggestion
from agent.device.rows import Raw
from agent.errors import Rejected, UsageError

BLOCK = 4096
SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a file with the number of the line (row, in Parquet) each came from; `bad` line → reason."""

    raw: Raw
    lines: list[int]
    bad: dict[int, str]


def blocks(path: Path | None, text: IO[str], stream: Stream, skip: int = 0) -> Iterator[Block]:
    """Blocks of `text`, whose format its path's suffix tells, from the line after `skip` on.

    Without a path the first character tells JSON Lines from CSV. Raises Rejected where the file as a whole is not
    what the stream needs, UsageError for a format that cannot be read.
    """
    suffix = path.suffix.lower() if path else ""
    if suffix == ".parquet" and path is not None:
        yield from _parquet(path, stream, skip)
        return
    first = text.readline()
    if suffix in (".jsonl", ".ndjson") or (suffix != ".csv" and first.lstrip().startswith("{")):
        yield from _json_lines(first, text, stream, skip)
    elif suffix in (".csv", ".txt", ""):
        yield from _csv(first, text, stream, skip)
    else:
        raise UsageError(f"{path}: {suffix} is not read; use one of {', '.join(SUFFIXES)}")


def _csv(first: str, text: IO[str], stream: Stream, skip: int) -> Iterator[Block]:
    header = [name.strip() for name in next(csv.reader([first]), [])]
    _check_header(header, stream)
    reader = csv.reader(text)
    lines = enumerate(reader, 2)
    while True:
        chunk = [(number, row) for number, row in _without_errors(islice(lines, BLOCK)) if number > skip]
        good = [(number, row) for number, row in chunk if len(row) == len(header)]
        bad = {
            number: f"{len(row)} values, the header names {len(header)}"
            for number, row in chunk
            if row and len(row) != len(header)
        }
        if good or bad:
            columns = dict(zip(header, zip(*(row for _, row in good), strict=True), strict=True)) if good else {}
            yield Block(_typed(columns, len(good), stream), [number for number, _ in good], bad)
        if not chunk and _ended(text):
            return


def _without_errors(lines: Any) -> Iterator[tuple[int, list[str]]]:
    while True:
        try:
            yield next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise Rejected(f"not readable as CSV: {error}") from None


def _ended(text: IO[str]) -> bool:
    return text.read(1) == ""


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
    try:
        return list(map(kind, cells))
    except ValueError:
        return [_number(cell, kind) for cell in cells]


def _number(cell: str, kind: type) -> Any:
    if cell.strip() == "":
        return None
    try:
        return kind(cell)
    except ValueError:
        return cell


def _time(cell: Any) -> Any:
    """Epoch seconds, given as such or as RFC 3339."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        try:
            return epoch_us(str(cell)) / 1e6
        except ValueError:
            return cell


def _json_lines(first: str, text: IO[str], stream: Stream, skip: int) -> Iterator[Block]:
    known = {f.name for f in stream.fields} | {"t", "stream"}
    decoder = msgspec.json.Decoder(dict[str, Any])

    def everything() -> Iterator[tuple[int, str]]:
        yield 1, first
        yield from enumerate(text, 2)

    lines = everything()
    while chunk := list(islice(lines, BLOCK)):
        rows: list[tuple[int, dict[str, Any]]] = []
        bad: dict[int, str] = {}
        for number, line in chunk:
            if number <= skip or not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except (msgspec.MsgspecError, ValueError) as error:
                bad[number] = f"not one JSON object on one line: {str(error)[:120]}"
                continue
            extra = next((name for name in row if name not in known), None)
            if extra is not None:
                bad[number] = f"{extra!r} is not a field of this stream{suggestion(extra, known)}"
            else:
                rows.append((number, row))
        if rows or bad:
            yield Block(_by_column(rows, stream), [number for number, _ in rows], bad)


def _by_column(rows: list[tuple[int, dict[str, Any]]], stream: Stream) -> Raw:
    t = [_time(row["t"]) if "t" in row else None for _, row in rows] if any("t" in row for _, row in rows) else None
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
            for batch in file.iter_batches(BLOCK):
                columns = batch.to_pydict()
                lines = list(range(number + 1, number + batch.num_rows + 1))
                number += batch.num_rows
                start = sum(line <= skip for line in lines)
                t = columns.pop("t", None)
                moments = [_parquet_time(moment) for moment in t[start:]] if t else None
                values = {name: column[start:] for name, column in columns.items()}
                if lines[start:]:
                    yield Block(Raw(len(lines) - start, moments, values), lines[start:], {})
    except (pyarrow.ArrowException, OSError) as error:
        raise Rejected(f"not readable as Parquet: {error}") from None


def _parquet_time(moment: Any) -> Any:
    return moment.timestamp() if hasattr(moment, "timestamp") else moment


def _check_header(header: list[str], stream: Stream) -> None:
    names = [f.name for f in stream.fields]
    for name in header:
        if name not in names and name != "t":
            raise Rejected(f"column {name!r} is not a field of this stream{suggestion(name, [*names, 't'])}")
    for name in header:
        if header.count(name) > 1:
            raise Rejected(f"column {name!r} is there twice")
    for column in stream.fields:
        if column.name not in header and not column.optional:
            raise Rejected(f"column {column.name!r} is missing; the first line must name the columns")
