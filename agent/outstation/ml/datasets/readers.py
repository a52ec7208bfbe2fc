"""Readers of model input, one for each kind of source: tables, recordings, and folders of images or sounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float64s, Ints
from outstation.foundation.errors import RowRejected, UsageError, explain
from outstation.ml.datasets import formats
from outstation.ml.datasets.blocks import MAX_TIME_S, TIME_COLUMN, BlockReader, RowBlock, require_columns
from outstation.ml.datasets.media import MediaReader
from outstation.ml.datasets.parquet_table import ParquetTable
from outstation.ml.datasets.recordings import RecordingsReader
from outstation.ml.datasets.tables import (
    BLOCK_BYTES,
    DEFAULT_OPTIONS,
    START,
    ColumnType,
    FilePosition,
    Table,
    TableOptions,
)
from outstation.ml.model.bundle.manifest import ModelInput

SUFFIXES = (*formats.TABLE_SUFFIXES, ".npz")


def open_reader(
    path: Path,
    spec: ModelInput,
    text_columns: Sequence[str] = (),
    block_bytes: int = BLOCK_BYTES,
    *,
    require_times: bool = False,
) -> BlockReader:
    """Return the reader for `path`; without `require_times` a row may lack its time. Raises UsageError."""
    if path.suffix == ".npz":
        return RecordingsReader(path, spec, text_columns)
    if is_media(spec):
        return MediaReader(path, spec, text_columns)
    return TableReader(path, spec.fields, text_columns, block_bytes, require_times=require_times)


@contextmanager
def open_table(path: Path, options: TableOptions = DEFAULT_OPTIONS) -> Iterator[Table]:
    """Open a table; raise what is wrong with it as UsageError that names the file."""
    try:
        with formats.open_file(path) as file:
            yield formats.open_table(path, file, options)
    except RowRejected as problem:
        raise UsageError(f"{path}: {problem}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {explain(error)}") from None


def is_media(spec: ModelInput) -> bool:
    return spec.image is not None or spec.sound is not None


def list_sources(path: Path, spec: ModelInput) -> list[Path]:
    """Return the data files at `path`; a folder of images or sounds is one source. Raises UsageError."""
    return [path] if is_media(spec) else list_files(path)


def list_files(path: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """Return the data file at `path`, or those of the folder, by name. Raises UsageError."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in suffixes and p.is_file() and p.name[0] != ".")
        if not files:
            raise UsageError(f"{path}: no {' or '.join(suffixes)} in this folder")
        return files
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: cannot be read as data; name a {' or '.join(suffixes)}, or a folder of them")
    return [path]


class TableReader:
    """Fields of a table as model input; `text_columns` are none of the fields."""

    def __init__(
        self,
        path: Path,
        fields: Sequence[str],
        text_columns: Sequence[str] = (),
        block_bytes: int = BLOCK_BYTES,
        *,
        require_times: bool = False,
    ) -> None:
        """Raise UsageError."""
        self.path, self._fields, self._text_columns = path, list(fields), list(text_columns)
        self._options, self._require_times = TableOptions(block_bytes=block_bytes), require_times
        with open_table(path, self._options) as table:
            self.columns = table.columns
            self._counts_rows = isinstance(table, ParquetTable)
            self.size = table.row_count if isinstance(table, ParquetTable) else path.stat().st_size
        require_columns(path, self.columns, [*self._fields, *self._text_columns])
        self._types = dict.fromkeys(self._fields, ColumnType.FLOAT) | dict.fromkeys(self._text_columns, ColumnType.TEXT)
        self._has_time = TIME_COLUMN in self.columns
        if self._has_time:
            self._types[TIME_COLUMN] = ColumnType.TIME

    def progress(self, position: FilePosition) -> int:
        return position.row if self._counts_rows else position.offset

    def blocks(self, position: FilePosition = START) -> Iterator[RowBlock]:
        with open_table(self.path, self._options) as table:
            for block in table.read(self._types, position):
                rows = np.empty((len(block.row_numbers), len(self._fields)), np.float32)
                with np.errstate(over="ignore"):
                    for i, name in enumerate(self._fields):
                        rows[:, i] = block.columns[name]
                row_numbers = np.asarray(block.row_numbers, np.int64)
                t = row_numbers
                if self._has_time:
                    t = self._row_times(block.columns[TIME_COLUMN], row_numbers, position.t)
                position = replace(block.next_position, t=int(t[-1]) if len(t) else position.t)
                texts, rejected = {name: block.columns[name] for name in self._text_columns}, block.rejected
                del block
                yield RowBlock(rows, t, row_numbers, position, texts, rejected)

    def _row_times(self, seconds: Float64s, row_numbers: Ints, previous_us: int) -> Ints:
        """Return epoch µs of rows; a row without a time has that of the row before."""
        unknown = ~(np.abs(seconds) < MAX_TIME_S)
        us = np.rint(np.where(unknown, 0, seconds) * 1e6).astype(np.int64)
        if not unknown.any():
            return us
        if self._require_times:
            row = row_numbers[np.flatnonzero(unknown)[0]]
            raise UsageError(f"{self.path}: row {row} has no time in column {TIME_COLUMN}, in seconds since 1970")
        last_known = np.maximum.accumulate(np.where(unknown, -1, np.arange(len(us))))
        return np.where(last_known < 0, previous_us, us[last_known])
