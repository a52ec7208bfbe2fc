"""Rows of a stream as packed columns: validation of input, and the format of stored chunks. No object per row."""

from __future__ import annotations

import math
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.device.config import FieldConfig, StreamConfig
from outstation.foundation import clock
from outstation.foundation.clock import parse_local
from outstation.foundation.config.toml_files import did_you_mean
from outstation.foundation.errors import RowRejected
from outstation.foundation.text import is_unicode
from outstation.ml.kernel import checksum
from outstation.protocol.wire import commitment

_DTYPES = {"f32": "<f4", "f64": "<f8", "i64": "<i8", "category": "<u2"}
MAX_CODE = 2**16 - 1
_MAX_SHORT_OFFSET = 2**32 - 1
_MAX_EXACT_INT = 2**53
_MAX_FLOAT = sys.float_info.max
_MIN_TIME_US = np.int64(-(2**62))
_TIME_FIELD = FieldConfig(name="t", type="f64", optional=True)


def lost_category(code: int) -> str:
    """Return the text that stands for a lost one."""
    return f"lost category {code}"


def row_bytes(stream: StreamConfig) -> int:
    """Return the bytes of a stored row: its time and its fields."""
    return 8 + sum(np.dtype(_DTYPES[field.type]).itemsize for field in stream.fields)


class Rows(msgspec.Struct, frozen=True):
    """Rows by column: `t` (n,) int64 epoch µs; `columns` one array (n,) per field, in the stream's order and dtype."""

    t: NDArray[np.int64]
    columns: tuple[NDArray[Any], ...]

    def __len__(self) -> int:
        return len(self.t)

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(self.t[start:stop], tuple(c[start:stop] for c in self.columns))


EMPTY_ROWS = Rows(np.zeros(0, np.int64), ())


def concatenate(parts: Sequence[Rows]) -> Rows:
    if len(parts) <= 1:
        return parts[0] if parts else EMPTY_ROWS
    return Rows(
        np.concatenate([p.t for p in parts]),
        tuple(np.concatenate(columns) for columns in zip(*(p.columns for p in parts), strict=True)),
    )


def commit(parts: Sequence[Rows], key: bytes, fields: Sequence[FieldConfig], texts: Mapping[str, Sequence[str]]) -> str:
    """Return the commitment under `key` to rows in parts that follow one another, without joining them.

    `texts` holds the category texts by code, by field.
    """
    columns = [[part.columns[index] for part in parts] for index in range(len(fields))]
    codes = {
        field.name: [(code, texts[field.name][code]) for code in np.unique(np.concatenate(pieces)).tolist()]
        for field, pieces in zip(fields, columns, strict=True)
        if field.type == "category"
    }
    t, *pieces = [[_little_endian(piece) for piece in column] for column in ([part.t for part in parts], *columns)]
    return commitment.commit(key, [(f.name, f.type) for f in fields], t, pieces, codes)


class PackedChunk(msgspec.Struct, frozen=True):
    """Chunk as stored: times are offsets from `first_t`, of 4 bytes if the span allows, else 8.

    `place`: stream, first row and clock, which the CRC covers too.
    """

    n: int
    first_t: int
    time_bytes: int
    data: bytes
    crc: int
    place: tuple[int, ...] = ()


def pack_chunk(rows: Rows, place: tuple[int, ...] = ()) -> PackedChunk:
    """Pack rows, at least one, into one blob with its CRC-32."""
    first = int(rows.t[0])
    offsets = rows.t - first
    short = int(np.min(offsets)) >= 0 and int(np.max(offsets)) <= _MAX_SHORT_OFFSET
    head = offsets.astype("<u4" if short else "<i8")
    data = b"".join([memoryview(head), *(_little_endian(c) for c in rows.columns)])
    crc = _chunk_crc(len(rows), first, head.itemsize, data, place)
    return PackedChunk(len(rows), first, head.itemsize, data, crc, place)


def _chunk_crc(n: int, first_t: int, time_bytes: int, data: bytes, place: tuple[int, ...]) -> int:
    """Return the CRC-32 of the blob, its place and its description: a wrong time would move every row of the chunk."""
    return checksum.crc32(data, zlib.crc32(struct.pack(f"<3q{len(place)}q", n, first_t, time_bytes, *place)))


def is_intact(chunk: PackedChunk) -> bool:
    """Return True if the bytes are those that were packed."""
    try:
        return _chunk_crc(chunk.n, chunk.first_t, chunk.time_bytes, chunk.data, chunk.place) == chunk.crc
    except (struct.error, TypeError):
        return False


def unpack_chunk(chunk: PackedChunk, fields: Sequence[FieldConfig]) -> Rows:
    """Invert `pack_chunk`. Raises ValueError if the bytes are not what was packed."""
    columns, t = unpack_columns(chunk, fields), np.empty(chunk.n, np.int64)
    unpack_times(chunk, slice(None), t)
    return Rows(t, columns)


def unpack_columns(chunk: PackedChunk, fields: Sequence[FieldConfig]) -> tuple[NDArray[Any], ...]:
    """Return the columns as views of the chunk. Raises ValueError if its bytes are not what was packed."""
    if not is_intact(chunk):
        raise ValueError("CRC does not match")
    dtypes = [np.dtype(_DTYPES[f.type]) for f in fields]
    if len(chunk.data) != chunk.n * (chunk.time_bytes + sum(d.itemsize for d in dtypes)):
        raise ValueError("length does not match the stream's fields")
    columns, at = [], chunk.n * chunk.time_bytes
    for dtype in dtypes:
        columns.append(np.frombuffer(chunk.data, dtype, chunk.n, at))
        at += chunk.n * dtype.itemsize
    return tuple(columns)


def unpack_times(chunk: PackedChunk, rows: slice, out: NDArray[np.int64]) -> None:
    """Write the times of some `rows` of a chunk, whose columns were unpacked, to `out`."""
    offsets = np.frombuffer(chunk.data, "<u4" if chunk.time_bytes == 4 else "<i8", chunk.n)
    np.add(offsets[rows], np.int64(chunk.first_t), out=out)


class RawColumns(msgspec.Struct, frozen=True):
    """Columns as a producer gave them, `n` values each, by field name; None is a missing value.

    `t` epoch seconds; None, for all rows or for one, means now. `t_in_us`: it is an int64 array of epoch µs instead.
    `nan_is_missing`: NaN in an array is a missing value. `block` (C, n): all values as one array, if they are one.
    """

    n: int
    t: Any
    values: Mapping[str, Any]
    nan_is_missing: bool = False
    t_in_us: bool = False
    block: NDArray[Any] | None = None


class BlockLimits(msgspec.Struct, frozen=True, eq=False):
    """Smallest and largest valid value (C,) of each field of a stream whose fields are of one type of float."""

    names: tuple[str, ...]
    dtype: np.dtype[Any]
    low: NDArray[Any]
    high: NDArray[Any]

    @classmethod
    def from_fields(cls, fields: Sequence[FieldConfig]) -> BlockLimits | None:
        """Return the limits; None where fields are of several types, or not of floats."""
        kinds = {field.type for field in fields}
        if kinds != {"f32"} and kinds != {"f64"}:
            return None
        dtype = np.dtype(_DTYPES[kinds.pop()])
        low, high = zip(*(_find_bounds(field.type, field.min, field.max) for field in fields), strict=True)
        return cls(tuple(field.name for field in fields), dtype, np.array(low, dtype), np.array(high, dtype))

    def accept(self, raw: RawColumns) -> bool:
        """Return True if each value is there, of its stored type and valid; else each field needs its own check."""
        block = raw.block
        if block is None or block.dtype != self.dtype or not raw.n or tuple(raw.values) != self.names:
            return False
        return bool(
            (np.minimum.reduce(block, axis=1) >= self.low).all()
            and (np.maximum.reduce(block, axis=1) <= self.high).all()
        )


class ValidatedRows(msgspec.Struct, frozen=True):
    """Valid rows of `RawColumns`; `categories`: text of category columns by field index; `rejected`: index → reason.

    `latest_us` is the producer's latest time so far, epoch µs, for the next validation. `has_time`: rows that came with
    a time, all or none if it is a bool.
    """

    rows: Rows
    categories: dict[int, list[str]]
    rejected: dict[int, str]
    latest_us: int | None = None
    has_time: NDArray[np.bool_] | bool = True

    def slice(self, start: int, stop: int) -> ValidatedRows:
        """Return some of the valid rows."""
        categories = {index: texts[start:stop] for index, texts in self.categories.items()}
        has_time = self.has_time if isinstance(self.has_time, bool) else self.has_time[start:stop]
        return ValidatedRows(self.rows.slice(start, stop), categories, {}, has_time=has_time)


def validate_columns(
    raw: RawColumns,
    stream: StreamConfig,
    now_us: int,
    after_us: int | None,
    *,
    show_values: bool = False,
    limits: BlockLimits | None = None,
) -> ValidatedRows:
    """Validate columns against the stream's fields.

    `now_us` stamps rows without a time. `after_us` is the producer's latest time so far: its time may not run backwards
    within one connection or file. Reasons go to journals and files: they name values only with `show_values`, and never
    in a stream with protected fields. `limits` of the stream make columns that are one block cheaper.

    Raises RowRejected if the columns as a whole are invalid.
    """
    rejected = _Rejections(show_values=show_values and not stream.has_protected_fields)
    if limits is not None and limits.accept(raw):
        t, latest, has_time = _validate_times(raw, now_us, after_us, rejected)
        if not rejected:
            return ValidatedRows(Rows(t, tuple(raw.values.values())), {}, {}, latest, has_time)
        rejected.reasons.clear()
    names = [f.name for f in stream.fields]
    for extra in raw.values.keys() - set(names):
        raise RowRejected(f"{extra!r} is not a field of this stream{did_you_mean(extra, names)}")
    arrays: list[NDArray[Any]] = []
    categories: dict[int, list[str]] = {}
    for index, field in enumerate(stream.fields):
        values = raw.values.get(field.name)
        if values is None:
            if not field.optional:
                raise RowRejected(f"field {field.name!r} is missing")
            values = [None] * raw.n
        if len(values) != raw.n:
            raise RowRejected(f"field {field.name!r} has {len(values)} values, {raw.n} are needed")
        if field.type == "category":
            categories[index] = _validate_categories(values, field, rejected)
            arrays.append(np.zeros(raw.n, "<u2"))
        else:
            arrays.append(_validate_numbers(values, field, rejected, nan_is_missing=raw.nan_is_missing))
    t, latest, has_time = _validate_times(raw, now_us, after_us, rejected)
    if not rejected:
        return ValidatedRows(Rows(t, tuple(arrays)), categories, {}, latest, has_time)
    reasons = rejected.reasons
    valid = np.setdiff1d(np.arange(raw.n), np.fromiter(reasons, np.int64, len(reasons)))
    categories = {index: [texts[i] for i in valid] for index, texts in categories.items()}
    has_time = has_time if isinstance(has_time, bool) else has_time[valid]
    return ValidatedRows(Rows(t[valid], tuple(a[valid] for a in arrays)), categories, reasons, latest, has_time)


class _Rejections:
    """Reason of each rejected row by its index, the first one found."""

    def __init__(self, *, show_values: bool) -> None:
        self.reasons: dict[int, str] = {}
        self._show_values = show_values

    def __bool__(self) -> bool:
        return bool(self.reasons)

    def add(self, index: int, field: str, problem: str, value: str | None = None) -> None:
        # Times are no readings: results carry them.
        shown = f" = {value}" if value is not None and (self._show_values or field == _TIME_FIELD.name) else ""
        self.reasons.setdefault(index, f"{field}{shown} {problem}")


def _validate_numbers(
    values: Any, field: FieldConfig, rejected: _Rejections, *, nan_is_missing: bool = False
) -> NDArray[Any]:
    numbers = _convert_exactly(values, field.type)
    if numbers is not None and (valid := _validate_fast(numbers, field)) is not None:
        return valid
    missing = np.zeros(len(values), bool)
    if numbers is None:
        whole = field.type == "i64"
        # Items of an array of float32 are no numbers of Python.
        values = values.tolist() if isinstance(values, np.ndarray) else values
        parsed = [_parse_number(value, field, whole, index, rejected) for index, value in enumerate(values)]
        missing = np.array([value is None for value in values], bool) & field.optional
        numbers = np.array(parsed, np.int64 if whole else np.float64)
    elif nan_is_missing:
        missing = np.isnan(numbers)
        if not field.optional:
            for index in np.flatnonzero(missing):
                rejected.add(int(index), field.name, "is missing")
        elif missing.any():
            # One NaN of many, so that equal rows are equal bytes.
            numbers = np.where(missing, np.array(np.nan, numbers.dtype), numbers)
    with np.errstate(invalid="ignore", over="ignore"):
        typed = numbers.astype(_DTYPES[field.type])
        if typed.dtype.kind == "f":
            _reject_where(rejected, ~np.isfinite(numbers) & ~missing, field, numbers, "is no finite number")
            _reject_where(rejected, np.isinf(typed), field, numbers, f"is too large for {field.type}")
        # Limits in the column's own precision: a stored f32 value that is ingested again must pass again.
        kind = typed.dtype.type if typed.dtype.kind == "f" else float
        if field.min is not None:
            _reject_where(rejected, typed < kind(field.min), field, numbers, f"is below min {field.min:.9g}")
        if field.max is not None:
            _reject_where(rejected, typed > kind(field.max), field, numbers, f"is above max {field.max:.9g}")
    return typed


def _validate_fast(numbers: NDArray[Any], field: FieldConfig) -> NDArray[Any] | None:
    """Return the stored column if every value is valid, else None: two passes instead of eight."""
    if not len(numbers):
        return None
    typed = numbers
    if numbers.dtype != _DTYPES[field.type]:
        with np.errstate(invalid="ignore", over="ignore"):
            typed = numbers.astype(_DTYPES[field.type])
    low, high = _find_bounds(field.type, field.min, field.max)
    return typed if np.minimum.reduce(typed) >= low and np.maximum.reduce(typed) <= high else None


@lru_cache(4096)
def _find_bounds(kind: str, low: float | None, high: float | None) -> tuple[Any, Any]:
    """Return the smallest and the largest valid value of a field, of the type that is stored."""
    dtype = np.dtype(_DTYPES[kind])
    if dtype.kind != "f":
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)
    finite = np.finfo(dtype)
    with np.errstate(over="ignore"):
        smallest = finite.min if low is None else max(finite.min, dtype.type(low))
        largest = finite.max if high is None else min(finite.max, dtype.type(high))
    return smallest, largest


def _convert_exactly(values: Any, kind: str) -> NDArray[Any] | None:
    """Return the values as one array if it holds all of them exactly, else None: each needs its own check."""
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


def _parse_number(value: Any, field: FieldConfig, is_integer: bool, index: int, rejected: _Rejections) -> float:
    """Parse one value of a mixed column; an invalid one gives NaN (0 for integers) and a reason in `rejected`."""
    if value is None:
        if not field.optional:
            rejected.add(index, field.name, "is missing")
    elif not isinstance(value, int | float) or isinstance(value, bool):
        problem = "is no number"
        if field is _TIME_FIELD and isinstance(value, str) and parse_local(value) is not None:
            problem = (
                "has no time zone; add Z or +01:00, or name the zone: `outstation ingest --timezone Europe/Berlin`"
            )
        rejected.add(index, field.name, problem, repr(str(value)[:40]))
    elif not is_integer:
        fits = isinstance(value, float) or abs(value) <= _MAX_FLOAT
        return float(value) if fits else math.inf if value > 0 else -math.inf
    elif -(2**63) <= value < 2**63 and (
        isinstance(value, int) or (value == int(value) and abs(value) <= _MAX_EXACT_INT)
    ):
        return int(value)
    else:
        rejected.add(index, field.name, "is no whole number of 64 bits", str(value)[:40])
    return 0 if is_integer else float("nan")


def _validate_categories(values: Any, field: FieldConfig, rejected: _Rejections) -> list[str]:
    texts = []
    for index, value in enumerate(values):
        if value is None and field.optional:
            texts.append("")
        elif isinstance(value, str) and 0 < len(value) <= 64 and (value.isascii() or is_unicode(value)):
            texts.append(value)
        else:
            if value is None:
                rejected.add(index, field.name, "is missing")
            else:
                rejected.add(index, field.name, "is no category: text of 1-64 characters", repr(str(value)[:40]))
            texts.append("")
    return texts


def _validate_times(
    raw: RawColumns, now_us: int, after_us: int | None, rejected: _Rejections
) -> tuple[NDArray[np.int64], int | None, NDArray[np.bool_] | bool]:
    """Return the times, the producer's latest time, and which rows came with a time."""
    if raw.t is None:
        return np.full(raw.n, now_us, np.int64), after_us, False
    if len(raw.t) != raw.n:
        raise RowRejected(f"t has {len(raw.t)} values, {raw.n} are needed")
    # A rejected row does not move the producer's time: then each row is looked at.
    if raw.t_in_us:
        within = raw.t[0] >= 0 and raw.t[-1] <= clock.MAX_TIME_S * 1_000_000
        if within and not rejected and _are_in_order(raw.t, after_us):
            return raw.t, int(raw.t[-1]), True
        seconds = raw.t / 1e6
    else:
        seconds = _validate_numbers(raw.t, _TIME_FIELD, rejected)
        if not rejected and raw.n and (t := _convert_times(seconds, after_us)) is not None:
            return t, int(t[-1]), True
    with np.errstate(invalid="ignore"):
        _reject_where(rejected, seconds < 0, _TIME_FIELD, seconds, "is before 1970")
        _reject_where(
            rejected,
            seconds > clock.MAX_TIME_S,
            _TIME_FIELD,
            seconds,
            "is after 2100; give seconds since 1970, not milliseconds",
        )
    given = np.isfinite(seconds) & (seconds >= 0) & (seconds <= clock.MAX_TIME_S)
    times = raw.t if raw.t_in_us else np.rint(np.where(given, seconds, 0) * 1e6).astype(np.int64)
    t = np.where(given, times, np.int64(now_us))
    given[list(rejected.reasons)] = False
    start = _MIN_TIME_US if after_us is None else np.int64(after_us)
    before = np.maximum.accumulate(np.concatenate([[start], np.where(given, t, _MIN_TIME_US)]))
    for index in np.flatnonzero(given & (t < before[:-1])):
        problem = f"runs backwards, {before[index] / 1e6:.6f} came before"
        rejected.add(int(index), _TIME_FIELD.name, problem, f"{t[index] / 1e6:.6f}")
    return t, (int(before[-1]) if before[-1] != _MIN_TIME_US else None), given


def _convert_times(seconds: NDArray[Any], after_us: int | None) -> NDArray[np.int64] | None:
    """Return epoch µs if all times are within limits and ascend, else None: each needs its own check."""
    if not (np.minimum.reduce(seconds) >= 0 and np.maximum.reduce(seconds) <= clock.MAX_TIME_S):
        return None
    t = np.rint(seconds * 1e6).astype(np.int64)
    return t if _are_in_order(t, after_us) else None


def _are_in_order(t: NDArray[np.int64], after_us: int | None) -> bool:
    return (after_us is None or t[0] >= after_us) and bool((t[1:] >= t[:-1]).all())


def _reject_where(
    rejected: _Rejections, mask: NDArray[Any], field: FieldConfig, numbers: NDArray[Any], problem: str
) -> None:
    if not mask.any():
        return
    unit = f" {field.unit}" if field.unit else ""
    for index in np.flatnonzero(mask):
        rejected.add(int(index), field.name, problem, f"{numbers[index].item():.9g}{unit}")


def _little_endian(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array, array.dtype.newbyteorder("<") if array.dtype.str[0] == ">" else None))
