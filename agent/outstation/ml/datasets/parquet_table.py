"""Parquet files, read a row group at a time by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from outstation.foundation.errors import RowRejected, UsageError
from outstation.foundation.extras import install_command
from outstation.ml.datasets.tables import START, ColumnType, FilePosition, TableBlock, TableOptions

_BLOCK_ROWS = 1 << 16
# Values of a block, so that many columns need no more memory than few.
_MAX_BLOCK_VALUES = 4_000_000
_MAX_BLOCK_BYTES = 32 << 20
# Longer than any text that a stream accepts: the rest would only take memory.
_MAX_TEXT_CHARS = 4096


def describe_missing_pyarrow() -> str:
    return f"Parquet needs pyarrow: {install_command('parquet')}, or use CSV"


class ParquetTable:
    """Parquet; null is a missing value, and the lines of a block are its rows."""

    def __init__(self, path: Path, file: BufferedReader[Any], options: TableOptions) -> None:
        """Read the footer of `file`. Raises RowRejected if it is not Parquet, UsageError without pyarrow."""
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f"{path}: {describe_missing_pyarrow()}") from None
        self._pa: Any = pa
        self._options, self._source = options, file
        with self._reject_damage("not readable as Parquet"):
            self._file: Any = parquet.ParquetFile(file)
            self._schema: Any = self._file.schema_arrow
            self.columns: list[str] = list(self._schema.names)
        self.row_count: int = self._file.metadata.num_rows

    @property
    def number_columns(self) -> list[str]:
        return [name for name in self.columns if self._is_number(self._schema.field(name).type)]

    def has_naive_times(self, name: str) -> bool:
        """Return True if a column holds timestamps without a time zone."""
        column_type = self._schema.field(name).type
        return self._pa.types.is_timestamp(column_type) and column_type.tz is None

    def read(self, columns: Mapping[str, ColumnType], position: FilePosition = START) -> Iterator[TableBlock]:
        """Yield blocks. Raises RowRejected also for a column of another type, unless invalid values are kept."""
        if not self._options.keep_invalid:
            for name, column_type in columns.items():
                stored = self._schema.field(name).type
                is_time = column_type is ColumnType.TIME and self._pa.types.is_timestamp(stored)
                if column_type is not ColumnType.TEXT and not self._is_number(stored) and not is_time:
                    raise RowRejected(f"column {name} holds {stored}, not numbers")
        else:
            self._read_texts_as_codes(columns)
        convert = self._to_values if self._options.keep_invalid else self._to_array
        block_rows = max(1, min(_BLOCK_ROWS, _MAX_BLOCK_VALUES // max(1, len(columns))))
        row = 0
        for group in range(self._file.metadata.num_row_groups):
            metadata = self._file.metadata.row_group(group)
            if row + metadata.num_rows <= position.row:
                row += metadata.num_rows
                continue
            self._check_memory(group, metadata)
            limit = self._options.memory_bytes
            # Rows of long cells make smaller blocks.
            row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
            most = min(self._options.max_rows or block_rows, max(1, _MAX_BLOCK_BYTES // row_bytes))
            batches = self._file.iter_batches(
                most, row_groups=[group], columns=list(columns), use_threads=limit is None
            )
            while True:
                with self._reject_damage(f"damaged after row {row}"):
                    batch = next(batches, None)
                    if batch is None:
                        break
                    values = {name: convert(batch.column(name), kind) for name, kind in columns.items()}
                rows = range(row + 1, row + batch.num_rows + 1)
                row += batch.num_rows
                if row > position.row:
                    yield TableBlock(values, rows, rows, [], FilePosition(0, row, row)).after_line(position.row)

    def _read_texts_as_codes(self, columns: Mapping[str, ColumnType]) -> None:
        """Read each text of a block once, however many rows have it. Raises RowRejected for a column of lists."""
        for name in columns:
            if self._pa.types.is_nested(stored := self._schema.field(name).type):
                raise RowRejected(f"column {name} holds {stored}, not numbers or texts")
        from pyarrow import parquet

        texts = [name for name, column_type in columns.items() if column_type is ColumnType.TEXT]
        with self._reject_damage("not readable as Parquet"):
            self._file = parquet.ParquetFile(self._source, metadata=self._file.metadata, read_dictionary=texts)

    def _check_memory(self, group: int, metadata: Any) -> None:
        limit = self._options.memory_bytes
        if limit is not None and metadata.total_byte_size > limit // 2:
            raise RowRejected(
                f"row group {group + 1} holds {metadata.total_byte_size >> 20:,} MiB, {limit >> 21:,} MiB at most with "
                "the memory that is left; write row groups of fewer rows"
            )

    def _is_number(self, stored: Any) -> bool:
        types = self._pa.types
        return any(test(stored) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal))

    def _to_array(self, column: Any, column_type: ColumnType) -> np.ndarray[Any, Any]:
        """Return an array of numbers, NaN where missing, or of texts, "" where missing."""
        if column_type is ColumnType.TEXT:
            return np.array(["" if value is None else str(value) for value in column.to_pylist()], np.str_)
        if self._pa.types.is_timestamp(column.type):
            return (
                self._to_array(
                    column.cast(self._pa.timestamp("us", column.type.tz), safe=False).cast(self._pa.int64()),
                    ColumnType.FLOAT,
                )
                / 1e6
            )
        if not self._pa.types.is_floating(column.type):
            column = column.cast(self._pa.float64())
        return np.asarray(column.to_numpy(zero_copy_only=False))

    def _to_values(self, column: Any, column_type: ColumnType) -> Any:
        """Return an array where every value is there and of the type, else Python values."""
        if column_type is ColumnType.TIME:
            # A missing time is no time; None would mean now.
            if self._pa.types.is_timestamp(column.type):
                return self._to_array(column, column_type)
            return [np.nan if value is None else value for value in column.to_pylist()]
        types, fits = self._pa.types, column.null_count == 0
        if types.is_dictionary(column.type):
            return _decode_texts(column)
        if fits and column_type is not ColumnType.TEXT and types.is_signed_integer(column.type):
            return column.to_numpy()
        if fits and column_type is ColumnType.FLOAT and types.is_floating(column.type):
            return column.to_numpy()
        return column.to_pylist()

    @contextmanager
    def _reject_damage(self, problem: str) -> Iterator[None]:
        try:
            yield
        except MemoryError:
            raise
        except (self._pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            raise RowRejected(f"{problem}: {error}") from None


def _decode_texts(column: Any) -> list[Any]:
    texts: dict[int | None, Any] = {None: None}
    for code in (codes := column.indices.to_pylist()):
        if code not in texts:
            value = column.dictionary[code].as_py()
            texts[code] = value[:_MAX_TEXT_CHARS] if isinstance(value, str | bytes) else value
    return [texts[code] for code in codes]
