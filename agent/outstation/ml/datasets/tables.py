"""Tables: rows of a data file as columns, a block at a time, with row numbers and rejected rows.

A table knows columns by name and their types. It knows neither streams nor models.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from io import BufferedReader
from typing import Any, Protocol

import msgspec
import numpy as np

from outstation.foundation.clock import parse_rfc3339
from outstation.foundation.errors import RowRejected

BLOCK_BYTES = 4 << 20
MISSING_VALUES = ("", "NaN", "nan", "NA", "N/A", "null", "NULL", "None")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_FIRST_LINE_BYTES = 1 << 17
_DECIMAL_COMMA = re.compile(r"\s*[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?\s*")


class ColumnType(Enum):
    """Type of a column; TIME is seconds since 1970: a number, RFC 3339, or a Parquet timestamp."""

    FLOAT = "float"
    INTEGER = "integer"
    TIME = "time"
    TEXT = "text"


class FilePosition(msgspec.Struct, frozen=True):
    """Place to resume reading at: bytes, lines and rows read so far, and `t` of the last row, epoch µs."""

    offset: int = 0
    line: int = 0
    row: int = 0
    t: int = 0


START = FilePosition()


class RowRejection(msgspec.Struct, frozen=True):
    """Rejected row; `file` names the member of a folder that is read as one source."""

    line: int
    reason: str
    file: str = ""


class TableBlock(msgspec.Struct, frozen=True):
    """Consecutive rows; the next block begins at `next_position`.

    `columns`: name → (n,) array, or, of a table that keeps invalid values, n Python values with None for missing.
    `row_numbers` count the rows of the file from 1, rejected rows included. `lines` are the lines the rows begin on,
    empty if pyarrow parsed the block.
    """

    columns: dict[str, Any]
    row_numbers: Sequence[int]
    lines: Sequence[int]
    rejected: list[RowRejection]
    next_position: FilePosition

    def after_line(self, line: int) -> TableBlock:
        """Return the part that begins after `line`."""
        start = bisect_right(self.lines, line)
        if not start and (self.lines or not line):
            return self
        columns = {name: column[start:] for name, column in self.columns.items()}
        rejected = [rejection for rejection in self.rejected if rejection.line > line]
        return TableBlock(columns, self.row_numbers[start:], self.lines[start:], rejected, self.next_position)


class TableOptions(msgspec.Struct, frozen=True):
    """Size of blocks, and the rows to reject.

    A row with a value of another type than its column's is rejected; with `keep_invalid` it stays, with the value as
    the file has it, and pyarrow is not used but for Parquet. `check_row` returns the reason to reject a JSON object.
    `separator` is that of CSV; without one it follows from the first line. A file with a line above `max_line_bytes`,
    or a Parquet row group that needs more than half of `memory_bytes`, is rejected.
    """

    block_bytes: int = BLOCK_BYTES
    max_rows: int | None = None
    max_line_bytes: int = 64 << 20
    memory_bytes: int | None = None
    keep_invalid: bool = False
    separator: str = ""
    check_row: Callable[[dict[str, Any]], str | None] = lambda _: None


DEFAULT_OPTIONS = TableOptions()


class Table(Protocol):
    columns: list[str]

    def read(self, columns: Mapping[str, ColumnType], position: FilePosition = START) -> Iterator[TableBlock]:
        """Yield blocks of the named columns from `position` on.

        Without an offset, `position` says which lines to leave out. Raises RowRejected if the file is damaged.
        """
        ...


def read_first_line(file: BufferedReader[Any]) -> bytes:
    """Return the first line. Raises RowRejected if it never ends, OSError."""
    line = file.readline(_MAX_FIRST_LINE_BYTES)
    if len(line) >= _MAX_FIRST_LINE_BYTES and b"\r" not in line and not line.endswith(b"\n"):
        raise RowRejected(f"the first line has no end within {_MAX_FIRST_LINE_BYTES} bytes")
    return line


def describe_long_line(options: TableOptions) -> str:
    return f"a row is longer than {options.max_line_bytes >> 20} MiB; are these lines of text?"


def convert_block(block: TableBlock, types: Mapping[str, ColumnType]) -> TableBlock:
    """Convert cell texts or JSON values to arrays of numbers and texts; reject rows with values of another type."""
    row_count = len(block.row_numbers)
    columns: dict[str, np.ndarray[Any, Any]] = {}
    invalid: dict[int, str] = {}
    for name, column_type in types.items():
        if column_type is ColumnType.TEXT:
            texts = ["" if value is None else _printable(value) for value in block.columns[name]]
            columns[name] = np.array(texts, np.str_)
            continue
        parse, noun = (_parse_time, "time") if column_type is ColumnType.TIME else (_parse_number, "number")
        numbers = columns[name] = np.empty(row_count)
        for i, value in enumerate(block.columns[name]):
            try:
                numbers[i] = parse(value)
            except (ValueError, OverflowError):
                shown = value.strip()[:40] if isinstance(value, str) else str(value)[:40]
                invalid.setdefault(i, f"{name}: {shown!r} is no {noun}")
    valid = np.ones(row_count, bool)
    valid[list(invalid)] = False
    rejected = [*block.rejected, *(RowRejection(block.lines[i], reason) for i, reason in invalid.items())]
    return TableBlock(
        {name: column[valid] for name, column in columns.items()} if invalid else columns,
        [number for i, number in enumerate(block.row_numbers) if i not in invalid],
        [line for i, line in enumerate(block.lines) if i not in invalid],
        sorted(rejected, key=lambda rejection: rejection.line),
        block.next_position,
    )


def keep_invalid_values(cells: Sequence[str], column_type: ColumnType) -> list[Any]:
    """Convert the cell texts that can be converted; leave the others, and return None for empty ones."""
    if column_type is ColumnType.TEXT:
        return [cell or None for cell in cells]
    if column_type is ColumnType.TIME:
        return [time_or_value(cell) for cell in cells]
    number: type[int] | type[float] = int if column_type is ColumnType.INTEGER else float
    joined = "".join(cells)
    # Python reads 1_000 as a number; nobody who writes it into a CSV means one.
    if joined.isascii() and "_" not in joined:
        try:
            return list(map(number, cells))
        except (ValueError, OverflowError):
            pass
    return [_number_or_text(cell, number) for cell in cells]


def remove_decimal_commas(cells: Sequence[str]) -> list[str]:
    """Return cells with numbers such as 21,5 written as 21.5."""
    return [cell.replace(",", ".") if _DECIMAL_COMMA.fullmatch(cell) else cell for cell in cells]


def _number_or_text(cell: str, number: type[int] | type[float]) -> Any:
    if not cell.strip():
        return None
    if cell.isascii() and "_" not in cell:
        for convert in (number, float):
            try:
                return convert(cell)
            except ValueError:
                continue
    return cell


def time_or_value(value: Any) -> Any:
    """Return seconds since 1970 if `value` is a text that gives them, else `value`."""
    if not isinstance(value, str):
        return value
    try:
        return _parse_time(value) if value.strip() else value
    except ValueError:
        return value


def _parse_number(value: Any) -> float:
    """Return a number, NaN if missing. Raises ValueError, OverflowError."""
    if isinstance(value, str):
        value = value.strip()
        if value in MISSING_VALUES:
            return np.nan
        if not value.isascii() or "_" in value:
            raise ValueError(value)
        return float(value)
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _parse_time(value: Any) -> float:
    """Return seconds since 1970, NaN if missing. Raises ValueError, OverflowError."""
    try:
        return _parse_number(value)
    except ValueError:
        if not isinstance(value, str):
            raise
        return parse_rfc3339(value.strip()) / 1e6


def _printable(value: Any) -> str:
    """Return the text with bytes that are not UTF-8 replaced: they came as surrogates, which cannot be written."""
    text = str(value)
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
