"""Splitter of a producer's bytes: JSON lines, binary frames, and what is too long for either.

The result never depends on how the bytes arrive. At most one unfinished line or frame is held, up to the limit.
"""

from __future__ import annotations

import msgspec

from outstation.device.intake.frames import MAGIC, PREFIX, Data, Frames
from outstation.device.intake.protocol import MAX_LINE_BYTES


class Oversized(msgspec.Struct, frozen=True):
    """Line or frame beyond the limit, which was dropped."""

    kind: str
    size: int


class Splitter:
    """Splitter of one connection's bytes.

    `partial`: bytes of the unfinished line or frame, empty while one beyond the limit is dropped.
    """

    def __init__(self) -> None:
        self.partial = b""
        self._dropped: Oversized | None = None
        # Bytes of a dropped frame that are still to come.
        self._frame_rest = 0

    @property
    def is_dropping(self) -> bool:
        return self._dropped is not None

    @property
    def kind(self) -> str:
        """Kind of what is unfinished: line or frame."""
        if self._dropped is not None:
            return self._dropped.kind
        return "frame" if self.partial and MAGIC.startswith(self.partial[: len(MAGIC)]) else "line"

    def split(self, data: Data) -> list[list[bytes] | Frames | Oversized]:
        """Return what `data` completes, in order: lines without their newlines, frames, and dropped ones.

        `data` begins with the bytes of `partial`. The frames refer to it.
        """
        items: list[list[bytes] | Frames | Oversized] = []
        start, searched, self.partial = self._drop(data, items), len(self.partial), b""
        if start < 0:
            return items
        lines: list[bytes] = []
        while start < len(data):
            if data[start] == MAGIC[0] and MAGIC.startswith(bytes(data[start : start + len(MAGIC)])):
                size = _frame_size(data, start)
                if not size or start + size > len(data):
                    break
                if lines:
                    items.append(lines)
                    lines = []
                end = _find_end_of_alike(data, start, size)
                items.append(Frames(data[start:end], size) if size <= MAX_LINE_BYTES else Oversized("frame", size))
                start = end
                continue
            if isinstance(data, memoryview):
                data, searched, start = bytes(data[start:]), searched - start, 0
            # `find` is much faster than `split` on a long line, and as fast on short ones.
            end = data.find(b"\n", max(start, searched))
            if end < 0:
                break
            lines.append(data[start:end])
            start = end + 1
        if lines:
            items.append(lines)
        self._hold(bytes(data[start:]))
        return items

    def _hold(self, rest: bytes) -> None:
        """Hold what is unfinished, or begin to drop it: it must not fill the memory."""
        if MAGIC.startswith(rest[: len(MAGIC)]):
            if (size := _frame_size(rest, 0)) > MAX_LINE_BYTES:
                self._dropped, self._frame_rest = Oversized("frame", size), size - len(rest)
                return
        elif len(rest) > MAX_LINE_BYTES:
            self._dropped = Oversized("line", len(rest))
            return
        self.partial = rest

    def _drop(self, data: Data, items: list[list[bytes] | Frames | Oversized]) -> int:
        """Drop the rest of what is too long, and return where the next line or frame begins; -1 if not in `data`."""
        dropped = self._dropped
        if dropped is None:
            return 0
        if dropped.kind == "frame":
            if len(data) < self._frame_rest:
                self._frame_rest -= len(data)
                return -1
            end = self._frame_rest
        else:
            newline = bytes(data).find(b"\n")
            dropped = Oversized("line", dropped.size + (len(data) if newline < 0 else newline))
            if newline < 0:
                self._dropped = dropped
                return -1
            end = newline + 1
        items.append(dropped)
        self._dropped, self._frame_rest = None, 0
        return end


def _frame_size(data: Data, start: int) -> int:
    """Return the bytes of the frame at `start`; 0 if that is not known yet."""
    if len(data) - start < PREFIX.size:
        return 0
    return PREFIX.size + int(PREFIX.unpack_from(data, start)[1])


def _find_end_of_alike(data: Data, start: int, size: int) -> int:
    """Return the end of the whole frames of `size` bytes that follow one another from `start`, or of a longer one."""
    prefix, end = data[start : start + PREFIX.size], start + size
    while size <= MAX_LINE_BYTES and end + size <= len(data) and data[end : end + PREFIX.size] == prefix:
        end += size
    return end
