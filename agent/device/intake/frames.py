"""Binary frame of the intake protocol: columns of one stream as little-endian numbers.

`docs/reference/intake.md` has the layout. Decoding never allocates more than the frame's own bytes.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import RowRejected

NumberType = Literal["f4", "f8", "i4", "i8"]
# The first byte is none of UTF-8 text, and the last one the version.
MAGIC = b"\x9cOF\x01"
# Magic, and the bytes that follow.
PREFIX = struct.Struct("<4sI")
_HEAD = struct.Struct("<IBBH")  # rows, 1 if times come first, bytes of the stream's name, columns
_HAS_TIMES = 1
_HEAD_AT, _LAYOUT_AT = PREFIX.size, PREFIX.size + 4
_ALIGN = 8
# A column's type is a number from 1 on.
_KINDS: tuple[NumberType, ...] = get_args(NumberType)


class FrameLayout(msgspec.Struct, frozen=True):
    """Layout of frames that differ only in their numbers: stream, and (name, type) of each column.

    `key`: bytes of the head that say so. The columns begin at `data_at`. `kind`: type of all columns, "" for several.
    """

    stream: str
    has_times: bool
    columns: tuple[tuple[str, NumberType], ...]
    key: bytes
    data_at: int
    kind: NumberType | Literal[""] = ""

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.columns]


class FrameColumns(msgspec.Struct, frozen=True):
    """Columns of a frame, `n` values each, by field name, in which NaN is missing; `t_us`: epoch µs.

    `block` (C, n): the same values as one array, if they are one in the frame.
    """

    n: int
    t_us: NDArray[np.int64] | None
    values: dict[str, NDArray[Any]]
    block: NDArray[Any] | None = None


def read_layout(frame: bytes, last: FrameLayout | None) -> FrameLayout:
    """Read the head of a whole frame, or return the `last` one's layout if it is the same. Raises RowRejected."""
    if last is not None and frame.startswith(last.key, _LAYOUT_AT):
        return last
    try:
        _, flags, name_bytes, count = _HEAD.unpack_from(frame, _HEAD_AT)
        if flags not in (0, _HAS_TIMES):
            raise RowRejected(f"frame with flags {flags}, known are 0 and {_HAS_TIMES}")
        stream, at = _read_text(frame, _HEAD_AT + _HEAD.size, name_bytes)
        columns: list[tuple[str, NumberType]] = []
        for _ in range(count):
            kind, name_bytes = frame[at], frame[at + 1]
            name, at = _read_text(frame, at + 2, name_bytes)
            if not 1 <= kind <= len(_KINDS):
                raise RowRejected(f"{name!r} has type {kind}, known are 1 to {len(_KINDS)}")
            columns.append((name, _KINDS[kind - 1]))
    except (struct.error, IndexError):
        raise RowRejected(f"frame of {len(frame)} bytes ends inside its head") from None
    if len(dict(columns)) != count:
        raise RowRejected("a column is twice in this frame; give it once")
    kinds = {kind for _, kind in columns}
    key, common = frame[_LAYOUT_AT:at], kinds.pop() if len(kinds) == 1 else ""
    return FrameLayout(stream, flags == _HAS_TIMES, tuple(columns), key, _align(at), common)


def read_columns(frame: bytes, layout: FrameLayout) -> FrameColumns:
    """Return the columns of a frame as views of its bytes. Raises RowRejected."""
    n = int.from_bytes(frame[_HEAD_AT:_LAYOUT_AT], "little")
    if not n or not layout.columns:
        raise RowRejected(f"columns must be of one length of at least 1, these have {[0] if layout.columns else []}")
    sizes = [n * int(kind[1]) for _, kind in layout.columns]
    needed = layout.data_at + layout.has_times * 8 * n + sum(map(_align, sizes))
    if needed != len(frame):
        raise RowRejected(f"frame of {len(frame)} bytes, but {n} rows of its columns take {needed}")
    at, t_us = layout.data_at, None
    values: dict[str, NDArray[Any]] = {}
    if layout.has_times:
        t_us = np.frombuffer(frame, "<i8", n, at)
        at += 8 * n
    if layout.kind and sizes[0] % _ALIGN == 0:
        block = np.frombuffer(frame, f"<{layout.kind}", n * len(sizes), at).reshape(len(sizes), n)
        return FrameColumns(n, t_us, dict(zip(layout.names, block, strict=True)), block)
    for (name, kind), size in zip(layout.columns, sizes, strict=True):
        values[name] = np.frombuffer(frame, f"<{kind}", n, at)
        at += _align(size)
    return FrameColumns(n, t_us, values)


def _read_text(frame: bytes, at: int, size: int) -> tuple[str, int]:
    """Return a name and the place after it. Raises IndexError if the frame is too short, and RowRejected."""
    end = at + size
    if end > len(frame):
        raise IndexError
    try:
        return frame[at:end].decode(), end
    except UnicodeDecodeError as error:
        raise RowRejected(f"not text: {error}") from None


def _align(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def decode_column(name: str, kind: NumberType, data: bytes) -> Any:
    """Decode little-endian numbers; with NaN a list, in which None is missing. Raises RowRejected."""
    width = int(kind[1])
    if len(data) % width:
        raise RowRejected(f"{name}: {len(data)} bytes are no {kind} values of {width} bytes")
    return nan_to_none(np.frombuffer(data, f"<{kind}"))


def nan_to_none(values: NDArray[Any]) -> Any:
    """Return the values; with NaN a list, in which None is missing."""
    # The minimum is NaN if any value is: one pass. NaN does not equal itself.
    if values.dtype.kind == "f" and len(values) and (minimum := np.minimum.reduce(values)) != minimum:
        return [None if value != value else value for value in values.tolist()]
    return values
