"""Data files a bundle is packed from: recordings (`.npz`), CSV or Parquet, as features in the model's order.

In CSV and Parquet column `t` is epoch seconds (or a Parquet timestamp), and column `label` what was true.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.datasets import media_folders, parquet
from agent.errors import UsageError
from agent.model.bundle.manifest import Manifest, ModelInput
from agent.model.inference.features import Floats, Ints, stack_columns
from agent.performance.labels import NO_LABEL, SEPARATOR, LabelSchema


class Dataset(msgspec.Struct, frozen=True):
    """`features` (n, F) physical units, NaN missing; `t` (n,) epoch µs; `label` what was true, if known.

    That is a class index (n,), for several labels a row 0 or 1 of each (n, K), a number (n,), or 1 for an anomaly and 0
    for none; -1 where it is not known, of a number NaN.
    """

    features: Floats
    t: Ints
    label: NDArray[Any] | None


class LabelParser(msgspec.Struct, frozen=True):
    """How a file's labels are read; `several`: a row has any number of them, between `|`."""

    schema: LabelSchema
    multi_label: bool = False

    def parse_column(self, texts: Sequence[str], codes: Ints) -> NDArray[Any]:
        """From texts by code; "" is not known. Raises ValueError."""
        known = [self._parse(text) for text in texts]
        return np.array(known, np.float64 if self.schema.kind == "regress" else np.int64)[codes]

    def _parse(self, text: str) -> Any:
        if not self.multi_label:
            return self.schema.parse(text) if text else (np.nan if self.schema.kind == "regress" else -1)
        if not text:
            return [-1] * len(self.schema.labels)
        said = {self.schema.parse(part.strip()) for part in text.split(SEPARATOR)} if text != NO_LABEL else set()
        return [int(i in said) for i in range(len(self.schema.labels))]


LABEL_COLUMN = "label"
_MAX_LABELS = 4096


def make_label_parser(manifest: Manifest) -> LabelParser:
    """What labels of this model's results may be."""
    several = manifest.output.multi_label
    return LabelParser(
        LabelSchema("classify" if several else manifest.label_kind, tuple(manifest.output.labels)), several
    )


# Beyond this, microseconds do not fit into 64 bits.
_MAX_TIME_S = 2**63 / 1e6

# numpy answers damaged archives with all of these.
UNREADABLE_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    SyntaxError,
    OverflowError,
    Warning,
    tokenize.TokenError,
    MemoryError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


def read(path: Path, spec: ModelInput, labels: LabelParser | None = None) -> Dataset:
    """`labels`: where column `label` of a table is wanted. Raises UsageError that names the file, and where in it."""
    try:
        if path.suffix == ".npz":
            return _read_recordings(path, spec)
        if spec.image is not None or spec.sound is not None:
            return _read_media(path, spec, labels)
        return _read_parquet(path, spec, labels) if path.suffix in parquet.SUFFIXES else _read_csv(path, spec, labels)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE_ERRORS as error:
        raise UsageError(f"{path}: not data for fields {', '.join(spec.fields)}: {error}") from None


def read_windows(path: Path, spec: ModelInput) -> Floats | None:
    """Rows (g · rows, F) of the ready-made model windows in array `windows` (g, rows, F) of an `.npz`; None without.

    Raises UsageError.
    """
    if path.suffix != ".npz":
        return None
    try:
        with _open_arrays(path) as z:
            if "windows" not in z:
                return None
            given: Floats = z["windows"].astype(np.float32)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE_ERRORS as error:
        raise UsageError(f"{path}: not a file of windows: {error}") from None
    wanted = (spec.window.rows, len(spec.fields)) if spec.window else (len(spec.fields),)
    if given.shape[1:] != wanted:
        raise UsageError(f"{path}: windows has shape {given.shape}, the input needs (any number, {str(wanted)[1:]}")
    rows: Floats = given.reshape(-1, len(spec.fields))
    return rows


@contextlib.contextmanager
def _open_arrays(path: Path) -> Iterator[Any]:
    # numpy leaves a file open that it was given by name and could not read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        yield arrays


def _read_recordings(path: Path, spec: ModelInput) -> Dataset:
    """`rows` (n, fields), `fields`, and `t` (n,) epoch seconds or `rate`; between recordings, `starts`, there is a gap.

    `label` is of each recording.
    """
    with _open_arrays(path) as z:
        names = [str(name) for name in z["fields"]]
        wanted = _column_indices(names, spec.fields)
        scale = np.asarray(z["scale"], np.float32) if "scale" in z else np.float32(1)
        every = z["rows"].astype(np.float32) * scale
        if every.ndim != 2 or every.shape[1] != len(names):
            raise ValueError(f"rows has shape {every.shape}, fields names {len(names)} columns")
        rows: Floats = every[:, wanted]
        starts = z["starts"].astype(np.int64) if "starts" in z else np.array([0, len(rows)])
        rate = float(z["rate"]) if "rate" in z else 1.0
        seconds = z["t"].astype(np.float64) if "t" in z else None
        label = z["label"].astype(np.int64) if "label" in z else None
    if not 1e-6 <= rate <= 1e6:
        raise ValueError(f"rate is {rate:g}; give rows per second")
    if label is not None and label.shape != (len(starts) - 1,):
        raise ValueError(f"label has shape {label.shape}, there are {len(starts) - 1} recordings")
    if starts[0] != 0 or starts[-1] != len(rows) or (np.diff(starts) < 0).any():
        raise ValueError(f"starts must ascend from 0 to the number of rows, {len(rows)}")
    which = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    if seconds is not None and seconds.shape != (len(rows),):
        raise ValueError(f"t has shape {seconds.shape}, there are {len(rows)} rows")
    if seconds is not None:
        return Dataset(rows, _to_epoch_us(seconds), None if label is None else label[which])
    pause_s = 10 + 10 * ((spec.window.max_gap_s or 0.0) if spec.window else 0.0)
    t = np.rint((np.arange(len(rows)) / rate + which * pause_s) * 1e6).astype(np.int64)
    return Dataset(rows, t, None if label is None else label[which])


def _read_media(path: Path, spec: ModelInput, labels: LabelParser | None) -> Dataset:
    """Images or sounds; those in subfolders are labelled with their folder's name."""
    found = media_folders.list_files(path, spec)
    parts, t = media_folders.read(found, spec)
    rows = np.concatenate(parts)
    if labels is None or all(one.parent == path for one in found) or path.is_file():
        return Dataset(rows, t, None)
    texts = sorted({one.parent.name for one in found})
    codes = np.repeat([texts.index(one.parent.name) for one in found], [len(part) for part in parts])
    return Dataset(rows, t, labels.parse_column(texts, codes.astype(np.int64)))


def _read_csv(path: Path, spec: ModelInput, labels: LabelParser | None) -> Dataset:
    """The first line names the columns; `t`, if there, is epoch seconds; an empty cell is a missing value."""
    texts: dict[str, int] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        if not header:
            raise ValueError("the file is empty")
        wanted = _column_indices(header, spec.fields)
        timed, labelled = "t" in header, labels is not None and LABEL_COLUMN in header
        columns = [*wanted, header.index("t")] if timed else wanted
        label = header.index(LABEL_COLUMN) if labelled else -1
        cells = np.fromiter(_iter_cells(lines, columns, header, label, texts), np.float64)
    table = cells.reshape(-1, len(columns) + labelled)
    with np.errstate(over="ignore"):
        features = table[:, : len(wanted)].astype(np.float32)
    found = labels.parse_column(list(texts), table[:, -1].astype(np.int64)) if labels is not None and labelled else None
    if not timed:
        return Dataset(features, np.arange(len(table), dtype=np.int64), found)
    return Dataset(features, _to_epoch_us(table[:, len(wanted)]), found)


def _to_epoch_us(seconds: NDArray[np.float64]) -> Ints:
    untimed = ~(np.abs(seconds) < _MAX_TIME_S)
    if untimed.any():
        raise ValueError(f"row {int(np.flatnonzero(untimed)[0]) + 1} has no time in column t, in seconds since 1970")
    return np.rint(seconds * 1e6).astype(np.int64)


def _iter_cells(
    lines: Any, columns: Sequence[int], header: Sequence[str], label: int, texts: dict[str, int]
) -> Iterator[float]:
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            raise ValueError(f"line {lines.line_num} has {len(line)} cells, the first line names {len(header)}")
        for column in columns:
            text = line[column].strip()
            try:
                yield float(text) if text else np.nan
            except ValueError:
                raise ValueError(f"line {lines.line_num}, {header[column]}: {text[:40]!r} is no number") from None
        if label >= 0:
            yield texts.setdefault(line[label].strip(), len(texts))


def _read_parquet(path: Path, spec: ModelInput, labels: LabelParser | None) -> Dataset:
    there = parquet.list_columns(path)
    _column_indices(there, spec.fields)
    labelled = labels is not None and LABEL_COLUMN in there
    found = parquet.read(path, spec.fields, "t" if "t" in there else None, LABEL_COLUMN if labelled else None)
    t = np.arange(len(found.columns[0]), dtype=np.int64) if found.seconds is None else _to_epoch_us(found.seconds)
    label = labels.parse_column(found.texts, found.codes) if labels is not None and found.codes is not None else None
    return Dataset(stack_columns(found.columns), t, label)


def _column_indices(names: Sequence[str], fields: Iterable[str]) -> list[int]:
    missing = [name for name in fields if name not in names]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; there is {', '.join(names)}")
    return [names.index(name) for name in fields]


class TableSummary(msgspec.Struct, frozen=True):
    """What a table holds: its columns of numbers, without `t`, its rows, and the different texts in column `label`."""

    columns: list[str]
    rows: int
    labels: list[str]


def summarize_table(path: Path) -> TableSummary:
    """Raises UsageError."""
    try:
        return _summarize_parquet(path) if path.suffix in parquet.SUFFIXES else _summarize_csv(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UNREADABLE_ERRORS as error:
        raise UsageError(f"{path}: not a table: {error}") from None


def _summarize_csv(path: Path) -> TableSummary:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        header = [name.strip() for name in next(lines, [])]
        first = next(lines, None)
        if first is None or len(first) != len(header):
            raise ValueError("there is no row in it" if first is None else "its first row has not a cell a column")
        names = [name for name, cell in zip(header, first, strict=True) if _is_number(cell)]
        at = header.index(LABEL_COLUMN) if LABEL_COLUMN in header else len(header)
        rows, found = 0, set[str]()
        for line in itertools.chain([first], lines):
            rows += bool(line)
            found.update(cell.strip() for cell in line[at : at + 1])
    return TableSummary(
        [name for name in names if name not in ("t", LABEL_COLUMN)], rows, sorted(found - {""})[:_MAX_LABELS]
    )


def _is_number(text: str) -> bool:
    try:
        float(text.strip() or "nan")
    except ValueError:
        return False
    return True


def _summarize_parquet(path: Path) -> TableSummary:
    numbers = [name for name in parquet.list_columns(path, numbers=True) if name not in ("t", LABEL_COLUMN)]
    labels = (
        {*parquet.read(path, [], None, LABEL_COLUMN).texts} - {""}
        if LABEL_COLUMN in parquet.list_columns(path)
        else set[str]()
    )
    return TableSummary(numbers, parquet.count_rows(path), sorted(labels)[:_MAX_LABELS])
