"""Parquet, a row group at a time, and recordings (`.npz`), as blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.datasets import training_data
from agent.datasets.blocks import BlockReader, FilePosition, RowBlock, TextColumn, is_media, require_columns, row_times
from agent.datasets.csv_file import BLOCK_BYTES, CsvReader
from agent.datasets.media_files import MediaReader
from agent.errors import UsageError
from agent.model.bundle.manifest import ModelInput
from agent.model.inference.features import Floats

BLOCK_ROWS = 1 << 16
_MAX_BLOCK_VALUES = 4_000_000  # of a block, so that many columns need no more memory than few
NO_PYARROW = "Parquet needs pyarrow: pip install 'outstation[parquet]', or give CSV"


def open_reader(
    path: Path, spec: ModelInput, text_columns: Sequence[str] = (), block_bytes: int | None = None
) -> BlockReader:
    """The reader for `path`, by its suffix; CSV is read `block` bytes at a time. Raises UsageError."""
    if is_media(spec) and path.suffix != ".npz":
        return MediaReader(path, spec, text_columns)
    if path.suffix == ".parquet":
        return ParquetReader(path, spec.fields, text_columns)
    if path.suffix == ".npz":
        return RecordingsReader(path, spec, text_columns)
    return CsvReader(path, spec.fields, text_columns, block_bytes or BLOCK_BYTES)


class ParquetReader:
    """Columns of numbers; `t`, if there, is epoch seconds or a timestamp; null is a missing value."""

    def __init__(self, path: Path, fields: Sequence[str], text_columns: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f"{path}: {NO_PYARROW}") from None
        self.path, self._fields, self._text_columns, self._pa = path, list(fields), list(text_columns), pa
        try:
            self._file: Any = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{path}: cannot be read as Parquet: {error}") from None
        schema = self._file.schema_arrow
        self.columns = list(schema.names)
        require_columns(path, self.columns, [*self._fields, *self._text_columns])
        self._has_time = "t" in self.columns
        for name in [*self._fields, *(["t"] if self._has_time else [])]:
            kind = schema.field(name).type
            fits = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            if not (fits or pa.types.is_decimal(kind) or (name == "t" and pa.types.is_timestamp(kind))):
                raise UsageError(f"{path}: column {name} holds {kind}; the model needs numbers there")
        self.size = self._file.metadata.num_rows

    def progress(self, position: FilePosition) -> int:
        return position.row

    def blocks(self, position: FilePosition) -> Iterator[RowBlock]:
        wanted = list(dict.fromkeys([*self._fields, *self._text_columns, *(["t"] if self._has_time else [])]))
        through, rows = 0, max(1, min(BLOCK_ROWS, _MAX_BLOCK_VALUES // len(wanted)))
        try:
            for group in range(self._file.metadata.num_row_groups):
                size = self._file.metadata.row_group(group).num_rows
                if through + size <= position.row:
                    through += size
                    continue
                for batch in self._file.iter_batches(rows, row_groups=[group], columns=wanted):
                    through += batch.num_rows
                    if through > position.row:
                        block = self._to_block(batch, position)
                        position = block.next_position
                        yield block
        except (OSError, self._pa.ArrowException) as error:
            raise UsageError(f"{self.path}: damaged after row {position.row}: {error}") from None

    def _to_block(self, batch: Any, position: FilePosition) -> RowBlock:
        n = batch.num_rows
        rows: Floats = np.empty((n, len(self._fields)), np.float32)
        with np.errstate(over="ignore"):
            for i, name in enumerate(self._fields):
                rows[:, i] = self._to_numbers(batch.column(name))
        number = np.arange(position.row + 1, position.row + n + 1, dtype=np.int64)
        t = row_times(self._to_seconds(batch.column("t")) if self._has_time else None, number, position.t)
        texts = {name: self._to_text(batch.column(name)) for name in self._text_columns}
        return RowBlock(rows, t, number, FilePosition(0, 0, position.row + n, int(t[-1])), texts)

    def _to_numbers(self, column: Any) -> NDArray[Any]:
        if not self._pa.types.is_floating(column.type):
            column = column.cast(self._pa.float64())
        return np.asarray(column.to_numpy(zero_copy_only=False))

    def _to_seconds(self, column: Any) -> NDArray[np.float64]:
        if self._pa.types.is_timestamp(column.type):
            us = column.cast(self._pa.timestamp("us", column.type.tz), safe=False).cast(self._pa.int64())
            return np.asarray(self._to_numbers(us) / 1e6, np.float64)
        return self._to_numbers(column).astype(np.float64)

    def _to_text(self, column: Any) -> TextColumn:
        return np.array(["" if v is None else str(v) for v in column.to_pylist()], np.str_)


class RecordingsReader:
    """`.npz` as `data.read` takes it; arrays with an entry a recording, or a row, are further columns; NaN is empty."""

    def __init__(self, path: Path, spec: ModelInput, text_columns: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        found = training_data.read(path, spec)
        self.path = path
        self._rows, self._t, self._text_columns = found.features, found.t, list(text_columns)
        self.size = len(self._rows)
        self._text_values = _read_text_columns(path, self.size)
        self.columns = list(self._text_values)
        require_columns(path, self.columns, self._text_columns)

    def progress(self, position: FilePosition) -> int:
        return position.row

    def blocks(self, position: FilePosition) -> Iterator[RowBlock]:
        for first in range(position.row, self.size, BLOCK_ROWS):
            end = min(first + BLOCK_ROWS, self.size)
            number = np.arange(first + 1, end + 1, dtype=np.int64)
            texts = {name: self._text_values[name][first:end] for name in self._text_columns}
            after = FilePosition(0, 0, end, int(self._t[end - 1]))
            yield RowBlock(self._rows[first:end], self._t[first:end], number, after, texts)


def _read_text_columns(path: Path, row_count: int) -> dict[str, TextColumn]:
    """Texts (n,) of each array that says something of every row or recording. Raises UsageError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            starts = arrays["starts"].astype(np.int64) if "starts" in arrays else np.array([0, row_count])
            which = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            found: dict[str, TextColumn] = {"recording": np.char.add(f"{path.stem}/", which.astype(np.str_))}
            names = arrays["labels"].astype(np.str_) if "labels" in arrays else None
            for key in arrays:
                array = arrays[key]
                if array.ndim != 1 or array.dtype.kind not in "biufU" or key in ("starts", "fields", "units", "labels"):
                    continue
                if key == "label" and names is not None and array.dtype.kind in "iu":
                    array = names[array]
                if len(array) in (len(starts) - 1, row_count):
                    each = array if len(array) == row_count else array[which]
                    found[key] = np.where(each == each, each.astype(np.str_), "")
            return found
    except training_data.UNREADABLE_ERRORS as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
