"""Stored predictions: those of a batch as one packed row of table `predictions`, and the queries of that table."""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation import decoders

_CRC = struct.Struct("<I")
# No name has a space.
_OUTPUT = " output "


class StoredPredictions(msgspec.Struct, frozen=True):
    """Predictions of one batch, at least one, in order of their rows.

    `row` (n,), `t` (n,) epoch µs, `predicted_class` (n,) class index, `score`, `value`; `slices`: name → (n,) texts.
    `joined`: stream of each further input, and the last of its rows that the batch was joined with; 0 for none.
    """

    bundle: str
    row: NDArray[np.int64]
    t: NDArray[np.int64]
    predicted_class: NDArray[np.int64] | None
    score: NDArray[np.float64] | None
    value: NDArray[np.float64] | None
    slices: Mapping[str, Sequence[str]]
    joined: Mapping[str, tuple[str, int]] = {}
    expected_bin: NDArray[np.uint8] | None = None  # (n,) bin of the error to expect of each value


class PredictionRow(msgspec.Struct, frozen=True):
    bundle: str
    row: int
    t: int
    predicted_class: int | None
    score: float | None
    value: float | None
    slices: dict[str, str]
    expected_bin: int | None = None  # of the error to expect of its value


class _PackedPredictions(msgspec.Struct, array_like=True):
    """Columns of `n` results: byte planes; of `row` and `t` the steps, a single one where all are equal."""

    bundle: str
    n: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    first_t: int
    row: bytes
    t: bytes
    predicted_class: bytes
    score: bytes
    value: bytes
    slices: dict[str, tuple[list[str], bytes]]
    joined: dict[str, tuple[str, int]] = {}
    expected_bin: bytes = b""  # earlier versions stored none


class PredictionSpan(msgspec.Struct, frozen=True):
    """First and last row of a task's stored predictions, and the time of the last."""

    first: int
    last: int
    last_t: int


def output_key(task: str, output: str) -> str:
    """Return the key under which predictions and labels of a task's output are stored; "" is the first output."""
    return f"{task}{_OUTPUT}{output}" if output else task


def output_key_range(key: str) -> tuple[str, str]:
    """Return the first and the last possible one of all outputs of the task that the output of `key` belongs to."""
    task = key.partition(_OUTPUT)[0]
    # No character of a name sorts above this one, or below the space before the output.
    return task, output_key(task, "~")


def shadow_key(task: str, output: str = "") -> str:
    """Return the key under which a shadow bundle's predictions are stored: no task can have this name."""
    return output_key(f"{task} shadow", output)


# --- queries, also of a read-only store (`Store.query`) ---


def list_stored_outputs(db: sqlite3.Connection, task: str) -> list[str]:
    """Return the names of a task's outputs with stored predictions or labels: "", then the further ones."""
    outputs, last = [""], output_key(task, " ")
    end = output_key_range(task)[1]
    sql = """
        SELECT min(task) FROM (
            SELECT min(task) AS task FROM predictions WHERE task > :last AND task < :end UNION ALL
            SELECT min(task) FROM labels WHERE task > :last AND task < :end)"""
    while (key := db.execute(sql, {"last": last, "end": end}).fetchone()[0]) is not None:
        last = str(key)
        outputs.append(last.removeprefix(task + _OUTPUT))
    return outputs


def load_span(db: sqlite3.Connection, task: str) -> PredictionSpan | None:
    sql = """
        SELECT (SELECT first_row FROM predictions WHERE task = :task ORDER BY first_row LIMIT 1), last_row, last_t
        FROM checked_predictions WHERE task = :task ORDER BY first_row DESC LIMIT 1"""
    row = db.execute(sql, {"task": task}).fetchone()
    return PredictionSpan(*map(int, row)) if row else None


def load_prediction(db: sqlite3.Connection, task: str, row: int) -> PredictionRow | None:
    """Return the prediction at exactly this row, if it is stored and readable."""
    batch = _load_batch(db, task, row)
    return None if batch is None else select_row(*batch)


def load_joined(db: sqlite3.Connection, task: str, row: int) -> Mapping[str, tuple[str, int]]:
    """Return stream and last joined row of each further input of the result at `row`; nothing if it is not stored."""
    batch = _load_batch(db, task, row)
    return {} if batch is None else batch[0].joined


def _load_batch(db: sqlite3.Connection, task: str, row: int) -> tuple[StoredPredictions, int] | None:
    """Return the batch with the result at exactly this row, and its index there."""
    sql = """
        SELECT first_row, CAST(data AS BLOB) FROM predictions WHERE task = ? AND first_row <= ?
        ORDER BY first_row DESC LIMIT 1"""
    stored = db.execute(sql, (task, row)).fetchone()
    batch = unpack_or_none(*stored) if stored else None
    index = -1 if batch is None else int(np.searchsorted(batch.row, row))
    return (batch, index) if batch is not None and row in batch.row[index : index + 1] else None


def load_newest_predictions(db: sqlite3.Connection, task: str, limit: int) -> list[StoredPredictions]:
    """Return the readable ones of the newest `limit` batches, newest first."""
    sql = "SELECT first_row, CAST(data AS BLOB) FROM predictions WHERE task = ? ORDER BY first_row DESC LIMIT ?"
    batches = (unpack_or_none(*stored) for stored in db.execute(sql, (task, limit)))
    return [batch for batch in batches if batch is not None]


def count_predictions(db: sqlite3.Connection, task: str, first: int, last: int) -> int:
    """Count the stored predictions of batches that overlap rows `first` … `last`."""
    sql = "SELECT coalesce(sum(n), 0) FROM checked_predictions WHERE task = ? AND first_row <= ? AND last_row >= ?"
    return int(db.execute(sql, (task, last, first)).fetchone()[0])


# --- packing ---


def pack_predictions(predictions: StoredPredictions) -> bytes:
    """Compress predictions behind a CRC; unknown scores and values are NaN."""
    slices = {}
    for name, texts in predictions.slices.items():
        known = sorted(set(texts))
        codes = [known.index(text) for text in texts]
        slices[name] = (known, np.array(codes, "<u2").tobytes())
    packed = _PackedPredictions(
        predictions.bundle,
        len(predictions.row),
        int(predictions.t[0]),
        _pack_steps(predictions.row, "<u4"),
        _pack_steps(predictions.t, "<i8"),
        _pack_planes(predictions.predicted_class, "<u2"),
        _pack_planes(predictions.score, "<f4"),
        _pack_planes(predictions.value, "<f8"),
        slices,
        dict(predictions.joined),
        _pack_planes(predictions.expected_bin, "u1"),
    )
    # Runs only: a search for longer matches takes three times as long, and finds few among scores.
    compressor = zlib.compressobj(1, zlib.DEFLATED, strategy=zlib.Z_RLE)
    data = compressor.compress(msgspec.msgpack.encode(packed)) + compressor.flush()
    return _CRC.pack(zlib.crc32(data, int(predictions.row[0]) & 0xFFFFFFFF)) + data


def unpack_predictions(first: int, data: bytes) -> StoredPredictions:
    """Invert `pack_predictions`; `first` is the first row. Raises ValueError if the bytes were changed."""
    body = data[_CRC.size :]
    if data[: _CRC.size] != _CRC.pack(zlib.crc32(body, first & 0xFFFFFFFF)):
        raise ValueError("CRC does not match")
    try:
        packed = decoders.from_msgpack(zlib.decompress(body), _PackedPredictions)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    slices = {
        name: [known[code] for code in np.frombuffer(codes, "<u2")] for name, (known, codes) in packed.slices.items()
    }
    return StoredPredictions(
        packed.bundle,
        _unpack_steps(packed.row, "<u4", packed.n, first),
        _unpack_steps(packed.t, "<i8", packed.n, packed.first_t),
        None if not packed.predicted_class else _unpack_planes(packed.predicted_class, "<u2").astype(np.int64),
        None if not packed.score else _unpack_planes(packed.score, "<f4").astype(np.float64),
        None if not packed.value else _unpack_planes(packed.value, "<f8"),
        slices,
        packed.joined,
        _unpack_planes(packed.expected_bin, "u1") if packed.expected_bin else None,
    )


def _pack_planes(values: NDArray[Any] | None, kind: str) -> bytes:
    """Return the first bytes of all values, then the second ones: the high bytes of neighbours are alike."""
    if values is None:
        return b""
    width = np.dtype(kind).itemsize
    return np.ascontiguousarray(values, kind).view(np.uint8).reshape(len(values), width).T.tobytes()


def _unpack_planes(data: bytes, kind: str) -> NDArray[Any]:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(kind)[:, 0]


def _pack_steps(values: NDArray[np.int64], kind: str) -> bytes:
    steps = np.diff(values)
    is_regular = len(steps) > 1 and bool((steps[1:] == steps[:-1]).all())
    return (steps[:1] if is_regular else steps).astype(kind).tobytes()


def _unpack_steps(data: bytes, kind: str, n: int, first: int) -> NDArray[np.int64]:
    steps = np.frombuffer(data, kind).astype(np.int64)
    if len(steps) == 1:
        return np.asarray(first + steps[0] * np.arange(n, dtype=np.int64))
    return np.cumsum(np.concatenate([[first], steps]), dtype=np.int64)


def select_row(predictions: StoredPredictions, index: int) -> PredictionRow:
    return PredictionRow(
        predictions.bundle,
        int(predictions.row[index]),
        int(predictions.t[index]),
        None if predictions.predicted_class is None else int(predictions.predicted_class[index]),
        None if predictions.score is None else _finite_or_none(predictions.score[index]),
        None if predictions.value is None else _finite_or_none(predictions.value[index]),
        {name: texts[index] for name, texts in predictions.slices.items()},
        None if predictions.expected_bin is None else int(predictions.expected_bin[index]),
    )


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def unpack_or_none(first: int, data: bytes) -> StoredPredictions | None:
    try:
        return unpack_predictions(first, data)
    except ValueError:
        return None
