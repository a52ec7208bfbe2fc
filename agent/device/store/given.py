"""Results of one batch as they are kept for labels: columns, packed, and one of them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

_CRC = struct.Struct("<I")


class StoredPredictions(msgspec.Struct, frozen=True):
    """Results of one batch, in order of their rows, at least one.

    `row` (n,), `t` (n,) epoch µs, `said` (n,) class index, `score`, `value`; `slices`: name → (n,) texts.
    """

    bundle: str
    row: NDArray[np.int64]
    t: NDArray[np.int64]
    predicted_class: NDArray[np.int64] | None
    score: NDArray[np.float64] | None
    value: NDArray[np.float64] | None
    slices: Mapping[str, Sequence[str]]


class PredictionRow(msgspec.Struct, frozen=True):
    """One of them."""

    bundle: str
    row: int
    t: int
    predicted_class: int | None
    score: float | None
    value: float | None
    slices: dict[str, str]


class _PackedPredictions(msgspec.Struct, array_like=True):
    bundle: str
    first_t: int
    row: bytes
    t: bytes
    predicted_class: bytes
    score: bytes
    value: bytes
    slices: dict[str, tuple[list[str], bytes]]


def pack_predictions(predictions: StoredPredictions) -> bytes:
    """With a CRC, compressed; NaN where a score or value is not known."""
    slices = {}
    for name, texts in predictions.slices.items():
        known = sorted(set(texts))
        codes = [known.index(text) for text in texts]
        slices[name] = (known, np.array(codes, "<u2").tobytes())
    packed = _PackedPredictions(
        predictions.bundle,
        int(predictions.t[0]),
        (predictions.row - predictions.row[0]).astype("<u4").tobytes(),
        np.diff(predictions.t, prepend=predictions.t[0]).astype("<i8").tobytes(),
        b"" if predictions.predicted_class is None else predictions.predicted_class.astype("<u2").tobytes(),
        b"" if predictions.score is None else predictions.score.astype("<f4").tobytes(),
        b"" if predictions.value is None else predictions.value.astype("<f8").tobytes(),
        slices,
    )
    data = zlib.compress(msgspec.msgpack.encode(packed), 1)
    return _CRC.pack(zlib.crc32(data, int(predictions.row[0]) & 0xFFFFFFFF)) + data


def unpack_predictions(first: int, data: bytes) -> StoredPredictions:
    """Inverse of `pack`; `first` is the first result's row. Raises ValueError where it is not what was packed."""
    body = data[_CRC.size :]
    if data[: _CRC.size] != _CRC.pack(zlib.crc32(body, first & 0xFFFFFFFF)):
        raise ValueError("CRC does not match")
    try:
        packed = msgspec.msgpack.decode(zlib.decompress(body), type=_PackedPredictions)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    slices = {
        name: [known[code] for code in np.frombuffer(codes, "<u2")] for name, (known, codes) in packed.slices.items()
    }
    return StoredPredictions(
        packed.bundle,
        np.frombuffer(packed.row, "<u4").astype(np.int64) + first,
        np.cumsum(np.frombuffer(packed.t, "<i8"), dtype=np.int64) + packed.first_t,
        np.frombuffer(packed.predicted_class, "<u2").astype(np.int64) if packed.predicted_class else None,
        np.frombuffer(packed.score, "<f4").astype(np.float64) if packed.score else None,
        np.frombuffer(packed.value, "<f8") if packed.value else None,
        slices,
    )


def covers_time(predictions: StoredPredictions, t: int) -> bool:
    return bool(predictions.t[0] <= t <= predictions.t[-1])


def select_row(predictions: StoredPredictions, index: int) -> PredictionRow:
    return PredictionRow(
        predictions.bundle,
        int(predictions.row[index]),
        int(predictions.t[index]),
        None if predictions.predicted_class is None else int(predictions.predicted_class[index]),
        None if predictions.score is None else _finite_or_none(predictions.score[index]),
        None if predictions.value is None else _finite_or_none(predictions.value[index]),
        {name: texts[index] for name, texts in predictions.slices.items()},
    )


def _finite_or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
