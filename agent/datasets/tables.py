"""Parquet, a row group at a time, and recordings (`.npz`), as blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.datasets import training_data
from agent.datasets.blocks import Block, Place, Reader, Texts, is_media, require, times
from agent.datasets.csv_file import BLOCK, CsvFile
from agent.datasets.media_files import MediaFiles
from agent.errors import UsageError
from agent.model.bundle.manifest import Input
from agent.model.inference.features import Floats

ROWS = 1 << 16
_MOST_VALUES = 4_000_000  # of a block, so that many columns need no more memory than few
NO_PYARROW = "Parquet needs pyarrow: pip install 'outstation[parquet]', or give CSV"


def open_file(path: Path, spec: Input, texts: Sequence[str] = (), block: int | None = None) -> Reader:
    """The reader for `path`, by its suffix; CSV is read `block` bytes at a time. Raises UsageError."""
    if is_media(spec) and path.suffix != ".npz":
        return MediaFiles(path, spec, texts)
    if path.suffix == ".parquet":
        return ParquetFile(path, spec.fields, texts)
    if path.suffix == ".npz":
        return Recordings(path, spec, texts)
    return CsvFile(path, spec.fields, texts, block or BLOCK)


class ParquetFile:
    """Columns of numbers; `t`, if there, is epoch seconds or a timestamp; null is a missing value."""

    def __init__(self, path: Path, fields: Sequence[str], texts: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise UsageError(f"{path}: {NO_PYARROW}") from None
        self.path, self._fields, self._texts, self._pa = path, list(fields), list(texts), pa
        try:
            self._file: Any = parquet.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"{path}: cannot be read as Parquet: {error}") from None
        schema = self._file.schema_arrow
        self.columns = list(schema.names)
        require(path, self.columns, [*self._fields, *self._texts])
        self._timed = "t" in self.columns
        for name in [*self._fields, *(["t"] if self._timed else [])]:
            kind = schema.field(name).type
            fits = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
            if not (fits or pa.types.is_decimal(kind) or (name == "t" and pa.types.is_timestamp(kind))):
                raise UsageError(f"{path}: column {name} holds {kind}; the model needs numbers there")
        self.size = self._file.metadata.num_rows

    def done(self, place: Place) -> int:
        return place.row

    def blocks(self, place: Place) -> Iterator[Block]:
        wanted = list(dict.fromkeys([*self._fields, *self._texts, *(["t"] if self._timed else [])]))
        through, rows = 0, max(1, min(ROWS, _MOST_VALUES // len(wanted)))
        try:
            for group in range(self._file.metadata.num_row_groups):
                size = self._file.metadata.row_group(group).num_rows
                if through + size <= place.row:
                    through += size
                    continue
                for batch in self._file.iter_batches(rows, row_groups=[group], columns=wanted):
                    through += batch.num_rows
                    if through > place.row:
                        block = self._block(batch, place)
                        place = block.after
                        yield block
        except (OSError, self._pa.ArrowException) as error:
            raise UsageError(f"{self.path}: damaged after row {place.row}: {error}") from None

    def _block(self, batch: Any, place: Place) -> Block:
        n = batch.num_rows
        rows: Floats = np.empty((n, len(self._fields)), np.float32)
        with np.errstate(over="ignore"):
            for i, name in enumerate(self._fields):
                rows[:, i] = self._numbers(batch.column(name))
        number = np.arange(place.row + 1, place.row + n + 1, dtype=np.int64)
        t = times(self._seconds(batch.column("t")) if self._timed else None, number, place.t)
        texts = {name: self._text(batch.column(name)) for name in self._texts}
        return Block(rows, t, number, Place(0, 0, place.row + n, int(t[-1])), texts)

    def _numbers(self, column: Any) -> NDArray[Any]:
        if not self._pa.types.is_floating(column.type):
            column = column.cast(self._pa.float64())
        return np.asarray(column.to_numpy(zero_copy_only=False))

    def _seconds(self, column: Any) -> NDArray[np.float64]:
        if self._pa.types.is_timestamp(column.type):
            us = column.cast(self._pa.timestamp("us", column.type.tz), safe=False).cast(self._pa.int64())
            return np.asarray(self._numbers(us) / 1e6, np.float64)
        return self._numbers(column).astype(np.float64)

    def _text(self, column: Any) -> Texts:
        return np.array(["" if v is None else str(v) for v in column.to_pylist()], np.str_)


class Recordings:
    """`.npz` as `data.read` takes it; arrays with an entry a recording, or a row, are further columns; NaN is empty."""

    def __init__(self, path: Path, spec: Input, texts: Sequence[str] = ()) -> None:
        """Raises UsageError."""
        found = training_data.read(path, spec)
        self.path = path
        self._rows, self._t, self._texts = found.features, found.t, list(texts)
        self.size = len(self._rows)
        self._more = _columns(path, self.size)
        self.columns = list(self._more)
        require(path, self.columns, self._texts)

    def done(self, place: Place) -> int:
        return place.row

    def blocks(self, place: Place) -> Iterator[Block]:
        for first in range(place.row, self.size, ROWS):
            end = min(first + ROWS, self.size)
            number = np.arange(first + 1, end + 1, dtype=np.int64)
            texts = {name: self._more[name][first:end] for name in self._texts}
            after = Place(0, 0, end, int(self._t[end - 1]))
            yield Block(self._rows[first:end], self._t[first:end], number, after, texts)


def _columns(path: Path, n: int) -> dict[str, Texts]:
    """Texts (n,) of each array that says something of every row or recording. Raises UsageError."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            starts = arrays["starts"].astype(np.int64) if "starts" in arrays else np.array([0, n])
            which = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            found: dict[str, Texts] = {"recording": np.char.add(f"{path.stem}/", which.astype(np.str_))}
            names = arrays["labels"].astype(np.str_) if "labels" in arrays else None
            for key in arrays:
                array = arrays[key]
                if array.ndim != 1 or array.dtype.kind not in "biufU" or key in ("starts", "fields", "units", "labels"):
                    continue
                if key == "label" and names is not None and array.dtype.kind in "iu":
                    array = names[array]
                if len(array) in (len(starts) - 1, n):
                    each = array if len(array) == n else array[which]
                    found[key] = np.where(each == each, each.astype(np.str_), "")
            return found
    except training_data.UNREADABLE as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
