"""Splitter of a producer's bytes: JSON lines, binary frames, and what is too long for either.

The result never depends on how the bytes arrive. At most one unfinished line or frame is held, up to the limit.
"""

from __future__ import annotations

import msgspec

from agent.device.intake.frames import MAGIC, PREFIX
from agent.device.intake.protocol import MAX_LINE_BYTES


class Frame(msgspec.Struct, frozen=True):
    """Whole binary frame."""

    content: bytes


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

    def split(self, data: bytes) -> list[list[bytes] | Frame | Oversized]:
        """Return what `data` completes, in order: lines without their newlines, frames, and dropped ones."""
        items: list[list[bytes] | Frame | Oversized] = []
        start = self._drop(data, items)
        if start < 0:
            return items
        searched, data = len(self.partial), self.partial + data[start:]
        start, self.partial = 0, b""
        lines: list[bytes] = []
        while start < len(data):
            if data[start] == MAGIC[0] and MAGIC.startswith(data[start : start + len(MAGIC)]):
                end = self._find_frame_end(data, start)
                if end > len(data):
                    break
                if lines:
                    items.append(lines)
                    lines = []
                size = end - start
                items.append(Frame(data[start:end]) if size <= MAX_LINE_BYTES else Oversized("frame", size))
                start = end
                continue
            # `find` is much faster than `split` on a long line, and as fast on short ones.
            end = data.find(b"\n", max(start, searched))
            if end < 0:
                break
            lines.append(data[start:end])
            start = end + 1
        if lines:
            items.append(lines)
        self._hold(data, start)
        return items

    def _find_frame_end(self, data: bytes, start: int) -> int:
        """Return where the frame ends; behind `data` if that is not known yet."""
        if len(data) - start < PREFIX.size:
            return len(data) + 1
        return start + PREFIX.size + int(PREFIX.unpack_from(data, start)[1])

    def _hold(self, data: bytes, start: int) -> None:
        """Hold what is unfinished, or begin to drop it: it must not fill the memory."""
        rest = data[start:]
        if MAGIC.startswith(rest[: len(MAGIC)]) and len(rest) >= PREFIX.size:
            size = self._find_frame_end(rest, 0)
            if size > MAX_LINE_BYTES:
                self._dropped, self._frame_rest = Oversized("frame", size), size - len(rest)
                return
        elif len(rest) > MAX_LINE_BYTES:
            self._dropped = Oversized("line", len(rest))
            return
        self.partial = rest

    def _drop(self, data: bytes, items: list[list[bytes] | Frame | Oversized]) -> int:
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
            newline = data.find(b"\n")
            dropped = Oversized("line", dropped.size + (len(data) if newline < 0 else newline))
            if newline < 0:
                self._dropped = dropped
                return -1
            end = newline + 1
        items.append(dropped)
        self._dropped, self._frame_rest = None, 0
        return end
