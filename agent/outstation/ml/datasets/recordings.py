"""Recordings: an `.npz` of rows, cut into recordings, with what is known of each recording or row.

Arrays: `rows` (n, F) and `fields` (F); of several recordings also `starts`, the first row of each and n at the end.
Optional: `t` (n,) epoch seconds, or `rate` in rows a second; `scale`, which rows are multiplied by; codes `label` and
`subject` of each recording; `labels`, the names of label codes; further arrays (n,), or with an entry a recording.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation import input_files
from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.errors import UsageError, explain
from outstation.foundation.indices import repeat
from outstation.ml.datasets.blocks import MAX_TIME_S, RowBlock, TextColumn, require_columns
from outstation.ml.datasets.tables import START, FilePosition
from outstation.ml.model.bundle.manifest import ModelInput
from outstation.ml.model.sandbox import available_memory

# numpy answers damaged archives with all of these.
_UNREADABLE_ERRORS = (
    *(ValueError, LookupError, EOFError, TypeError, AttributeError, SyntaxError, OverflowError, Warning),
    *(MemoryError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
_PAUSE_S = 10.0
_BLOCK_ROWS = 1 << 16


class Recordings(msgspec.Struct, frozen=True, eq=False):
    """Recording r is rows `starts[r]` to `starts[r + 1]`; `t` in epoch seconds; `rate` in rows a second."""

    rows: Float32s
    starts: Ints
    label: Ints
    labels: list[str]
    subject: Ints
    fields: list[str]
    rate: float
    t: Float64s | None = None
    columns: dict[str, NDArray[Any]] = msgspec.field(default_factory=dict)

    @property
    def recording_index(self) -> Ints:
        """(n,) recording of each row."""
        return repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def select(self, path: Path, fields: Sequence[str]) -> Float32s:
        """Return the rows of these fields (n, F). Raises UsageError that names `path`."""
        require_columns(path, self.fields, fields)
        return self.rows[:, [self.fields.index(name) for name in fields]]

    def epoch_us(self, pause_s: float) -> Ints:
        """Return the times (n,) of all rows, by default with a pause between recordings. Raises ValueError."""
        if self.t is None:
            seconds = np.arange(len(self.rows)) / self.rate + self.recording_index * pause_s
        else:
            seconds = self.t
            unknown = ~(np.abs(seconds) < MAX_TIME_S)
            if unknown.any():
                row = int(np.flatnonzero(unknown)[0]) + 1
                raise ValueError(f"row {row} has no time in t, in seconds since 1970")
        return np.rint(seconds * 1e6).astype(np.int64)


def load(path: Path) -> Recordings:
    """Raise UsageError."""
    with _open_arrays(path, "recordings") as arrays:
        scale = np.asarray(arrays["scale"], np.float32) if "scale" in arrays else np.float32(1)
        rows = _convert(arrays["rows"], np.float32)
        rows *= scale
        fields = [str(name) for name in arrays["fields"]]
        if rows.ndim != 2 or rows.shape[1] != len(fields):
            raise ValueError(f"rows has shape {rows.shape}, fields names {len(fields)} columns")
        starts = _convert(arrays["starts"], np.int64) if "starts" in arrays else np.array([0, len(rows)])
        if starts[0] != 0 or starts[-1] != len(rows) or (np.diff(starts) < 0).any():
            raise ValueError(f"starts must ascend from 0 to the number of rows, {len(rows)}")
        t = _convert(arrays["t"], np.float64) if "t" in arrays else None
        if t is not None and t.shape != (len(rows),):
            raise ValueError(f"t has shape {t.shape}, there are {len(rows)} rows")
        rate = float(arrays["rate"]) if "rate" in arrays else 1.0
        if t is not None and len(t) > 1 and t[-1] > t[0]:
            rate = (len(t) - 1) / float(t[-1] - t[0])
        if not 1e-6 <= rate <= 1e6:
            raise ValueError(f"rate is {rate:g}; give rows per second")
        lengths = ((len(rows),), (len(starts) - 1,))
        names = [name for name in arrays.files if name not in ("rows", "starts", "fields", "units", "labels")]
        columns = {name: array for name in names if (array := arrays[name]).shape in lengths}
        codes = [_recording_codes(arrays, name, len(starts) - 1) for name in ("label", "subject")]
        labels = [str(name) for name in arrays["labels"]] if "labels" in arrays else []
    return Recordings(rows, starts, codes[0], labels, codes[1], fields, rate, t, columns)


def load_windows(path: Path, spec: ModelInput) -> Float32s | None:
    """Return the rows (g · rows, F) of ready-made `windows` (g, rows, F); None without them. Raises UsageError."""
    with _open_arrays(path, "windows") as arrays:
        if "windows" not in arrays:
            return None
        windows: Float32s = _convert(arrays["windows"], np.float32)
    wanted = (spec.window.rows, len(spec.fields)) if spec.window else (len(spec.fields),)
    if windows.shape[1:] != wanted:
        raise UsageError(f"{path}: windows has shape {windows.shape}, the input needs (any number, {str(wanted)[1:]}")
    return windows.reshape(-1, len(spec.fields))


class RecordingsReader:
    """Recordings as model input; their columns as text, NaN as "", and `recording`, which names each."""

    def __init__(self, path: Path, spec: ModelInput, text_columns: Sequence[str] = ()) -> None:
        """Raise UsageError."""
        self.path, self._recordings, self._text_columns = path, load(path), list(text_columns)
        self._rows = self._recordings.select(path, spec.fields)
        try:
            self._t = self._recordings.epoch_us(pause_between(spec))
        except ValueError as problem:
            raise UsageError(f"{path}: {problem}") from None
        self.columns = ["recording", *self._recordings.columns]
        self.size = len(self._rows)
        require_columns(path, self.columns, self._text_columns)

    def read_texts(self, names: Sequence[str]) -> dict[str, TextColumn]:
        """Return these columns (n,) as text."""
        return {name: self._texts(name) for name in names}

    def progress(self, position: FilePosition) -> int:
        return position.row

    def blocks(self, position: FilePosition = START) -> Iterator[RowBlock]:
        texts = {name: self._texts(name) for name in self._text_columns}
        for start in range(position.row, self.size, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, self.size)
            row_numbers = np.arange(start + 1, end + 1, dtype=np.int64)
            columns = {name: column[start:end] for name, column in texts.items()}
            after = FilePosition(0, 0, end, int(self._t[end - 1]))
            yield RowBlock(self._rows[start:end], self._t[start:end], row_numbers, after, columns)

    def _texts(self, name: str) -> TextColumn:
        recordings = self._recordings
        if name == "recording":
            return np.char.add(f"{self.path.stem}/", recordings.recording_index.astype(np.str_))
        return column_texts(self.path, recordings, name)


def column_texts(path: Path, recordings: Recordings, name: str) -> TextColumn:
    """Return a column for each row (n,) as text, NaN as "". Raises UsageError."""
    column = recordings.columns[name]
    if name == "label" and recordings.labels and column.dtype.kind in "iu":
        column = np.array(recordings.labels)[column]
    if len(column) != len(recordings.rows):
        column = column[recordings.recording_index]
    try:
        return np.where(column == column, column.astype(np.str_), "")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: array {name} holds bytes that are not ASCII; write it as text") from None


def pause_between(spec: ModelInput) -> float:
    """Return the pause between recordings, s: longer than any window may span."""
    return _PAUSE_S * (1 + ((spec.window.max_gap_s or 0.0) if spec.window else 0.0))


def _recording_codes(arrays: Any, name: str, count: int) -> Ints:
    if name not in arrays:
        return np.zeros(count, np.int64)
    codes: Ints = _convert(arrays[name], np.int64)
    if codes.shape != (count,):
        raise ValueError(f"{name} has shape {codes.shape}, there are {count} recordings")
    return codes


def _convert(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    _require_memory(array.size * np.dtype(dtype).itemsize * (array.dtype != dtype))
    return array.astype(dtype, copy=False)


def _require_memory(needed: int) -> None:
    """Raise ValueError if `needed` bytes are more than are left: the kernel would end the process, or another."""
    if needed > (left := available_memory.available_bytes()):
        raise ValueError(
            f"its arrays take {needed >> 20:,} MiB of memory, {left >> 20:,} MiB are left; write fewer rows to a file"
        )


@contextmanager
def _open_arrays(path: Path, noun: str) -> Iterator[Any]:
    """Open an `.npz`; raise what is wrong with it as UsageError."""
    try:
        # numpy leaves a file open that it was given by name and could not read.
        with input_files.open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            # Sizes of the archive's directory, which its reader does not exceed.
            _require_memory(sum(member.file_size for member in arrays.zip.infolist()))
            yield arrays
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {explain(error)}") from None
    except _UNREADABLE_ERRORS as error:
        raise UsageError(f"{path}: not readable as {noun}: {error}") from None
