"""Data that a bundle is packed from: all rows of a file as features in the model's order, with labels.

Every row must be readable: a rejected row is an error, unlike for readers of data that a model is run over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import UsageError
from outstation.foundation.text import printable
from outstation.ml.datasets import readers, recordings
from outstation.ml.datasets.blocks import (
    FILE_COLUMN,
    LABEL_COLUMN,
    TIME_COLUMN,
    MissingColumns,
    TextColumn,
    require_columns,
)
from outstation.ml.datasets.parquet_table import ParquetTable
from outstation.ml.datasets.tables import ColumnType, TableOptions
from outstation.ml.model.bundle.manifest import Manifest, ModelInput
from outstation.ml.model.inference import features
from outstation.ml.performance.labels import NO_LABEL, SEPARATOR, LabelSchema

_MAX_LABELS = 4096
# Character that decoding writes in place of bytes that are no UTF-8.
_UNREADABLE = "\ufffd"
_MAX_SHOWN_LABEL = 40
# Columns that say who measured or labelled a row.
PROVIDERS = ("device", "labeller")


class TrainingData(msgspec.Struct, frozen=True):
    """`features` (n, F) physical units, NaN missing; `t` (n,) epoch µs; `label` the true label, if known.

    That is a class index (n,), of a multi-label model 0 or 1 for each label (n, K), a number (n,), or 1 for an anomaly
    and 0 for none. An unknown label is -1, an unknown number NaN. `providers` are the columns of PROVIDERS (n,).
    """

    features: Float32s
    t: Ints
    label: NDArray[Any] | None
    providers: dict[str, TextColumn] = {}

    def window_labels(self, starts: Ints, rows: int) -> NDArray[Any]:
        """Return the label of each window, that of its last row."""
        assert self.label is not None
        labels: NDArray[Any] = self.label[starts + rows - 1]
        return labels


class LabelParser(msgspec.Struct, frozen=True):
    """Reads a file's labels; a row of a multi-label model has any number of them, between `|`."""

    schema: LabelSchema
    multi_label: bool = False
    column: str = LABEL_COLUMN

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> LabelParser:
        multi_label = manifest.output.multi_label
        kind = "classify" if multi_label else manifest.label_kind
        return cls(LabelSchema(kind, tuple(manifest.output.labels)), multi_label)

    def parse_column(self, texts: NDArray[np.str_]) -> NDArray[Any]:
        """Parse (n,) texts; "" is unknown. Raises ValueError."""
        distinct, codes = np.unique(np.char.strip(texts), return_inverse=True)
        parsed = [self._parse(str(text)) for text in distinct]
        if not parsed:
            return np.zeros((0, len(self.schema.labels)) if self.multi_label else 0, np.int64)
        return np.array(parsed, np.float64 if self.schema.kind == "regress" else np.int64)[codes]

    def _parse(self, text: str) -> Any:
        try:
            return self._parse_known(text)
        except ValueError as problem:
            raise ValueError(f"'{printable(text[:_MAX_SHOWN_LABEL])}': {problem}") from None

    def _parse_known(self, text: str) -> Any:
        if not self.multi_label:
            return self.schema.parse(text) if text else (np.nan if self.schema.kind == "regress" else -1)
        if not text:
            return [-1] * len(self.schema.labels)
        codes = {self.schema.parse(part.strip()) for part in text.split(SEPARATOR)} if text != NO_LABEL else set()
        return [int(i in codes) for i in range(len(self.schema.labels))]


def read(path: Path, spec: ModelInput, labels: LabelParser | None = None) -> TrainingData:
    """Read all rows, with their labels if `labels` are wanted. Raises UsageError that names the file and the line."""
    if path.suffix == ".npz":
        loaded = recordings.load(path)
        is_main = LABEL_COLUMN in loaded.columns and (labels is None or labels.column == LABEL_COLUMN)
        codes = loaded.label[loaded.recording_index] if is_main else None
        known = [name for name in PROVIDERS if labels is not None and name in loaded.columns]
        columns = {name: recordings.column_texts(path, loaded, name) for name in known}
        return TrainingData(
            loaded.select(path, spec.fields), loaded.epoch_us(recordings.pause_between(spec)), codes, columns
        )
    reader = readers.open_reader(path, spec, require_times=True)
    column = LABEL_COLUMN if labels is None else labels.column
    labelled = labels is not None and column in reader.columns
    names = [name for name in PROVIDERS if labelled and name in reader.columns and name not in spec.fields]
    if labelled:
        reader = readers.open_reader(path, spec, [column, *names], require_times=True)
    providers: dict[str, list[TextColumn]] = {name: [] for name in names}
    rows, t, texts = [np.empty((0, len(spec.fields)), np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.str_)]
    for block in reader.blocks():
        for rejection in block.rejected:
            where = "" if rejection.file else f"{path}: line {rejection.line}: "
            raise UsageError(where + rejection.reason)
        rows.append(block.rows)
        t.append(block.t)
        if labelled:
            texts.append(block.text_columns[column])
        for name in names:
            providers[name].append(block.text_columns[name])
    label, cells = None, np.concatenate(texts)
    # Images that lie in no subfolder have no label.
    if labels is not None and labelled and (not readers.is_media(spec) or (cells != "").any()):
        try:
            label = labels.parse_column(cells)
        except ValueError as problem:
            raise UsageError(f"{path}: column {column}: {problem}") from None
    columns = {name: np.concatenate(parts) for name, parts in providers.items() if parts}
    return TrainingData(np.concatenate(rows), np.concatenate(t), label, columns)


def has_labels(path: Path, spec: ModelInput, column: str = LABEL_COLUMN) -> bool:
    """Return True if the data have this column of labels. Raises UsageError."""
    return column in _list_columns(path, spec) and (path.suffix != ".npz" or column == LABEL_COLUMN)


def missing_labels(path: Path, spec: ModelInput, purpose: str) -> MissingColumns:
    """Return the error of data without labels, which `purpose` needs. Raises UsageError."""
    if readers.is_media(spec):
        advice = f"{purpose} needs the true label of each file: put the files of a label into a folder of its name"
        return MissingColumns(path, [LABEL_COLUMN], [FILE_COLUMN], advice)
    advice = f"{purpose} needs the true label of each row: give the column of labels this name"
    return MissingColumns(path, [LABEL_COLUMN], _list_columns(path, spec), advice)


def _list_columns(path: Path, spec: ModelInput) -> list[str]:
    if path.suffix == ".npz":
        return [*recordings.load(path).columns]
    return readers.open_reader(path, spec, require_times=True).columns


def find_window_starts(path: Path, data: TrainingData, spec: ModelInput) -> Ints:
    """Return the starts of all windows, at least one. Raises UsageError."""
    starts = features.cut_windows(data.t, spec.window).starts
    if not len(starts):
        missing = f"no {spec.window.rows} rows without a gap" if spec.window else "no rows"
        raise UsageError(f"{path}: {missing} in it, so nothing to run the model on; give more data")
    return starts


class ColumnScale(msgspec.Struct, frozen=True):
    """Range, usual range (99 % of the values), mean and standard deviation; all 0.0 of a column without a number."""

    low: float
    high: float
    usual: tuple[float, float]
    mean: float
    std: float


_NO_SCALE = ColumnScale(0.0, 0.0, (0.0, 0.0), 0.0, 0.0)


class TableSummary(msgspec.Struct, frozen=True):
    """Number columns of a table, without `t`, with their scales; its rows; the distinct texts in column `label`.

    `interval_s`: the median time between two rows, if the table has times. `output_labels`: number columns
    `label_NAME`, which are left out of `columns` as labels of further outputs.
    """

    path: str
    columns: list[str]
    scales: list[ColumnScale]
    rows: int
    labels: list[str]
    interval_s: float | None = None
    output_labels: list[str] = []


def summarize_table(path: Path) -> TableSummary:
    """Raise UsageError."""
    with readers.open_table(path, TableOptions(max_rows=1)) as table:
        names = table.columns
        if isinstance(table, ParquetTable):
            numbers = table.number_columns
        else:
            first = next(table.read(dict.fromkeys(names, ColumnType.TEXT)), None)
            if first is None or not len(first.row_numbers):
                reason = first.rejected[0].reason if first is not None and first.rejected else "there is no row in it"
                raise UsageError(f"{path}: not a table: {reason}")
            numbers = [name for name in names if _is_number(str(first.columns[name][0]))]
    rows, labels, steps = 0, set[str](), list[NDArray[np.float64]]()
    column = LABEL_COLUMN if LABEL_COLUMN in names else names[0]
    output_labels = [name for name in numbers if name.startswith(f"{LABEL_COLUMN}_")]
    fields = [name for name in numbers if name not in (TIME_COLUMN, LABEL_COLUMN, *output_labels)]
    require_columns(path, names, fields)
    if unreadable := [name for name in fields if _UNREADABLE in name]:
        raise UsageError(f"{path}: the name of column {unreadable[0]} is not UTF-8; save the table as UTF-8")
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in fields}
    types = {column: ColumnType.TEXT} | ({TIME_COLUMN: ColumnType.TIME} if TIME_COLUMN in names else {})
    with readers.open_table(path) as table:
        for block in table.read(types):
            rows += len(block.row_numbers)
            if TIME_COLUMN in types:
                steps.append(np.diff(block.columns[TIME_COLUMN]))
            if column == LABEL_COLUMN:
                labels.update(np.unique(np.char.strip(block.columns[column])).tolist())
    with readers.open_table(path) as table:
        for block in table.read(dict.fromkeys(fields, ColumnType.FLOAT)) if fields else ():
            for name in fields:
                values[name].append(np.asarray(block.columns[name], np.float64))
    scales = [_measure_scale(np.concatenate(values[name])) if values[name] else _NO_SCALE for name in fields]
    interval_s = _median_interval(np.concatenate(steps)) if steps else None
    return TableSummary(str(path), fields, scales, rows, sorted(labels - {""})[:_MAX_LABELS], interval_s, output_labels)


def _median_interval(steps: NDArray[np.float64]) -> float | None:
    forward = steps[np.isfinite(steps) & (steps > 0)]
    return float(np.median(forward)) if len(forward) else None


def _measure_scale(values: NDArray[np.float64]) -> ColumnScale:
    known = values[np.isfinite(values)]
    if not len(known):
        return _NO_SCALE
    low, high = float(known.min()), float(known.max())
    first, last = np.quantile(known, (0.005, 0.995)).tolist()
    # The computed deviation of a constant is not exactly 0.
    return ColumnScale(low, high, (first, last), float(known.mean()), float(known.std()) if high > low else 0.0)


def _is_number(text: str) -> bool:
    try:
        float(text.strip() or "nan")
    except ValueError:
        return False
    return True
