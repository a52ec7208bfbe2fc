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


class Given(msgspec.Struct, frozen=True):
    """Results of one batch, in order of their rows, at least one.

    `row` (n,), `t` (n,) epoch µs, `said` (n,) class index, `score`, `value`; `slices`: name → (n,) texts.
    """

    bundle: str
    row: NDArray[np.int64]
    t: NDArray[np.int64]
    said: NDArray[np.int64] | None
    score: NDArray[np.float64] | None
    value: NDArray[np.float64] | None
    slices: Mapping[str, Sequence[str]]


class Result(msgspec.Struct, frozen=True):
    """One of them."""

    bundle: str
    row: int
    t: int
    said: int | None
    score: float | None
    value: float | None
    slices: dict[str, str]


class _Packed(msgspec.Struct, array_like=True):
    bundle: str
    first_t: int
    row: bytes
    t: bytes
    said: bytes
    score: bytes
    value: bytes
    slices: dict[str, tuple[list[str], bytes]]


def pack(given: Given) -> bytes:
    """With a CRC, compressed; NaN where a score or value is not known."""
    slices = {}
    for name, texts in given.slices.items():
        known = sorted(set(texts))
        codes = [known.index(text) for text in texts]
        slices[name] = (known, np.array(codes, "<u2").tobytes())
    packed = _Packed(
        given.bundle,
        int(given.t[0]),
        (given.row - given.row[0]).astype("<u4").tobytes(),
        np.diff(given.t, prepend=given.t[0]).astype("<i8").tobytes(),
        b"" if given.said is None else given.said.astype("<u2").tobytes(),
        b"" if given.score is None else given.score.astype("<f4").tobytes(),
        b"" if given.value is None else given.value.astype("<f8").tobytes(),
        slices,
    )
    data = zlib.compress(msgspec.msgpack.encode(packed), 1)
    return _CRC.pack(zlib.crc32(data, int(given.row[0]) & 0xFFFFFFFF)) + data


def unpack(first: int, data: bytes) -> Given:
    """Inverse of `pack`; `first` is the first result's row. Raises ValueError where it is not what was packed."""
    body = data[_CRC.size :]
    if data[: _CRC.size] != _CRC.pack(zlib.crc32(body, first & 0xFFFFFFFF)):
        raise ValueError("CRC does not match")
    try:
        packed = msgspec.msgpack.decode(zlib.decompress(body), type=_Packed)
    except (zlib.error, msgspec.MsgspecError) as error:
        raise ValueError(str(error)) from None
    slices = {
        name: [known[code] for code in np.frombuffer(codes, "<u2")] for name, (known, codes) in packed.slices.items()
    }
    return Given(
        packed.bundle,
        np.frombuffer(packed.row, "<u4").astype(np.int64) + first,
        np.cumsum(np.frombuffer(packed.t, "<i8"), dtype=np.int64) + packed.first_t,
        np.frombuffer(packed.said, "<u2").astype(np.int64) if packed.said else None,
        np.frombuffer(packed.score, "<f4").astype(np.float64) if packed.score else None,
        np.frombuffer(packed.value, "<f8") if packed.value else None,
        slices,
    )


def spans(given: Given, t: int) -> bool:
    return bool(given.t[0] <= t <= given.t[-1])


def one_of(given: Given, index: int) -> Result:
    return Result(
        given.bundle,
        int(given.row[index]),
        int(given.t[index]),
        None if given.said is None else int(given.said[index]),
        None if given.score is None else _known(given.score[index]),
        None if given.value is None else _known(given.value[index]),
        {name: texts[index] for name, texts in given.slices.items()},
    )


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
