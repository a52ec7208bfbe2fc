"""Rows of a stream from data files: CSV, JSON Lines or Parquet, with lines that do not fit named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.config import StreamConfig
from outstation.device.store.rows import RawColumns, row_bytes
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import RowRejected
from outstation.ml.datasets import formats
from outstation.ml.datasets.json_lines import JsonLinesTable
from outstation.ml.datasets.parquet_table import ParquetTable
from outstation.ml.datasets.tables import ColumnType, FilePosition, TableOptions

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


class FileLayout(msgspec.Struct, frozen=True):
    """Layout of a file where it differs from its stream: column → field, columns to leave out, separator of CSV."""

    renamed: dict[str, str] = {}
    ignored: frozenset[str] = frozenset()
    separator: str = ""


AS_STREAM = FileLayout()


def read_blocks(
    path: Path | None,
    file: BufferedReader[Any],
    name: str,
    stream: StreamConfig,
    skip: int = 0,
    memory_bytes: int | None = None,
    layout: FileLayout = AS_STREAM,
) -> Iterator[FileBlock]:
    """Yield the rows of `file` for stream `name` after line `skip`; the format follows from the suffix of `path`.

    `memory_bytes`: what may be taken to decode it.

    Raises RowRejected if the file as a whole is not what the stream needs, UsageError for another format, OSError.
    """
    options = TableOptions(
        *(_READ_BYTES, max_block_rows(stream), _MAX_LINE_BYTES, memory_bytes),
        keep_invalid=True,
        separator=layout.separator,
        check_row=_make_row_check(name, stream, layout),
    )
    table = formats.open_table(path, file, options)
    types = {field.name: _COLUMN_TYPES.get(field.type, ColumnType.FLOAT) for field in stream.fields}
    types["t"] = ColumnType.TIME
    if isinstance(table, JsonLinesTable):
        # If a member is renamed to a field, the field's own name may not be a member.
        sources = {name: name for name in types if name not in layout.ignored}
        sources |= {field: column for column, field in layout.renamed.items()}
    else:
        sources = _find_columns(table.columns, stream, layout)
    if isinstance(table, ParquetTable) and "t" in sources and table.has_naive_times(sources["t"]):
        raise RowRejected("timestamps in column 't' have no time zone; write them as UTC, or as seconds since 1970")
    wanted = {column: types[field] for field, column in sources.items()}
    for block in table.read(wanted, FilePosition(line=skip, row=skip)):
        columns: dict[str, Any] = {field: block.columns[column] for field, column in sources.items()}
        t = columns.pop("t", None)
        if block.lines or block.rejected:
            rejected = {rejection.line: rejection.reason for rejection in block.rejected}
            yield FileBlock(RawColumns(len(block.lines), t, columns), block.lines, rejected)


_TIME_NAMES = ("time", "timestamp", "date", "datetime", "ts")


def _find_columns(columns: Sequence[str], stream: StreamConfig, layout: FileLayout) -> dict[str, str]:
    """Return the column of each field that the file has. Raises RowRejected if the columns are not the stream's."""
    names = [*(field.name for field in stream.fields), "t"]
    sources: dict[str, str] = {}
    for column in layout.renamed:
        if column not in columns:
            raise RowRejected(f"--map: the file has no column {column[:40]!r}{did_you_mean(column, columns)}")
    for column in columns:
        if column in layout.ignored:
            continue
        field = layout.renamed.get(column, column)
        if field not in names:
            is_time = column.lower() in _TIME_NAMES and "t" not in columns
            hint = f"; is it the time? --map {column}=t" if is_time else did_you_mean(field, names)
            raise RowRejected(f"column {column[:40]!r} is not a field of this stream{hint}")
        if field in sources:
            raise RowRejected(f"column {field!r} is there twice")
        sources[field] = column
    for field_config in stream.fields:
        if field_config.name not in sources and not field_config.optional:
            raise RowRejected(f"column {field_config.name!r} is missing; the first line must name the columns")
    return sources


def max_block_rows(stream: StreamConfig) -> int:
    return max(1, min(MAX_BLOCK_ROWS, _MAX_BLOCK_BYTES // row_bytes(stream)))


def _make_row_check(name: str, stream: StreamConfig, layout: FileLayout) -> Callable[[dict[str, Any]], str | None]:
    """Return a function that says why a JSON object does not belong into this stream."""
    fields = {field.name for field in stream.fields} | {"t", "stream"}
    known = (fields - set(layout.renamed.values())) | set(layout.renamed) | layout.ignored

    def check(row: dict[str, Any]) -> str | None:
        if row.get("stream", name) != name:
            return f"this line is for stream {str(row['stream'])[:40]!r}, not for {name!r}"
        extra = next((key for key in row if key not in known), None)
        return None if extra is None else f"{extra!r} is not a field of this stream{did_you_mean(extra, known)}"

    return check
