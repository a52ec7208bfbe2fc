"""CSV in blocks of bytes: numbers are parsed in C; a block in which that fails is read line by line, for reasons."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from agent.datasets.blocks import (
    MISSING_VALUES,
    FilePosition,
    RowBlock,
    RowRejection,
    TextColumn,
    require_columns,
    row_times,
)
from agent.errors import UsageError
from agent.model.inference.features import Floats

BLOCK_BYTES = 4 << 20
_MAX_ROW_BYTES = 64 << 20  # a row
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf(inity)?|nan)", re.IGNORECASE | re.ASCII)
_MAX_CELL_BYTES = 64 << 10
_CLOSING_QUOTE = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')
_ParsedColumns = tuple[list[NDArray[np.float64]], dict[str, TextColumn]]


class CsvReader:
    """The first line names the columns. An empty cell is a missing value; `t`, if there, is epoch seconds."""

    def __init__(
        self, path: Path, fields: Sequence[str], text_columns: Sequence[str] = (), block_bytes: int = BLOCK_BYTES
    ) -> None:
        """Raises UsageError."""
        self.path, self._block_bytes = path, block_bytes
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                first = file.readline(_MAX_ROW_BYTES)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        if not first.strip():
            raise UsageError(f"{path}: empty; the first line must name the columns")
        self._header_bytes = len(first)
        header = next(csv.reader([first.decode("utf-8-sig", "replace")]), [])
        self.columns = [name.strip() for name in header]
        self._fields, self._text_columns = list(fields), list(text_columns)
        require_columns(path, self.columns, [*self._fields, *self._text_columns])
        self._has_time = "t" in self.columns
        self._number_columns = [*self._fields, *(["t"] if self._has_time else [])]

    def progress(self, position: FilePosition) -> int:
        return position.offset

    def blocks(self, position: FilePosition) -> Iterator[RowBlock]:
        position = position if position.offset else FilePosition(self._header_bytes, 1, 0, 0)
        try:
            with self.path.open("rb") as file:
                file.seek(position.offset)
                for content, tidy in self._read_chunks(file):
                    block = self._parse_block(content, position, tidy)
                    position = block.next_position
                    yield block
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read: {error.strerror or error}") from None

    def _read_chunks(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Whole lines, at most `block` bytes of them, and whether all quotation marks are round cells.

        From the start of a piece on, always the same pieces.
        """
        size, left, ended = self._block_bytes, b"", False
        while left or not ended:
            if len(left) < size and not ended:
                piece = file.read(size - len(left))
                left, ended = left + piece, not piece
            end, tidy = _complete_lines_end(left[:size], at_eof=ended and len(left) <= size)
            if end:
                yield left[:end], tidy
                size, left = self._block_bytes, left[end:]
            elif len(left) >= size:
                size *= 2
                if size > _MAX_ROW_BYTES:
                    raise UsageError(
                        f"{self.path}: a row longer than {_MAX_ROW_BYTES >> 20} MiB; are these lines of text?"
                    )

    def _parse_block(self, content: bytes, position: FilePosition, well_quoted: bool) -> RowBlock:
        rejected: list[RowRejection] = []
        parsed = self._parse_with_arrow(content) if well_quoted else None
        if parsed is None:
            parsed, kept, count, rejected = self._parse_lines(content, position)
            number = position.row + 1 + np.asarray(kept, np.int64)
        else:
            count = len(parsed[0][0])
            number = np.arange(position.row + 1, position.row + count + 1, dtype=np.int64)
        columns, texts = parsed
        t = row_times(columns[-1] if self._has_time else None, number, position.t)
        lines = content.count(b"\n")
        after = FilePosition(
            position.offset + len(content),
            position.line + lines,
            position.row + count,
            int(t[-1]) if len(t) else position.t,
        )
        return RowBlock(_stack_columns(columns[: len(self._fields)]), t, number, after, texts, rejected)

    def _parse_with_arrow(self, content: bytes) -> _ParsedColumns | None:
        """None where a cell or a line is not what it should be."""
        try:
            import pyarrow as pa
            from pyarrow import csv as arrow
        except ImportError:
            return None if self._text_columns else self._parse_with_numpy(content)
        # What is a number for the model may be a name for a slice: such a column is read as text first.
        types = dict.fromkeys(self._number_columns, pa.float64()) | dict.fromkeys(self._text_columns, pa.string())
        read = arrow.ReadOptions(
            column_names=_unique_names(self.columns), use_threads=False, block_size=max(len(content) + 1, 1024)
        )
        parse = arrow.ParseOptions(newlines_in_values=b'"' in content)
        convert = arrow.ConvertOptions(
            include_columns=list(types), column_types=types, null_values=list(MISSING_VALUES), strings_can_be_null=False
        )
        try:
            table = arrow.read_csv(pa.py_buffer(content), read, parse, convert)
            numbers = [
                _to_numbers(table[name], pa) if name in self._text_columns else table[name].to_numpy()
                for name in self._number_columns
            ]
        except pa.ArrowInvalid:
            return None
        return numbers, {name: np.asarray(table[name].to_pylist(), np.str_) for name in self._text_columns}

    def _parse_with_numpy(self, content: bytes) -> _ParsedColumns | None:
        """Without pyarrow; a block with a missing value is read line by line."""
        if b'"' in content:
            return None
        places = [self.columns.index(name) for name in self._number_columns]
        try:
            table = np.loadtxt(io.BytesIO(content), np.float64, comments=None, delimiter=",", ndmin=2)
        except ValueError:
            return None
        if table.shape[1] != len(self.columns):
            return None
        return [table[:, place] for place in places], {}

    def _parse_lines(
        self, content: bytes, position: FilePosition
    ) -> tuple[_ParsedColumns, list[int], int, list[RowRejection]]:
        """Line by line: (columns, which rows were taken, how many there are, what was rejected)."""
        lines = csv.reader(io.StringIO(content.decode("utf-8", "replace"), newline=""))
        places = [self.columns.index(name) for name in self._number_columns]
        named = [self.columns.index(name) for name in self._text_columns]
        cells: list[list[float]] = []
        texts: list[list[str]] = []
        kept: list[int] = []
        rejected: list[RowRejection] = []
        count = 0
        while True:
            first = position.line + lines.line_num + 1
            try:
                line = next(lines, None)
                if line is None:
                    break
                if not line:
                    continue
                if len(line) != len(self.columns):
                    raise ValueError(f"{len(line)} cells, the first line names {len(self.columns)}")
                cells.append([_parse_number(line[i], self.columns[i]) for i in places])
                texts.append([line[i] for i in named])
                kept.append(count)
            except (ValueError, csv.Error) as error:
                rejected.append(RowRejection(first, str(error)))
            count += 1
        table = np.array(cells, np.float64).reshape(len(kept), len(places))
        columns = np.array(texts, np.str_).reshape(len(kept), len(named))
        parsed = [table[:, i] for i in range(len(places))], {n: columns[:, i] for i, n in enumerate(self._text_columns)}
        return parsed, kept, count, rejected


def _parse_number(text: str, name: str) -> float:
    text = text.strip()
    if text in MISSING_VALUES:
        return np.nan
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{name}: {text[:40]!r} is no number")
    return float(text)


def _to_numbers(column: Any, pa: Any) -> Any:
    from pyarrow import compute

    missing = compute.is_in(column, value_set=pa.array(MISSING_VALUES))
    return compute.if_else(missing, pa.scalar(None, pa.string()), column).cast(pa.float64()).to_numpy()


def _stack_columns(columns: Sequence[NDArray[np.float64]]) -> Floats:
    out = np.empty((len(columns[0]) if columns else 0, len(columns)), np.float32)
    with np.errstate(over="ignore"):
        for i, column in enumerate(columns):
            out[:, i] = column
    return out


def _unique_names(names: Sequence[str]) -> list[str]:
    """Columns nobody asks for may share a name, or have none."""
    return [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]


def _complete_lines_end(content: bytes, *, at_eof: bool) -> tuple[int, bool]:
    """(end of the last line that is whole, whether all quotation marks are round cells); the file `ended` there or not.

    A quotation mark at the start of a cell that none closes is only a mistake of its line: the lines end with it, so
    that it swallows no more.
    """
    safe, at, round_cells = 0, 0, 0
    while (opened := _find_opening_quote(content, at)) >= 0:
        first = opened + 1
        safe = content.rfind(b"\n", at, first) + 1 or safe
        closed = _CLOSING_QUOTE.match(content, first, first + _MAX_CELL_BYTES)
        if closed is None:
            if not at_eof and len(content) - first < _MAX_CELL_BYTES:
                return safe, _is_well_quoted(content, safe, round_cells)
            stray = content.find(b"\n", first) + 1
            return (stray or len(content)) if stray or at_eof else safe, False
        at = closed.end()
        round_cells += content.count(b'"', opened, at)
    safe = content.rfind(b"\n", at) + 1 or safe
    end = len(content) if at_eof else safe
    return end, _is_well_quoted(content, end, round_cells)


def _find_opening_quote(content: bytes, start: int) -> int:
    """Where the next cell begins with a quotation mark; -1 without one."""
    while (found := content.find(b'"', start)) >= 0:
        if found == 0 or content[found - 1] in b",\n":
            return found
        start = found + 1
    return -1


def _is_well_quoted(content: bytes, end: int, quote_count: int) -> bool:
    return content.count(b'"', 0, end) == quote_count
