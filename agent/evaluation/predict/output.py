"""Answers to a file, in a shape that can be cut off at a checkpoint and gone on with: CSV lines, or Arrow messages that
become Parquet at the end (a Parquet file is none until its last byte)."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from agent.datasets.blocks import FILE, Texts, is_media
from agent.datasets.tables import NO_PYARROW
from agent.errors import Busy, UsageError
from agent.model.bundle.manifest import Manifest
from agent.model.inference import scores
from agent.model.inference.features import Ints
from agent.model.inference.inference import Answers

SUFFIXES = (".csv", ".parquet")
_GROUP = 1 << 17  # rows of a Parquet row group
Column = NDArray[Any]


class Columns:
    """`row`, `label`, `score` or `value`, and what more the kind gives; with `raw` the model's outputs, dequantized."""

    def __init__(self, manifest: Manifest, outputs: int, *, raw: bool) -> None:
        self._manifest = manifest
        self._raw = outputs if raw else 0
        output, kind = manifest.output, manifest.kind
        labelled = kind == "classify" or (kind != "regress" and output.threshold is not None)
        self._more = [f"score_{label}" for label in output.labels if output.multi_label]
        self._more += [f"value_{name}" for name in output.names[1:] if kind == "regress"]
        self.names = [
            "row",
            *([FILE] if is_media(manifest.input) else []),
            *(["label"] if labelled else []),
            "score" if kind == "classify" else "value",
        ]
        self.names += [*self._more, *(f"raw_{i}" for i in range(self._raw))]

    def of(self, number: Ints, answers: Answers, files: Texts | None) -> list[Column]:
        found = answers.scores
        told: dict[str, Column] = {
            "row": number,
            **({} if files is None else {FILE: files}),
            **{name: found.more[name] for name in self._more},
        }
        if found.score is not None:
            told["score"] = found.score
        if found.value is not None:
            told["value"] = found.value
        if "label" in self.names:
            told["label"] = self._labels(found)
        if self._raw and answers.outputs is not None:
            told |= {f"raw_{i}": answers.outputs[:, i] for i in range(self._raw)}
        return [_short(told[name]) for name in self.names]

    def _labels(self, found: scores.Scores) -> Column:
        if found.label is not None and found.said is None:
            return np.array(self._manifest.output.labels)[found.label]
        return np.array(scores.texts(found, self._manifest) or [], np.str_)


class Part:
    """`OUT.part`, locked; once begun, anew or after so many bytes of before, it is renamed to OUT at the end."""

    def __init__(self, out: Path, columns: Columns) -> None:
        """Raises UsageError, Busy."""
        self._out, self._columns, self.path = out, columns, part_of(out)
        self._text = out.suffix == ".csv"
        self._arrow = _arrow(out, needed=not self._text)
        self._file = locked(self.path)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def begin(self, written: int) -> None:
        """Go on after the first `written` bytes."""
        self._file.truncate(written)
        self._file.seek(written)
        if not written:
            self._file.write(self._head())

    def write(self, number: Ints, answers: Answers, files: Texts | None) -> None:
        """`files`: which of many the answers are of, where there are many."""
        if not len(number):
            return
        columns = self._columns.of(number, answers, files)
        self._file.write(_lines(columns, self._arrow) if self._text else self._message(columns))

    def keep(self) -> int:
        """The bytes that are safe on the disk from now on."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def finish(self) -> None:
        """OUT is there, as a whole."""
        self.keep()
        if self._text:
            self.path.replace(self._out)
        else:
            self._to_parquet()
            # Last, for the lock is on it.
            self.path.unlink()
        _sync(self._out.parent)
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _head(self) -> bytes:
        if self._text:
            return (",".join(self._columns.names) + "\n").encode()
        return bytes(self._schema().serialize())

    def _schema(self) -> Any:
        pa = self._arrow
        kinds = {"row": pa.int64(), "label": pa.string(), FILE: pa.string()}
        other = {True: pa.float32(), False: pa.float64()}
        return pa.schema([(n, kinds.get(n, other[n.startswith("raw_")])) for n in self._columns.names])

    def _message(self, columns: Sequence[Column]) -> bytes:
        schema = self._schema()
        arrays = [self._arrow.array(c).cast(field.type) for c, field in zip(columns, schema, strict=True)]
        return bytes(self._arrow.record_batch(arrays, schema=schema).serialize())

    def _to_parquet(self) -> None:
        from pyarrow import parquet

        made = self.path.with_name(f"{self.path.name}.parquet")
        with self.path.open("rb") as file, parquet.ParquetWriter(made, self._schema()) as writer:
            for table in _groups(self._arrow.ipc.open_stream(file), self._arrow):
                writer.write_table(table, row_group_size=_GROUP)
        _sync(made)
        made.replace(self._out)


def locked(path: Path) -> BinaryIO:
    """The file, made where it is not there, and touched only once it is ours. Raises UsageError, Busy."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            _lock(file, path)
            if _is_at(file, path):
                return file
            # It was finished, and renamed, between the opening and the lock.
            file.close()
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; name another place with -o") from None


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Busy(f"{path}: another `model run` writes it; wait for that, or name another -o") from None
    except OSError:
        file.close()
        raise


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def part_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.part")


def _groups(batches: Any, pa: Any) -> Iterator[Any]:
    """Tables of the same size, however the rows were cut into batches."""
    waiting: list[Any] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= _GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, _GROUP).combine_chunks()
            waiting = table.slice(_GROUP).to_batches()
            rows -= _GROUP
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def _arrow(out: Path, *, needed: bool) -> Any:
    try:
        import pyarrow
    except ImportError:
        if needed:
            raise UsageError(f"{out}: {NO_PYARROW}") from None
        return None
    return pyarrow


def _lines(columns: Sequence[Column], pa: Any) -> bytes:
    """CSV lines; a number that is not finite is an empty cell."""
    if not len(columns[0]):
        return b""
    if pa is None:
        texts = [_texts(column) for column in columns]
        return ("\n".join(map(",".join, zip(*texts, strict=True))) + "\n").encode()
    from pyarrow import compute

    cells = [pa.array(_quoted(c)) if c.dtype.kind == "U" else _numbers(c, pa, compute) for c in columns]
    lines = compute.binary_join_element_wise(*cells, ",")
    return _bytes_of(compute.binary_join_element_wise(lines, "\n", ""))


def _numbers(column: Column, pa: Any, compute: Any) -> Any:
    text = pa.array(column).cast(pa.string())
    if column.dtype.kind == "f" and not np.isfinite(column).all():
        return compute.if_else(pa.array(np.isfinite(column)), text, "")
    return text


def _bytes_of(lines: Any) -> bytes:
    """The characters of an Arrow array of text, one after the other."""
    _, offsets, characters = lines.buffers()
    ends = np.frombuffer(offsets, np.int32, len(lines) + 1, lines.offset * 4)
    return bytes(memoryview(characters)[int(ends[0]) : int(ends[-1])])


def _texts(column: Column) -> list[str]:
    if column.dtype.kind == "U":
        return [str(text) for text in _quoted(column)]
    if column.dtype.kind == "f":
        return [text if text[-1] not in "nf" else "" for text in column.astype(np.str_)]
    return list(map(str, column.tolist()))


def _quoted(labels: Column) -> Column:
    known, at = np.unique(labels, return_inverse=True)
    return np.array([_cell(str(label)) for label in known])[at]


def _cell(text: str) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow([text])
    return out.getvalue()


def _short(value: Column) -> Column:
    """As float32 where that is all it was: 0.1 reads better than 0.10000000149011612."""
    if value.dtype != np.float64:
        return value
    with np.errstate(over="ignore"):
        small = value.astype(np.float32)
    return small if np.array_equal(small, value, equal_nan=True) else value
