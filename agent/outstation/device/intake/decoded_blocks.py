"""Messages between the daemon and the process that decodes its files: packed columns, each message with its length.

The process runs decoders over hostile bytes. Its rows are checked like those of a producer.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from outstation.device.config import FieldConfig, StreamConfig
from outstation.device.config.sources import FilesSource
from outstation.device.intake import media_reader
from outstation.device.intake.file_reader import AS_STREAM, FileBlock, FileLayout
from outstation.device.store.rows import RawColumns, validate_columns
from outstation.foundation.media import ImageFormat, SoundFormat
from outstation.foundation.text import printable

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_SHOWN_CHARS = 64
# Positions are stored as numbers that JSON keeps exactly.
_MAX_LINE = 2**53
# Epoch seconds whose microseconds fit into 64 bits.
_MAX_TIME_S = 9e12


class DecoderSetup(msgspec.Struct, frozen=True):
    """Stream whose files a process decodes for `parent_pid`, and the bytes of memory that it may take.

    `must_be_confined`: it decodes nothing where the machine cannot confine it.
    """

    name: str
    fields: list[FieldConfig]
    image: ImageFormat | None
    sound: SoundFormat | None
    with_parquet: bool
    show_values: bool
    must_be_confined: bool
    memory_bytes: int
    parent_pid: int

    @property
    def stream(self) -> StreamConfig:
        return StreamConfig(fields=self.fields, source=FilesSource(folder="", image=self.image, sound=self.sound))


class DecodeRequest(msgspec.Struct, frozen=True):
    """File to decode, whose descriptor comes along; other members as in `file_reader` and `media_reader`.

    `name` is its original name, "" for a stream of bytes.
    """

    name: str
    modified_us: int
    skip: int
    last_us: int | None
    layout: FileLayout = AS_STREAM


class PackedColumn(msgspec.Struct, frozen=True):
    dtype: Literal["<f4", "<f8", "<i8"]
    data: bytes

    def unpack(self) -> np.ndarray[Any, Any]:
        """Return the values (n,). Raises ValueError."""
        return np.frombuffer(self.data, self.dtype)


class DecodedBlock(msgspec.Struct, frozen=True, tag="block"):
    """Rows of a file: `columns` of a table, valid for the stream, or the `matrix` (n, F) of an image or sound.

    `t` is as the file has it. `lines` has the line of each row.
    """

    n: int
    t: PackedColumn | list[Any] | None
    lines: PackedColumn
    rejected: dict[int, str]
    columns: dict[str, PackedColumn | list[str]] = {}
    matrix: PackedColumn | None = None


class DecodeEnd(msgspec.Struct, frozen=True, tag="end"):
    """End of a file; `kind` says why it ended early: its rows, its format, or an error of the machine with `errno`."""

    kind: Literal["", "rows", "usage", "os"] = ""
    text: str = ""
    errno: int = 0


Answer = DecodedBlock | DecodeEnd


def pack_table_block(block: FileBlock, stream: StreamConfig, *, show_values: bool) -> DecodedBlock:
    """Validate the values of a block, apart from their times, and pack them. Raises RowRejected."""
    raw = block.raw
    validated = validate_columns(RawColumns(raw.n, None, raw.values), stream, 0, None, show_values=show_values)
    t, lines, rejected = raw.t, block.lines, block.rejected
    if validated.rejected:
        valid = [i for i in range(raw.n) if i not in validated.rejected]
        rejected = rejected | {lines[i]: reason for i, reason in validated.rejected.items()}
        lines = [lines[i] for i in valid]
        t = None if t is None else [t[i] for i in valid] if isinstance(t, list) else t[valid]
    columns: dict[str, PackedColumn | list[str]] = {}
    for index, field in enumerate(stream.fields):
        if field.name in raw.values:
            column = validated.categories.get(index)
            columns[field.name] = _pack(validated.rows.columns[index]) if column is None else column
    packed_lines = _pack_lines(lines)
    rejected = {line: printable(reason) for line, reason in rejected.items()}
    return DecodedBlock(len(lines), _pack_times(t), packed_lines, rejected, columns)


def pack_media_block(block: FileBlock) -> DecodedBlock:
    """Pack a block whose columns are all f32."""
    matrix = np.stack(list(block.raw.values.values()), axis=1)
    return DecodedBlock(block.raw.n, _pack(block.raw.t), _pack_lines(block.lines), {}, matrix=_pack(matrix))


def unpack(block: DecodedBlock, stream: StreamConfig) -> FileBlock:
    """Return the block. Raises ValueError if it is none: its sender may be hostile."""
    numbers = block.lines.unpack()
    n = len(numbers)
    if n != block.n or not (n or block.rejected):
        raise ValueError("it has no rows, or not as many as it says")
    if block.lines.dtype != "<i8" or not all(1 <= line <= _MAX_LINE for line in [*numbers[:1], *numbers[-1:]]):
        raise ValueError("its line numbers are out of range")
    if (numbers[1:] <= numbers[:-1]).any():
        raise ValueError("its lines do not ascend")
    if block.rejected and not 1 <= min(block.rejected) <= max(block.rejected) <= _MAX_LINE:
        raise ValueError("its rejected lines are out of range")
    t = block.t.unpack() if isinstance(block.t, PackedColumn) else block.t
    if t is not None and len(t) != n:
        raise ValueError("its rows and times differ in number")
    if (block.matrix is not None) != (stream.media_format is not None):
        raise ValueError("it is not in the format of the stream")
    if block.matrix is not None:
        if not n or block.rejected or block.matrix.dtype != "<f4":
            raise ValueError("it has no rows of an image or sound")
        rows = block.matrix.unpack().reshape(n, len(stream.fields))
        if not isinstance(t, np.ndarray) or t.dtype.kind != "f" or not (np.abs(t) <= _MAX_TIME_S).all():
            raise ValueError("its rows have no times, or not finite ones")
        return media_reader.build_block(rows, t, int(numbers[0]) - 1, stream.fields)
    is_range = bool(n) and int(numbers[-1]) - int(numbers[0]) == n - 1
    lines: Sequence[int] = range(int(numbers[0]), int(numbers[-1]) + 1) if is_range else numbers.tolist()
    optional = {field.name for field in stream.fields if field.type == "category" and field.optional}
    columns = {
        name: column.unpack()
        if isinstance(column, PackedColumn)
        else [text or None for text in column]
        if name in optional
        else column
        for name, column in block.columns.items()
    }
    return FileBlock(RawColumns(n, t, columns, nan_is_missing=True), lines, block.rejected)


def send(channel: socket.socket, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
    """Send a message, with open files. Raises OSError."""
    data = msgspec.msgpack.encode(message)
    framed = memoryview(_LENGTH.pack(len(data)) + data)
    if descriptors:
        framed = framed[socket.send_fds(channel, [framed], descriptors) :]
    channel.sendall(framed)


def receive(channel: socket.socket, timeout_s: float | None = None) -> bytes | None:
    """Return the next message; None at the end. Raises OSError, ValueError for a message without end.

    `timeout_s`: for the whole message, however many parts it comes in.
    """
    due_s = None if timeout_s is None else time.monotonic() + timeout_s
    head = _receive_exactly(channel, _LENGTH.size, due_s)
    return None if head is None else _receive_exactly(channel, _parse_length(head), due_s)


def receive_with_file(channel: socket.socket) -> tuple[bytes, int] | None:
    """Return the next message and the file that comes with it; None at the end."""
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
    if len(head) < _LENGTH.size or not descriptors:
        return None
    data = _receive_exactly(channel, _parse_length(head))
    return None if data is None else (data, descriptors[0])


def _parse_length(head: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length:,} bytes")
    return int(length)


def _receive_exactly(channel: socket.socket, size: int, due_s: float | None = None) -> bytes | None:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        if due_s is not None:
            # A timeout of 0 would make the socket non-blocking.
            channel.settimeout(max(0.001, due_s - time.monotonic()))
        count = channel.recv_into(view[at:])
        if not count:
            return None
        at += count
    return bytes(data)


def _pack(values: np.ndarray[Any, Any]) -> PackedColumn:
    dtype: Any = "<f4" if values.dtype == np.float32 else "<f8" if values.dtype.kind == "f" else "<i8"
    return PackedColumn(dtype, np.ascontiguousarray(values, dtype).tobytes())


def _pack_lines(lines: Sequence[int]) -> PackedColumn:
    if isinstance(lines, range):
        return _pack(np.arange(lines.start, lines.stop))
    return _pack(np.array(lines, np.int64))


def _pack_times(t: Any) -> PackedColumn | list[Any] | None:
    if t is None or (isinstance(t, np.ndarray) and t.dtype.kind in "if"):
        return None if t is None else _pack(t)
    if set(map(type, t)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            return _pack(np.array(t, np.float64))
    # Invalid times are only shown to a person.
    return [value if value is None or isinstance(value, float) else _to_shown_time(value) for value in t]


def _to_shown_time(value: Any) -> float | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= sys.float_info.max else math.inf
    return printable(str(value)[:_MAX_SHOWN_CHARS])
