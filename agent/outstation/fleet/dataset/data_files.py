"""Data files of a retraining set: rows of recordings with their labels, as Parquet or CSV.

Where samples have rows of further inputs, each log of a device has a file of its own rows, and for each input one of
the same name, so that `model evaluate` joins no rows of another device.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.fleet.dataset import joined
from outstation.fleet.dataset.derived import DerivedColumns
from outstation.fleet.dataset.gather import TEXT_COLUMNS, Gathered, Recording, name_label_column
from outstation.fleet.dataset.joined import JoinedByInput
from outstation.fleet.export.export import to_parquet
from outstation.foundation.errors import UsageError
from outstation.foundation.indices import repeat
from outstation.foundation.text import csv_text
from outstation.ml.datasets.blocks import LABEL_COLUMN, TIME_COLUMN
from outstation.ml.datasets.parquet_table import describe_missing_pyarrow

DataFormat = Literal["parquet", "csv"]
BY_DEVICE, JOINED = "by-device", "joined-{}"

# Column → values (n,): numbers, or texts with "" for none.
_Columns = dict[str, NDArray[Any]]


class _Part(msgspec.Struct):
    """Recordings of one log of a device whose rows of further inputs can stand together, by their index."""

    recordings: list[int]
    joined: JoinedByInput


def build(gathered: Gathered, derived_columns: DerivedColumns | None, data_format: DataFormat) -> dict[str, bytes]:
    """Return the data files by their paths. Raises UsageError."""
    for output in gathered.outputs:
        if (column := name_label_column(output)) in gathered.fields:
            raise UsageError(
                f"the samples have a field {column!r}, so the labels of output {output!r} can have no column of that "
                "name; rename the output in the SPEC of the bundle, or narrow the set with --since, --until or --bundle"
            )
    every = range(len(gathered.recordings))
    files = {f"data.{data_format}": _encode(_to_columns(gathered, derived_columns, every), data_format)}
    if not gathered.inputs:
        return files
    for name, part in split_by_device(gathered).items():
        columns = _to_columns(gathered, derived_columns, part.recordings)
        files[f"{BY_DEVICE}/{name}.{data_format}"] = _encode(columns, data_format)
        for key, rows in part.joined.items():
            columns = {
                TIME_COLUMN: rows.t / 1e6,
                **{name: rows.values[:, index] for index, name in enumerate(gathered.inputs[key])},
            }
            files[f"{JOINED.format(key)}/{name}.{data_format}"] = _encode(columns, data_format)
    return files


def split_by_device(gathered: Gathered) -> dict[str, _Part]:
    """Return the recordings that have rows of each further input, by the name of their file."""
    parts: dict[str, list[_Part]] = {}
    for index, recording in enumerate(gathered.recordings):
        if recording.joined.keys() != gathered.inputs.keys():
            continue
        own = parts.setdefault(recording.device, [])
        logs = (part for part in own if gathered.recordings[part.recordings[0]].log == recording.log)
        fitting = next((part for part in logs if not joined.contradict(part.joined, recording.joined)), None)
        if fitting is None:
            own.append(_Part([index], recording.joined))
        else:
            fitting.recordings.append(index)
            fitting.joined = joined.merge(fitting.joined, recording.joined)
    return {
        # No name of a device has a +.
        device if len(own) == 1 else f"{device}+{number}": part
        for device, own in parts.items()
        for number, part in enumerate(own, 1)
    }


def name_recording(recording: Recording) -> str:
    return f"{recording.device}/{recording.log}/{recording.first}"


def _to_columns(gathered: Gathered, derived_columns: DerivedColumns | None, chosen: Iterable[int]) -> _Columns:
    recordings = [gathered.recordings[index] for index in chosen]
    columns: _Columns = {TIME_COLUMN: np.concatenate([each.t for each in recordings]) / 1e6}
    values = np.concatenate([recording.values for recording in recordings])
    columns |= {name: values[:, i] for i, name in enumerate(gathered.fields)}
    if derived_columns is not None:
        # float64 holds float32, so that the text gives the same bits.
        computed = np.concatenate([derived_columns.values[index] for index in chosen]).astype(np.float64)
        columns |= {name: computed[:, i] for i, name in enumerate(derived_columns.names)}
    texts = np.array([pair for each in recordings for pair in _label_rows(each)], np.str_)
    columns[LABEL_COLUMN] = texts[:, 0]
    for output in gathered.outputs:
        labels = [label for each in recordings for label, _ in _label_rows(each, output)]
        columns[name_label_column(output)] = np.array(labels, np.str_)
    counts = [len(each.t) for each in recordings]
    devices, names, sources = TEXT_COLUMNS
    columns[devices] = repeat([each.device for each in recordings], counts)
    columns[names] = repeat([*map(name_recording, recordings)], counts)
    return columns | {sources: texts[:, 1]}


def _label_rows(recording: Recording, output: str = "") -> Iterator[tuple[str, str]]:
    """Return (label, its sources) of each row, "" without one."""
    by_row = {label.row: label for label in recording.get_output(output).labels if label.label is not None}
    for row in range(recording.first, recording.last + 1):
        label = by_row.get(row)
        yield ("", "") if label is None else (label.label or "", "+".join(label.sources))


def _encode(columns: Mapping[str, NDArray[Any]], data_format: DataFormat) -> bytes:
    return _to_csv(columns) if data_format == "csv" else _to_parquet(columns)


def _to_parquet(columns: Mapping[str, NDArray[Any]]) -> bytes:
    try:
        import pyarrow as pa
    except ImportError:
        raise UsageError(f"{describe_missing_pyarrow()}: --format csv") from None
    arrays = {}
    for name, column in columns.items():
        if column.dtype.kind == "U":
            arrays[name] = pa.array([text or None for text in column.tolist()], pa.string())
        else:
            arrays[name] = pa.array(column, from_pandas=True)
    return to_parquet(pa.table(arrays))


def _to_csv(columns: Mapping[str, NDArray[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    # Fields that a device names reach here unchecked, as labels of results do.
    writer.writerow([*map(csv_text, columns)])
    shown = [_to_cells(name, column) for name, column in columns.items()]
    writer.writerows(zip(*shown, strict=True))
    return buffer.getvalue().encode()


def _to_cells(name: str, column: NDArray[Any]) -> list[str]:
    if name == TIME_COLUMN:
        return [f"{t:.6f}" for t in column.tolist()]
    if column.dtype.kind == "U":
        return [*map(csv_text, column.tolist())]
    return ["" if value != value else repr(value) for value in column.tolist()]
