"""Rows of a stream from data files: CSV, JSON Lines or Parquet, with lines that do not fit named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from agent.config import StreamConfig
from agent.datasets import formats
from agent.datasets.json_lines import JsonLinesTable
from agent.datasets.parquet_table import ParquetTable
from agent.datasets.tables import ColumnType, FilePosition, TableOptions
from agent.device.store.rows import RawColumns, row_bytes
from agent.errors import RowRejected
from agent.toml_files import did_you_mean

MAX_BLOCK_ROWS = 4096
# A block goes into one transaction.
_MAX_BLOCK_BYTES = 512 << 10
_READ_BYTES = 256 << 10
# 6,144 fields with 100 characters each take less.
_MAX_LINE_BYTES = 1 << 20
_COLUMN_TYPES = {"category": ColumnType.TEXT, "i64": ColumnType.INTEGER}


class FileBlock(msgspec.Struct, frozen=True):
    """Rows of a file with the line each begins on (in Parquet, its row); `rejected`: line → reason."""

    raw: RawColumns
    lines: Sequence[int]
    rejected: dict[int, str]


def read_blocks(
    path: Path | None,
    file: BufferedReader[Any],
    name: str,
    stream: StreamConfig,
    skip: int = 0,
    memory_bytes: int | None = None,
) -> Iterator[FileBlock]:
    """Yield the rows of `file` for stream `name` after line `skip`; the format follows from the suffix of `path`.

    `memory_bytes`: what may be taken to decode it.

    Raises RowRejected if the file as a whole is not what the stream needs, UsageError for another format, OSError.
    """
    row_check = _make_row_check(name, stream)
    options = TableOptions(
        *(_READ_BYTES, max_block_rows(stream), _MAX_LINE_BYTES, memory_bytes), keep_invalid=True, check_row=row_check
    )
    table = formats.open_table(path, file, options)
    types = {field.name: _COLUMN_TYPES.get(field.type, ColumnType.FLOAT) for field in stream.fields}
    types["t"] = ColumnType.TIME
    if not isinstance(table, JsonLinesTable):
        names = [field.name for field in stream.fields]
        for column in table.columns:
            if column not in names and column != "t":
                raise RowRejected(
                    f"column {column[:40]!r} is not a field of this stream{did_you_mean(column, [*names, 't'])}"
                )
        for column in table.columns:
            if table.columns.count(column) > 1:
                raise RowRejected(f"column {column!r} is there twice")
        for field in stream.fields:
            if field.name not in table.columns and not field.optional:
                raise RowRejected(f"column {field.name!r} is missing; the first line must name the columns")
        types = {column: types[column] for column in table.columns}
    if isinstance(table, ParquetTable) and "t" in types and table.has_naive_times("t"):
        raise RowRejected("column 't' holds timestamps without a time zone; write them with one, as UTC, or as seconds")
    for block in table.read(types, FilePosition(line=skip, row=skip)):
        columns: dict[str, Any] = dict(block.columns)
        t = columns.pop("t", None)
        if block.lines or block.rejected:
            rejected = {rejection.line: rejection.reason for rejection in block.rejected}
            yield FileBlock(RawColumns(len(block.lines), t, columns), block.lines, rejected)


def max_block_rows(stream: StreamConfig) -> int:
    return max(1, min(MAX_BLOCK_ROWS, _MAX_BLOCK_BYTES // row_bytes(stream)))


def _make_row_check(name: str, stream: StreamConfig) -> Callable[[dict[str, Any]], str | None]:
    """Return a function that says why a JSON object does not belong into this stream."""
    known = {field.name for field in stream.fields} | {"t", "stream"}

    def check(row: dict[str, Any]) -> str | None:
        if row.get("stream", name) != name:
            return f"this line is for stream {str(row['stream'])[:40]!r}, not for {name!r}"
        extra = next((key for key in row if key not in known), None)
        return None if extra is None else f"{extra!r} is not a field of this stream{did_you_mean(extra, known)}"

    return check
