"""JSON Lines files: an object on each line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any

import msgspec

from outstation.foundation import decoders
from outstation.foundation.errors import RowRejected
from outstation.foundation.strict_json import DuplicateKey, check_key_count
from outstation.ml.datasets import tables
from outstation.ml.datasets.tables import START, ColumnType, FilePosition, RowRejection, TableBlock, TableOptions

_BLOCK_ROWS = 4096


class JsonLinesTable:
    """JSON Lines, with the members of the first object as columns; a member that an object lacks is a missing value."""

    def __init__(self, file: BufferedReader[Any], options: TableOptions) -> None:
        """Raise RowRejected if the first line never ends, OSError."""
        self._file, self._options = file, options
        self._decoder = decoders.json_decoder(dict[str, Any])
        first = tables.read_first_line(file)
        self._first_line = first.removeprefix(tables.BYTE_ORDER_MARK)
        self._mark_bytes = len(first) - len(self._first_line)
        first_row = self._decode(self._first_line)
        self.columns = [] if isinstance(first_row, str) else list(first_row)

    def read(self, columns: Mapping[str, ColumnType], position: FilePosition = START) -> Iterator[TableBlock]:
        last_skipped_line = position.line
        pending = b""
        if position.offset:
            self._file.seek(position.offset)
            last_skipped_line = 0
        else:
            pending, position = self._first_line, FilePosition(self._mark_bytes)
        while chunk := self._read_lines(pending):
            pending = b""
            block = self._parse_lines(chunk, columns, position)
            position = block.next_position
            yield block.after_line(last_skipped_line)
        if not position.row:
            raise RowRejected("the file is empty")

    def _read_lines(self, pending: bytes) -> list[bytes]:
        """Return the lines of the next block, after `pending`; none at the end. Raises RowRejected for a long line."""
        lines, size, longest = [pending] if pending else [], len(pending), self._options.max_line_bytes
        most = self._options.max_rows or _BLOCK_ROWS
        while len(lines) < most and size < self._options.block_bytes and (line := self._file.readline(longest + 1)):
            if len(line) > longest:
                raise RowRejected(tables.describe_long_line(self._options))
            lines.append(line)
            size += len(line)
        return lines

    def _parse_lines(self, chunk: list[bytes], types: Mapping[str, ColumnType], position: FilePosition) -> TableBlock:
        objects: list[dict[str, Any]] = []
        rows: list[int] = []
        lines: list[int] = []
        rejected: list[RowRejection] = []
        row = position.row
        for number, line in enumerate(chunk, position.line + 1):
            if not line.strip():
                continue
            row += 1
            decoded = self._decode(line)
            if isinstance(decoded, str):
                rejected.append(RowRejection(number, decoded))
            else:
                objects.append(decoded)
                rows.append(row)
                lines.append(number)
        columns: dict[str, list[Any]] = {name: [row_values.get(name) for row_values in objects] for name in types}
        end = FilePosition(position.offset + sum(map(len, chunk)), position.line + len(chunk), row)
        if not self._options.keep_invalid:
            return tables.convert_block(TableBlock(columns, rows, lines, rejected, end), types)
        for name, column_type in types.items():
            if column_type is ColumnType.TIME:
                columns[name] = [tables.time_or_value(value) for value in columns[name]]
        return TableBlock(columns, rows, lines, rejected, end)

    def _decode(self, line: bytes) -> dict[str, Any] | str:
        """Return the object, or the reason to reject it."""
        try:
            row = self._decoder.decode(line)
            if line.count(b":") != len(row):
                check_key_count(line, len(row), row.values())
        except DuplicateKey as error:
            return str(error)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            return f"not one JSON object on one line: {str(error)[:120]}"
        return self._options.check_row(row) or row
