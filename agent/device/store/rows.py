"""Readings of one stream as packed columns: validated on the way in, never one object per row."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.config import Field, Stream
from agent.errors import Rejected
from agent.toml_files import suggestion

T_MAX_S = 4_102_444_800.0  # 2100-01-01
_DTYPES = {"f32": "<f4", "f64": "<f8", "i64": "<i8", "category": "<u2"}
_SHORT_SPAN = 2**32 - 1
_HEAD = struct.Struct("<qqq")
_EXACT = 2**53
_LARGEST = sys.float_info.max
_LONG_AGO = np.int64(-(2**62))
_TIME = Field(name="t", type="f64", optional=True)


def row_bytes(stream: Stream) -> int:
    """What a row of `stream` takes: its time, and each field as stored."""
    return 8 + sum(np.dtype(_DTYPES[field.type]).itemsize for field in stream.fields)


class Rows(msgspec.Struct, frozen=True):
    """`t` epoch µs (n,) int64; `columns` one array (n,) a field, in the stream's order and dtype."""

    t: NDArray[np.int64]
    columns: tuple[NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.t)

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(self.t[start:stop], tuple(c[start:stop] for c in self.columns))

    def digest(self) -> str:
        """`sha256:…` over the little-endian bytes of t, then of each column: the same for any chunking."""
        sha = hashlib.sha256(_little(self.t))
        for column in self.columns:
            sha.update(_little(column))
        return f"sha256:{sha.hexdigest()}"


EMPTY = Rows(np.zeros(0, np.int64), ())


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of `parts`, in order."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([p.t for p in parts]),
        tuple(np.concatenate(columns) for columns in zip(*(p.columns for p in parts), strict=True)),
    )


class Packed(msgspec.Struct, frozen=True):
    """A chunk as stored: times as offsets from `first_t`, 4 bytes each where the span allows, else 8."""

    n: int
    first_t: int
    time_bytes: int
    data: bytes
    crc: int


def pack(rows: Rows) -> Packed:
    """`rows`, at least one, as one blob with its CRC-32."""
    first = int(rows.t[0])
    offsets = rows.t - first
    short = int(np.min(offsets)) >= 0 and int(np.max(offsets)) <= _SHORT_SPAN
    head = offsets.astype("<u4" if short else "<i8")
    data = b"".join([memoryview(head), *(_little(c) for c in rows.columns)])
    return Packed(len(rows), first, head.itemsize, data, _crc(len(rows), first, head.itemsize, data))


def _crc(n: int, first_t: int, time_bytes: int, data: bytes) -> int:
    """Over what the blob means, too: a wrong first time would move every row of the chunk."""
    return zlib.crc32(data, zlib.crc32(_HEAD.pack(n, first_t, time_bytes)))


def is_whole(packed: Packed) -> bool:
    """Whether the bytes are those that were packed."""
    try:
        return _crc(packed.n, packed.first_t, packed.time_bytes, packed.data) == packed.crc
    except (struct.error, TypeError):
        return False


def unpack(packed: Packed, fields: Sequence[Field]) -> Rows:
    """Inverse of `pack`. Raises ValueError where the bytes are not what was packed."""
    if not is_whole(packed):
        raise ValueError("CRC does not match")
    dtypes = [np.dtype(_DTYPES[f.type]) for f in fields]
    if len(packed.data) != packed.n * (packed.time_bytes + sum(d.itemsize for d in dtypes)):
        raise ValueError("length does not match the stream's fields")
    offsets = np.frombuffer(packed.data, "<u4" if packed.time_bytes == 4 else "<i8", packed.n)
    columns, at = [], offsets.nbytes
    for dtype in dtypes:
        columns.append(np.frombuffer(packed.data, dtype, packed.n, at))
        at += packed.n * dtype.itemsize
    return Rows(offsets.astype(np.int64) + packed.first_t, tuple(columns))


class Raw(msgspec.Struct, frozen=True):
    """Columns as a producer gave them, of `n` values each, by field name; None is a missing value.

    `t` epoch seconds, where None (the whole, or one value) means now.
    """

    n: int
    t: Any
    values: Mapping[str, Any]


class Checked(msgspec.Struct, frozen=True):
    """What came of a Raw: `rows` are good; `categories` holds text of category columns; `bad` index → reason.

    `latest` is the producer's latest time so far, epoch µs, for its next `check`.
    """

    rows: Rows
    categories: dict[int, list[str]]
    bad: dict[int, str]
    latest: int | None = None


def check(raw: Raw, stream: Stream, now_us: int, after_us: int | None) -> Checked:
    """Validate columns against the stream's fields.

    `now_us` stamps rows without a time; `after_us` is the producer's latest time so far: its time may not run
    backwards within one connection or file. Raises Rejected where the columns as a whole cannot be taken.
    """
    names = [f.name for f in stream.fields]
    for extra in raw.values.keys() - set(names):
        raise Rejected(f"{extra!r} is not a field of this stream{suggestion(extra, names)}")
    bad: dict[int, str] = {}
    arrays: list[NDArray[Any]] = []
    categories: dict[int, list[str]] = {}
    for index, field in enumerate(stream.fields):
        values = raw.values.get(field.name)
        if values is None:
            if not field.optional:
                raise Rejected(f"field {field.name!r} is missing")
            values = [None] * raw.n
        if len(values) != raw.n:
            raise Rejected(f"field {field.name!r} has {len(values)} values, {raw.n} are needed")
        if field.type == "category":
            categories[index] = _check_text(values, field, bad)
            arrays.append(np.zeros(raw.n, "<u2"))
        else:
            arrays.append(_check_numbers(values, field, bad))
    t, latest = _check_time(raw, now_us, after_us, bad)
    if not bad:
        return Checked(Rows(t, tuple(arrays)), categories, bad, latest)
    good = np.setdiff1d(np.arange(raw.n), np.fromiter(bad, np.int64, len(bad)))
    kept = {index: [texts[i] for i in good] for index, texts in categories.items()}
    return Checked(Rows(t[good], tuple(a[good] for a in arrays)), kept, bad, latest)


def _check_numbers(values: Any, field: Field, bad: dict[int, str]) -> NDArray[Any]:
    numbers = _plain_numbers(values, field.type)
    if numbers is not None and (good := _good(numbers, field)) is not None:
        return good
    missing = np.zeros(len(values), bool)
    if numbers is None:
        whole = field.type == "i64"
        found = [_number(value, field, whole, index, bad) for index, value in enumerate(values)]
        missing = np.array([value is None for value in values], bool) & field.optional
        numbers = np.array(found, np.int64 if whole else np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        typed = numbers.astype(_DTYPES[field.type])
        if typed.dtype.kind == "f":
            _mark(bad, ~np.isfinite(numbers) & ~missing, field, numbers, "is no finite number")
            _mark(bad, np.isinf(typed), field, numbers, f"is too large for {field.type}")
        # Limits in the column's own precision: what was taken once is taken again when it comes back as f32.
        kind = typed.dtype.type if typed.dtype.kind == "f" else float
        if field.min is not None:
            _mark(bad, typed < kind(field.min), field, numbers, f"is below min {field.min:.9g}")
        if field.max is not None:
            _mark(bad, typed > kind(field.max), field, numbers, f"is above max {field.max:.9g}")
    return typed


def _good(numbers: NDArray[Any], field: Field) -> NDArray[Any] | None:
    """The column as stored where no value needs a second look, else None: two passes, where finding one takes eight."""
    if not len(numbers):
        return None
    typed = numbers
    if numbers.dtype != _DTYPES[field.type]:
        with np.errstate(invalid="ignore", over="ignore"):
            typed = numbers.astype(_DTYPES[field.type])
    low, high = np.minimum.reduce(typed), np.maximum.reduce(typed)
    kind = typed.dtype.type if typed.dtype.kind == "f" else float
    if typed.dtype.kind == "f" and not (-np.inf < low and high < np.inf):
        return None
    within = (field.min is None or low >= kind(field.min)) and (field.max is None or high <= kind(field.max))
    return typed if within else None


def _plain_numbers(values: Any, kind: str) -> NDArray[Any] | None:
    """The values as one array where all are numbers that it can hold exactly; else None, for a look at each."""
    if isinstance(values, np.ndarray):
        fits = values.dtype.kind == "i" if kind == "i64" else values.dtype.kind in "iuf"
        return values if fits and values.ndim == 1 else None
    kinds = set(map(type, values))
    try:
        if kind == "i64":
            return np.array(values, np.int64) if kinds <= {int} else None
        return np.array(values, np.float64) if kinds <= {int, float} else None
    except OverflowError:
        return None


def _number(value: Any, field: Field, whole: bool, index: int, bad: dict[int, str]) -> float:
    """One value of a column that is not plainly numeric: NaN (0 where `whole`) and a reason in `bad` if it is none."""
    if value is None:
        if not field.optional:
            bad.setdefault(index, f"{field.name} is missing")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        bad.setdefault(index, f"{field.name} = {str(value)[:40]!r} is no number")
    elif not whole:
        fits = isinstance(value, float) or abs(value) <= _LARGEST
        return float(value) if fits else math.inf if value > 0 else -math.inf
    elif -(2**63) <= value < 2**63 and (isinstance(value, int) or (value == int(value) and abs(value) <= _EXACT)):
        return int(value)
    else:
        bad.setdefault(index, f"{field.name} = {str(value)[:40]} is no whole number of 64 bits")
    return 0 if whole else float("nan")


def _check_text(values: Any, field: Field, bad: dict[int, str]) -> list[str]:
    texts = []
    for index, value in enumerate(values):
        if value is None and field.optional:
            texts.append("")
        elif isinstance(value, str) and 0 < len(value) <= 64 and (value.isascii() or _is_unicode(value)):
            texts.append(value)
        else:
            shown = "is missing" if value is None else f"= {str(value)[:40]!r} is no category: text of 1-64 characters"
            bad.setdefault(index, f"{field.name} {shown}")
            texts.append("")
    return texts


def _is_unicode(text: str) -> bool:
    """Whether no byte of a file that is not UTF-8 hides in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _check_time(
    raw: Raw, now_us: int, after_us: int | None, bad: dict[int, str]
) -> tuple[NDArray[np.int64], int | None]:
    if raw.t is None:
        return np.full(raw.n, now_us, np.int64), after_us
    if len(raw.t) != raw.n:
        raise Rejected(f"t has {len(raw.t)} values, {raw.n} are needed")
    seconds = _check_numbers(raw.t, _TIME, bad)
    if not bad and raw.n and (t := _times(seconds, after_us)) is not None:
        return t, int(t[-1])
    with np.errstate(invalid="ignore"):
        _mark(bad, seconds < 0, _TIME, seconds, "is before 1970")
        _mark(bad, seconds > T_MAX_S, _TIME, seconds, "is after 2100; give seconds since 1970, not milliseconds")
    given = np.isfinite(seconds) & (seconds >= 0) & (seconds <= T_MAX_S)
    t = np.where(given, np.rint(np.where(given, seconds, 0) * 1e6).astype(np.int64), np.int64(now_us))
    given[list(bad)] = False
    start = _LONG_AGO if after_us is None else np.int64(after_us)
    before = np.maximum.accumulate(np.concatenate([[start], np.where(given, t, _LONG_AGO)]))
    for index in np.flatnonzero(given & (t < before[:-1])):
        bad[int(index)] = f"t = {t[index] / 1e6:.6f} runs backwards, {before[index] / 1e6:.6f} came before"
    return t, (int(before[-1]) if before[-1] != _LONG_AGO else None)


def _times(seconds: NDArray[Any], after_us: int | None) -> NDArray[np.int64] | None:
    """Epoch µs where all are given, within limits and in order; else None, for a look at each."""
    if not (np.minimum.reduce(seconds) >= 0 and np.maximum.reduce(seconds) <= T_MAX_S):
        return None
    t = np.rint(seconds * 1e6).astype(np.int64)
    in_order = (after_us is None or t[0] >= after_us) and bool((t[1:] >= t[:-1]).all())
    return t if in_order else None


def _mark(bad: dict[int, str], wrong: NDArray[Any], field: Field, numbers: NDArray[Any], problem: str) -> None:
    if not wrong.any():
        return
    unit = f" {field.unit}" if field.unit else ""
    for index in np.flatnonzero(wrong):
        bad.setdefault(int(index), f"{field.name} = {numbers[index].item():.9g}{unit} {problem}")


def _little(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
