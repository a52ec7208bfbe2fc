"""CSV files: parsed in C, a block of whole lines at a time.

A block with a cell or a line that does not fit is parsed line by line, so that each bad row is rejected with a reason.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from outstation.foundation.errors import RowRejected
from outstation.ml.datasets import tables
from outstation.ml.datasets.tables import (
    START,
    ColumnType,
    FilePosition,
    RowRejection,
    TableBlock,
    TableOptions,
    remove_decimal_commas,
)

_MAX_CELL_BYTES = 64 << 10
_MAX_EXACT_INTEGER = 2**53
_CLOSING_QUOTE = re.compile(rb'[^"]*(?:""[^"]*)*"(?!")')
# Longest text with a line break in it that is a value; beyond it a quote was not closed.
_MAX_MULTILINE_CHARS = 64
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?([eE][+-]?\d+)?")
_Columns = dict[str, np.ndarray[Any, Any]]


class CsvTable:
    """CSV whose first line names the columns; an empty cell is a missing value.

    Cells are separated by commas, or by semicolons or tabs where the first line has no comma. Then a number may have a
    decimal comma.
    """

    def __init__(self, file: io.BufferedReader[Any], options: TableOptions) -> None:
        """Raise RowRejected if the first line does not name columns, OSError."""
        self._file, self._options = file, options
        first, self._pending = tables.read_first_line(file), b""
        if not first.strip():
            raise RowRejected("the file is empty; its first line must name the columns")
        # Old Macs end lines with this: it is one byte, too, so that offsets stay right.
        self._is_mac = b"\r" in first.rstrip(b"\r\n")
        if self._is_mac:
            end = first.index(b"\r") + 1
            first, self._pending = first[:end], first[end:].replace(b"\r", b"\n")
        self._first_row = FilePosition(len(first), 1)
        text = first.decode("utf-8-sig", "replace")
        self._separator = options.separator or _find_separator(text)
        header = next(csv.reader([text], delimiter=self._separator), [])
        self.columns = [name.strip() for name in header]
        if "\0" in text:
            raise RowRejected("this is no text; give CSV, JSON Lines or Parquet")
        if self.columns and all(map(_NUMBER.fullmatch, self.columns)):
            raise RowRejected("the first line has only numbers; it must name the columns, such as t,ax,ay")

    def read(self, columns: Mapping[str, ColumnType], position: FilePosition = START) -> Iterator[TableBlock]:
        last_skipped_line, pending = position.line, self._pending
        if position.offset:
            self._file.seek(position.offset)
            last_skipped_line, pending = 0, b""
        else:
            position = self._first_row
        for content, well_quoted in self._read_chunks(pending):
            block = self._parse_chunk(content, columns, position, well_quoted=well_quoted)
            position = block.next_position
            blocks = [block.after_line(last_skipped_line)] if position.line > last_skipped_line else []
            # Nothing here keeps a block in memory while its rows are worked on.
            del content, block
            while blocks:
                yield blocks.pop()

    def _read_chunks(self, pending: bytes) -> Iterator[tuple[bytes, bool]]:
        """Yield whole lines, and whether all quotation marks enclose whole cells.

        From the start of a chunk on, the chunks are always the same. Raises RowRejected; OSError only after the last
        whole line before it.
        """
        size, line_limit, at_eof = self._options.block_bytes, self._options.max_rows, False
        is_pipe = not self._file.seekable()
        error: OSError | None = None
        while pending or not at_eof:
            while len(pending) < size and not at_eof:
                try:
                    piece = self._file.read1(size - len(pending))
                except OSError as problem:
                    error, piece = problem, b""
                pending, at_eof = pending + (piece.replace(b"\r", b"\n") if self._is_mac else piece), not piece
                if is_pipe:
                    # Its present content, without waiting for a whole block.
                    break
            limit = min(size, len(pending)) if line_limit is None else _find_line_end(pending, line_limit, size)
            end, well_quoted = _complete_lines_end(
                pending[:limit], self._separator, at_eof=at_eof and error is None and limit == len(pending)
            )
            if end:
                yield pending[:end], well_quoted
                size, line_limit, pending = self._options.block_bytes, self._options.max_rows, pending[end:]
            elif line_limit is not None and limit < min(size, len(pending)):
                line_limit *= 2
            elif len(pending) >= size:
                size *= 2
                if size > self._options.max_line_bytes:
                    raise RowRejected(tables.describe_long_line(self._options))
            elif error is not None:
                raise error

    def _parse_chunk(
        self, content: bytes, types: Mapping[str, ColumnType], position: FilePosition, *, well_quoted: bool
    ) -> TableBlock:
        columns = None
        line_count = content.count(b"\n") + (not content.endswith(b"\n"))
        if well_quoted and content.count(b"\r") == content.count(b"\r\n"):
            columns = self._parse_fast(content, types, line_count)
        if columns is None:
            return self._parse_lines(content, types, position)
        row_count = len(next(iter(columns.values())))
        rows, first_line = range(position.row + 1, position.row + row_count + 1), position.line + 1
        lines = range(first_line, first_line + row_count) if row_count == line_count else range(0)
        end = FilePosition(position.offset + len(content), position.line + line_count, position.row + row_count)
        return TableBlock(columns, rows, lines, [], end)

    def _parse_fast(self, content: bytes, types: Mapping[str, ColumnType], line_count: int) -> _Columns | None:
        """Return the columns of a block in which every cell is what it should be, else None."""
        if not self._options.keep_invalid:
            try:
                return _parse_with_pyarrow(content, self.columns, types, self._separator)
            except ImportError:
                pass
        if b'"' in content or content.isspace() or ColumnType.TEXT in types.values():
            return None
        return _parse_with_numpy(content, self.columns, types, line_count, self._separator)

    def _parse_lines(self, content: bytes, types: Mapping[str, ColumnType], position: FilePosition) -> TableBlock:
        keep_invalid = self._options.keep_invalid
        longest = _MAX_MULTILINE_CHARS if keep_invalid else _MAX_CELL_BYTES
        max_multiline = [longest if types.get(name, ColumnType.TEXT) is ColumnType.TEXT else 0 for name in self.columns]
        text = content.decode("utf-8", "surrogateescape")
        records, line_count = _read_records(text, max_multiline, self._separator)
        first_line, first_row = position.line + 1, position.row + 1
        valid = [(i, line, cells) for i, (line, cells) in enumerate(records) if not isinstance(cells, str)]
        rejected = [RowRejection(first_line + line, why) for line, why in records if isinstance(why, str)]
        rows, lines = [first_row + i for i, _, _ in valid], [first_line + line for _, line, _ in valid]
        by_column = zip(*(cells for _, _, cells in valid), strict=True) if valid else [()] * len(self.columns)
        cells: dict[str, Sequence[str]] = {
            name: column if self._separator == "," or types[name] is ColumnType.TEXT else remove_decimal_commas(column)
            for name, column in zip(self.columns, by_column, strict=True)
            if name in types
        }
        end = FilePosition(position.offset + len(content), position.line + line_count, position.row + len(records))
        block = TableBlock(dict(cells), rows, lines, rejected, end)
        if not keep_invalid:
            return tables.convert_block(block, types)
        return replace(
            block, columns={name: tables.keep_invalid_values(cells[name], kind) for name, kind in types.items()}
        )


def _find_separator(first_line: str) -> str:
    return next((mark for mark in (",", ";", "\t") if mark in first_line), ",")


def _parse_with_pyarrow(
    content: bytes, names: Sequence[str], types: Mapping[str, ColumnType], separator: str
) -> _Columns | None:
    import pyarrow as pa
    from pyarrow import csv as arrow

    # Columns that nobody asks for may share a name, or have none.
    unique = [name if names.index(name) == i else f"{name} ({i})" for i, name in enumerate(names)]
    wanted = {name: pa.string() if kind is ColumnType.TEXT else pa.float64() for name, kind in types.items()}
    read = arrow.ReadOptions(column_names=unique, use_threads=False, block_size=max(len(content) + 1, 1024))
    parse = arrow.ParseOptions(delimiter=separator, newlines_in_values=b'"' in content)
    convert = arrow.ConvertOptions(
        include_columns=list(wanted),
        column_types=wanted,
        null_values=list(tables.MISSING_VALUES),
        strings_can_be_null=False,
    )
    try:
        table = arrow.read_csv(pa.py_buffer(content), read, parse, convert)
    except pa.ArrowInvalid:
        return None
    return {
        name: np.asarray(table[name].to_pylist(), np.str_) if kind is ColumnType.TEXT else table[name].to_numpy()
        for name, kind in types.items()
    }


def _parse_with_numpy(
    content: bytes, names: Sequence[str], types: Mapping[str, ColumnType], line_count: int, separator: str
) -> _Columns | None:
    try:
        table = np.loadtxt(io.BytesIO(content), np.float64, comments=None, delimiter=separator, ndmin=2)
    except ValueError:
        return None
    if table.shape != (line_count, len(names)):
        return None
    columns: _Columns = {}
    for name, column_type in types.items():
        column = columns[name] = table[:, names.index(name)]
        if column_type is ColumnType.INTEGER:
            if not (np.abs(column) < _MAX_EXACT_INTEGER).all() or (column != np.rint(column)).any():
                return None
            columns[name] = column.astype(np.int64)
    return columns


def _read_records(
    text: str, max_multiline: Sequence[int], separator: str
) -> tuple[list[tuple[int, list[str] | str]], int]:
    """Return (line from 0, its cells or why it is no record) of all but blank lines, and the number of lines."""
    width = len(max_multiline)
    if '"' not in text:
        try:
            # Each line is a record.
            lines = list(csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator))
            return [(i, _check_width(cells, width)) for i, cells in enumerate(lines) if cells], len(lines)
        except csv.Error:
            pass
    records: list[tuple[int, list[str] | str]] = []
    taken: list[str] = []

    def next_lines() -> Iterator[str]:
        for line in io.StringIO(text, newline=""):
            taken.append(line)
            yield line

    reader, number = csv.reader(next_lines(), strict=True, delimiter=separator), 0
    while (cells := _read_record(reader, width)) is not None:
        if len(taken) > 1 and (isinstance(cells, str) or _has_stray_break(cells, max_multiline)):
            # A quotation mark that nothing closes took in the lines after it: parse each by itself.
            each = (csv.reader([line], strict=True, delimiter=separator) for line in taken)
            alone = [_read_record(reader_of_line, width) for reader_of_line in each]
            records += [(number + i, cells) for i, cells in enumerate(alone) if cells]
        elif cells:
            records.append((number, cells))
        number += len(taken)
        taken.clear()
    return records, number


def _read_record(reader: Any, width: int) -> list[str] | str | None:
    """Return the cells of the next record, none for a blank line, the reason if it is none, or None at the end."""
    try:
        cells: list[str] | None = next(reader, None)
    except csv.Error as error:
        return f"not readable as CSV: {error}"
    return _check_width(cells, width) if cells else cells


def _check_width(cells: list[str], width: int) -> list[str] | str:
    return cells if len(cells) == width else f"{len(cells)} values, the header names {width}"


def _has_stray_break(cells: Sequence[str], max_multiline: Sequence[int]) -> bool:
    return any(
        ("\n" in cell or "\r" in cell) and len(cell) > longest
        for cell, longest in zip(cells, max_multiline, strict=True)
    )


def _find_line_end(content: bytes, line_count: int, size: int) -> int:
    """Return where the first `line_count` lines of `content` end, `size` at most."""
    view = np.frombuffer(content[:size], np.uint8)
    breaks = view == ord("\n")
    if b"\r" in content:
        breaks[:-1] |= (view[:-1] == ord("\r")) & (view[1:] != ord("\n"))
    ends = np.flatnonzero(breaks)
    return int(ends[line_count - 1]) + 1 if len(ends) >= line_count else len(view)


def _complete_lines_end(content: bytes, separator: str, *, at_eof: bool) -> tuple[int, bool]:
    """Return the end of the last whole line, and whether all quotation marks up to there enclose whole cells.

    A quotation mark that opens a cell and is never closed is a mistake of its own line: the lines end with it, so
    that it takes in no more.
    """
    safe, at, quote_count, mark = 0, 0, 0, separator.encode()
    while (opened := _find_opening_quote(content, at, mark)) >= 0:
        first = opened + 1
        safe = content.rfind(b"\n", at, first) + 1 or safe
        closed = _CLOSING_QUOTE.match(content, first, first + _MAX_CELL_BYTES)
        if closed is None:
            if not at_eof and len(content) - first < _MAX_CELL_BYTES:
                return safe, content.count(b'"', 0, safe) == quote_count
            stray = content.find(b"\n", first) + 1
            return (stray or len(content)) if stray or at_eof else safe, False
        at = closed.end()
        if content[at : at + 1] in (b"", mark, b"\r", b"\n"):
            quote_count += content.count(b'"', opened, at)
    safe = content.rfind(b"\n", at) + 1 or safe
    end = len(content) if at_eof else safe
    return end, content.count(b'"', 0, end) == quote_count


def _find_opening_quote(content: bytes, start: int, separator: bytes) -> int:
    """Return where the next cell begins with a quotation mark; -1 without one."""
    while (at := content.find(b'"', start)) >= 0:
        if at == 0 or content[at - 1] in separator + b"\r\n":
            return at
        start = at + 1
    return -1
