"""Output of batch prediction, written so that it can be cut off at a checkpoint: CSV, or Parquet.

Parquet is written as Arrow messages and converted at the end: a Parquet file is none before its last byte.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from outstation.foundation import durable_files
from outstation.foundation.arrays import Bools, Ints
from outstation.foundation.errors import FileBusy, UsageError
from outstation.foundation.text import csv_text
from outstation.ml.datasets.blocks import FILE_COLUMN, TextColumn
from outstation.ml.datasets.parquet_table import describe_missing_pyarrow
from outstation.ml.datasets.readers import is_media
from outstation.ml.model.bundle.manifest import Manifest, output_columns
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import InferenceResult

OUTPUT_SUFFIXES = (".csv", ".parquet")
_ROW_GROUP_SIZE = 1 << 17  # rows of a Parquet row group
Column = NDArray[Any]


class OutputColumns:
    """Columns: `row`, `label`, `score` or `value`, further ones of the kind, and raw outputs, dequantized."""

    def __init__(self, manifest: Manifest, outputs: int, *, raw: bool) -> None:
        self._manifest = manifest
        self._raw_count = outputs if raw else 0
        output, kind = manifest.output, manifest.kind
        labelled = kind == "classify" or (kind != "regress" and output.threshold is not None)
        self.names = [
            "row",
            *([FILE_COLUMN] if is_media(manifest.input) else []),
            *(["label"] if labelled else []),
            "score" if kind == "classify" else "value",
        ]
        self.names += [f"score_{label}" for label in output.labels if output.multi_label]
        self.names += ["value_low", "value_high"] if output.residual_bounds is not None else []
        self.names += [f"value_{name}" for name in output.names[1:] if kind == "regress"]
        self.names += [column for name, spec in manifest.further.items() for column in output_columns(name, spec)]
        self.names += [f"raw_{i}" for i in range(self._raw_count)]

    def build(self, row_numbers: Ints, result: InferenceResult, files: TextColumn | None) -> list[Column]:
        scored = result.scores
        columns: dict[str, Any] = {"row": row_numbers, FILE_COLUMN: files, **scored.extra_columns}
        columns |= scored.label_columns
        columns |= {"score": scored.score, "value": scored.value}
        if "label" in self.names:
            columns["label"] = (
                np.array(self._manifest.output.labels)[scored.label]
                if scored.label is not None and scored.predicted is None
                else np.array(scores.to_texts(scored, self._manifest) or [], np.str_)
            )
        if self._raw_count and result.outputs is not None:
            columns |= {f"raw_{i}": result.outputs[:, i] for i in range(self._raw_count)}
        return [_narrow_floats(columns[name]) for name in self.names]


class PartialOutput:
    """`OUT.part`, locked; at the end it is renamed to OUT, or converted to Parquet."""

    def __init__(self, out: Path, columns: OutputColumns) -> None:
        """Raise UsageError, FileBusy."""
        self._out, self._columns, self.path = out, columns, partial_path(out)
        self._text = out.suffix == ".csv"
        self._arrow: Any = None
        try:
            import pyarrow

            self._arrow = pyarrow
        except ImportError:
            if not self._text:
                raise UsageError(f"{out}: {describe_missing_pyarrow()}") from None
        self._file = open_locked(self.path)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def resume(self, written: int) -> None:
        """Continue after the first `written` bytes."""
        self._file.truncate(written)
        self._file.seek(written)
        if not written:
            head = (
                (",".join(map(_quote_cell, self._columns.names)) + "\n").encode()
                if self._text
                else self._schema().serialize()
            )
            self._file.write(head)

    def write(self, row_numbers: Ints, result: InferenceResult, files: TextColumn | None) -> None:
        """Write results; `files` are the files of a folder that they are of."""
        if not len(row_numbers):
            return
        columns = self._columns.build(row_numbers, result, files)
        if self._text:
            self._file.write(_csv_lines(columns, self._arrow))
            return
        schema = self._schema()
        arrays = [self._arrow.array(c).cast(field.type) for c, field in zip(columns, schema, strict=True)]
        self._file.write(self._arrow.record_batch(arrays, schema=schema).serialize())

    def sync(self) -> int:
        """Return the bytes that are safely on the disk."""
        durable_files.flush(self._file)
        return self._file.tell()

    def finish(self) -> None:
        self.sync()
        if self._text:
            durable_files.rename(self.path, self._out)
        else:
            from pyarrow import parquet

            made = self.path.with_name(f"{self.path.name}.parquet")
            with self.path.open("rb") as file, parquet.ParquetWriter(made, self._schema()) as writer:
                for table in _row_groups(self._arrow.ipc.open_stream(file), self._arrow):
                    writer.write_table(table, row_group_size=_ROW_GROUP_SIZE)
            durable_files.fsync(made)
            durable_files.rename(made, self._out)
            # Last, because the lock is on it.
            self.path.unlink()
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _schema(self) -> Any:
        pa = self._arrow
        kinds = {"row": pa.int64(), "label": pa.string(), FILE_COLUMN: pa.string()}
        # Of further outputs: label_NAME.
        others = {"label": pa.string(), "raw": pa.float32()}
        names = self._columns.names
        return pa.schema([(n, kinds.get(n) or others.get(n.partition("_")[0], pa.float64())) for n in names])


def open_locked(path: Path) -> BinaryIO:
    """Open or create the file under an exclusive lock; nothing is written before. Raises UsageError, FileBusy."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise FileBusy(f"{path}: another `model run` writes it; wait for that, or name another -o") from None
            except OSError:
                file.close()
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            # Another run finished and renamed it between the opening and the lock.
            file.close()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; name another place with -o") from None


def partial_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _row_groups(batches: Any, pa: Any) -> Iterator[Any]:
    """Yield tables of the same size, however the rows were cut into batches."""
    waiting: list[Any] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= _ROW_GROUP_SIZE:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _ROW_GROUP_SIZE).combine_chunks()
            waiting = table.slice(_ROW_GROUP_SIZE).to_batches()
            rows -= _ROW_GROUP_SIZE
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _csv_lines(columns: Sequence[Column], pa: Any) -> bytes:
    """Return CSV lines; a number that is not finite is an empty cell."""
    if not len(columns[0]):
        return b""
    if pa is None:
        texts = [_format_cells(column) for column in columns]
        return ("\n".join(map(",".join, zip(*texts, strict=True))) + "\n").encode()
    from pyarrow import compute

    cells = [pa.array(_quote_labels(c)) if c.dtype.kind == "U" else _format_numbers(c, pa, compute) for c in columns]
    lines = compute.binary_join_element_wise(compute.binary_join_element_wise(*cells, ","), "\n", "")
    # The characters of all lines, one after the other.
    _, offsets, characters = lines.buffers()
    ends = np.frombuffer(offsets, np.int32, len(lines) + 1, lines.offset * 4)
    return bytes(memoryview(characters)[int(ends[0]) : int(ends[-1])])


def _format_numbers(column: Column, pa: Any, compute: Any) -> Any:
    text = pa.array(column).cast(pa.string())
    if column.dtype == np.float64 and (is_narrow := _fits_float32(column)).any():
        text = compute.if_else(pa.array(is_narrow), pa.array(_to_float32(column)).cast(pa.string()), text)
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        return compute.if_else(pa.array(np.isfinite(column)), text, "")
    return text


def _format_cells(column: Column) -> list[str]:
    if column.dtype.kind == "U":
        return [str(text) for text in _quote_labels(column)]
    if column.dtype.kind == "f":
        texts = column.astype(np.str_)
        if column.dtype == np.float64 and (is_narrow := _fits_float32(column)).any():
            texts = np.where(is_narrow, _to_float32(column).astype(np.str_), texts)
        return [text if text[-1] not in "nf" else "" for text in texts]
    return list(map(str, column.tolist()))


def _quote_labels(labels: Column) -> Column:
    known, at = np.unique(labels, return_inverse=True)
    return np.array([_quote_cell(str(label)) for label in known])[at]


def _quote_cell(text: str) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([csv_text(text)])
    return out.getvalue()


def _narrow_floats(value: Column) -> Column:
    """Return float32 if no value of the block has more digits."""
    return _to_float32(value) if value.dtype == np.float64 and _fits_float32(value).all() else value


def _fits_float32(value: Column) -> Bools:
    """Return which values have no more digits than float32: 0.1 reads better than 0.10000000149011612.

    The text of a value follows from that value alone, so it is the same in a block of any size.
    """
    return np.asarray((_to_float32(value) == value) | np.isnan(value))


def _to_float32(value: Column) -> Column:
    with np.errstate(over="ignore"):
        return value.astype(np.float32)
