"""Readings of one stream as packed columns: validated on the way in, never one object per row."""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.config import Field, Stream, suggestion
from agent.errors import Rejected

T_MAX_S = 4_102_444_800.0  # 2100-01-01
MISSING_CATEGORY = 0
_DTYPES = {"f32": "<f4", "f64": "<f8", "i64": "<i8", "category": "<u2"}
_SHORT_SPAN = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Rows:
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


def concatenate(parts: Sequence[Rows]) -> Rows:
    """All rows of `parts`, in order."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([p.t for p in parts]),
        tuple(np.concatenate(columns) for columns in zip(*(p.columns for p in parts), strict=True)),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A chunk as stored: times as offsets from `first_t`, 4 bytes each where the span allows, else 8."""

    n: int
    first_t: int
    time_bytes: int
    data: bytes
    crc: int


def pack(rows: Rows) -> Packed:
    """`rows` as one blob with its CRC-32."""
    first = int(rows.t[0])
    offsets = rows.t - first
    short = int(offsets.min()) >= 0 and int(offsets.max()) <= _SHORT_SPAN
    head = offsets.astype("<u4" if short else "<i8")
    data = b"".join([head.tobytes(), *(_little(c) for c in rows.columns)])
    return Packed(len(rows), first, head.itemsize, data, zlib.crc32(data))


def unpack(packed: Packed, fields: Sequence[Field]) -> Rows:
    """Inverse of `pack`. Raises ValueError where the bytes are not what was packed."""
    if zlib.crc32(packed.data) != packed.crc:
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


@dataclass(frozen=True, slots=True)
class Raw:
    """Columns as a producer gave them: `t` epoch seconds or None; values by field name; all of one length."""

    n: int
    t: Any
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of a Raw: `rows` are good; `categories` holds text of category columns; `bad` index → reason."""

    rows: Rows
    categories: dict[int, list[str]]
    bad: dict[int, str]


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
    t = _check_time(raw, now_us, after_us, bad)
    if not bad:
        return Checked(Rows(t, tuple(arrays)), categories, bad)
    good = np.setdiff1d(np.arange(raw.n), np.fromiter(bad, np.int64, len(bad)))
    kept = {index: [texts[i] for i in good] for index, texts in categories.items()}
    return Checked(Rows(t[good], tuple(a[good] for a in arrays)), kept, bad)


def _check_numbers(values: Any, field: Field, bad: dict[int, str]) -> NDArray[Any]:
    dtype = _DTYPES[field.type]
    try:
        numbers = np.asarray(values)
        plain = numbers.dtype.kind in "iuf" and numbers.ndim == 1
    except ValueError:
        plain = False
    if not plain:
        numbers = np.array([_number(value, field, index, bad) for index, value in enumerate(values)], np.float64)
    if field.type == "i64":
        if numbers.dtype.kind == "f" and len(numbers):
            _mark(bad, (numbers != np.rint(numbers)) | (np.abs(numbers) > 2**53), field, numbers, "is no whole number")
            numbers = np.where(np.isfinite(numbers), numbers, 0)
    else:
        finite = np.isfinite(numbers)
        missing = np.isnan(numbers) & field.optional & (not plain)
        _mark(bad, ~finite & ~missing, field, numbers, "is no finite number")
        if field.type == "f32":
            with np.errstate(invalid="ignore"):
                _mark(bad, finite & (np.abs(numbers) > 3.4e38), field, numbers, "is too large for f32")
    with np.errstate(invalid="ignore", over="ignore"):
        typed = numbers.astype(dtype)
        # Limits in the column's own precision: what was taken once is taken again when it comes back as f32.
        kind = typed.dtype.type if typed.dtype.kind == "f" else float
        if field.min is not None:
            _mark(bad, typed < kind(field.min), field, numbers, f"is below min {field.min:g}")
        if field.max is not None:
            _mark(bad, typed > kind(field.max), field, numbers, f"is above max {field.max:g}")
    return typed


def _number(value: Any, field: Field, index: int, bad: dict[int, str]) -> float:
    """One value of a column that is not plainly numeric; NaN with a reason in `bad` where it is none."""
    if value is None and field.optional:
        return float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value and field.optional:
            bad.setdefault(index, f"{field.name} = nan is no finite number; leave an optional field out instead")
        return float(value) if abs(value) < sys.float_info.max else float("inf")
    shown = "missing" if value is None else f"= {str(value)[:40]!r}"
    bad.setdefault(index, f"{field.name} {shown} is no number" if value is not None else f"{field.name} is missing")
    return float("nan")


def _check_text(values: Any, field: Field, bad: dict[int, str]) -> list[str]:
    texts = []
    for index, value in enumerate(values):
        if value is None and field.optional:
            texts.append("")
        elif isinstance(value, str) and 0 < len(value) <= 64:
            texts.append(value)
        else:
            bad.setdefault(index, f"{field.name} = {str(value)[:40]!r} is no category: text of 1-64 characters")
            texts.append("")
    return texts


def _check_time(raw: Raw, now_us: int, after_us: int | None, bad: dict[int, str]) -> NDArray[np.int64]:
    if raw.t is None:
        return np.full(raw.n, now_us, np.int64)
    if len(raw.t) != raw.n:
        raise Rejected(f"t has {len(raw.t)} values, {raw.n} are needed")
    time_field = Field(name="t", unit="epoch seconds", type="f64", min=0, max=T_MAX_S)
    seconds = _check_numbers(raw.t, time_field, bad)
    t = np.rint(np.where(np.isfinite(seconds), np.clip(seconds, 0, T_MAX_S), 0) * 1e6).astype(np.int64)
    usable = np.ones(raw.n, bool)
    usable[list(bad)] = False
    masked = np.where(usable, t, np.int64(-(2**62)))
    latest = np.maximum.accumulate(np.concatenate([[after_us if after_us is not None else -(2**62)], masked]))[:-1]
    for index in np.flatnonzero(usable & (t < latest)):
        bad[int(index)] = f"t = {t[index] / 1e6:.6f} runs backwards, {latest[index] / 1e6:.6f} came before"
    return t


def _mark(bad: dict[int, str], wrong: NDArray[Any], field: Field, numbers: NDArray[Any], problem: str) -> None:
    if not wrong.any():
        return
    unit = f" {field.unit}" if field.unit else ""
    for index in np.flatnonzero(wrong):
        bad.setdefault(int(index), f"{field.name} = {float(numbers[index]):g}{unit} {problem}")


def _little(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
