"""Binary frame of the intake protocol: columns of one stream as little-endian numbers.

`docs/reference/intake.md` has the layout. Decoding never allocates more than the frame's own bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.errors import RowRejected

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


Data = bytes | memoryview


class Frames(msgspec.Struct, frozen=True):
    """Whole frames of `size` bytes each, one after another."""

    content: Data
    size: int

    def __len__(self) -> int:
        return len(self.content) // self.size

    def __iter__(self) -> Iterator[Frames]:
        """Yield each frame by itself, with its own bytes."""
        for at in range(0, len(self.content), self.size):
            yield Frames(bytes(self.content[at : at + self.size]), self.size)


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
    """Columns of frames, `n` values each, by field name, in which NaN is missing; `t_us`: epoch µs.

    `block` (C, n): the same values as one array, if they are of one type.
    """

    n: int
    t_us: NDArray[np.int64] | None
    values: dict[str, NDArray[Any]]
    block: NDArray[Any] | None = None


def read_layout(frames: Frames, last: FrameLayout | None) -> FrameLayout:
    """Read the head of the first frame, or return the `last` one's layout if it is the same. Raises RowRejected."""
    if last is not None and frames.content[_LAYOUT_AT : _LAYOUT_AT + len(last.key)] == last.key:
        return last
    frame = bytes(frames.content[: frames.size])
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


def read_columns(frames: Frames, layout: FrameLayout) -> FrameColumns:
    """Return the columns of frames whose first has this layout; those of a single frame are views of its bytes.

    Raises RowRejected, also if their heads differ.
    """
    content, size = frames.content, frames.size
    n = int.from_bytes(content[_HEAD_AT:_LAYOUT_AT], "little")
    if not n or not layout.columns:
        raise RowRejected(f"columns must be of one length of at least 1, these have {[0] if layout.columns else []}")
    widths = [int(kind[1]) for _, kind in layout.columns]
    needed = layout.data_at + layout.has_times * 8 * n + sum(_align(n * width) for width in widths)
    if needed != size:
        raise RowRejected(f"frame of {size} bytes, but {n} rows of its columns take {needed}")
    table = np.frombuffer(content, np.uint8).reshape(-1, size)
    if len(table) > 1 and not (table[1:, : layout.data_at] == table[0, : layout.data_at]).all():
        raise RowRejected("frames with different heads")
    at, t_us = layout.data_at, None
    # Reshaped columns of frames of one row would still be views of the receive buffer, which the next read overwrites.
    if layout.has_times:
        t_us = np.ascontiguousarray(table[:, at : at + 8 * n].view("<i8").reshape(-1))
        at += 8 * n
    if layout.kind and n * widths[0] % _ALIGN == 0:
        cubes = table[:, at:].view(f"<{layout.kind}").reshape(len(table), len(widths), n)
        block = np.ascontiguousarray(cubes.swapaxes(0, 1).reshape(len(widths), -1))
        return FrameColumns(block.shape[1], t_us, dict(zip(layout.names, block, strict=True)), block)
    values: dict[str, NDArray[Any]] = {}
    for (name, kind), width in zip(layout.columns, widths, strict=True):
        values[name] = np.ascontiguousarray(table[:, at : at + n * width].view(f"<{kind}").reshape(-1))
        at += _align(n * width)
    return FrameColumns(n * len(table), t_us, values)


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
