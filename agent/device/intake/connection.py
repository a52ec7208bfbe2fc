"""One connection of the intake: bytes to lines, lines to rows of the group, outcomes to answer lines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

import msgspec

from agent.clock import Now
from agent.device.intake.group_commit import Group, Mark, Outcome
from agent.device.intake.protocol import MAX_LINE, Reader
from agent.strict_json import check_count

CLIENTS = "client"
# Names that are known; of more, those that sent last.
MOST_CLIENTS = 1000


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    client: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Producer:
    """A producer on a socket.

    `greet` is asked once it has told its name: how many of its lines are safe.
    """

    def __init__(
        self, group: Group, reader: Reader, greet: Callable[[Producer, str], int], writer: asyncio.StreamWriter
    ) -> None:
        self._group, self._reader, self._greet, self._writer = group, reader, greet, writer
        self._rest = b""
        self._skipping = 0
        self._lines = 0
        self._started = False
        self._retired = False
        self.name: str | None = None

    def feed(self, data: bytes, now: Now) -> int:
        """Take what came; with what was left of the last call these are so many bytes of lines."""
        if self._retired:
            return 0
        size = len(self._rest) + len(data)
        lines, self._rest = _split(self._rest, data)
        if self._skipping and lines:
            self._reject_long(self._skipping + len(lines.pop(0)))
            self._skipping = 0
        if len(self._rest) > MAX_LINE:
            # Not kept: a line without an end must not fill the memory.
            self._skipping += len(self._rest)
            self._rest = b""
        self._take(lines, now)
        return size

    def end(self, now: Now) -> None:
        """The producer has closed its side; a last line may come without a newline."""
        if self._retired:
            return
        if self._skipping:
            self._reject_long(self._skipping + len(self._rest))
        elif self._rest.strip():
            self._take([self._rest], now)

    def retire(self) -> None:
        """Take nothing more, once what was answered is sent: the same client goes on in another connection."""
        self._retired = True
        self._writer.close()

    def answer(self, outcome: Outcome) -> None:
        line = {"through": outcome.through, "accepted": outcome.accepted}
        rejected = [{"line": number, "reason": reason} for number, reason in outcome.rejected]
        self._writer.write(msgspec.json.encode({**line, "rejected": rejected}) + b"\n")
        if outcome.full and self.name is not None:
            # A later line that is taken would count these as safe, where this answer is lost with the connection.
            self.retire()

    def _take(self, lines: list[bytes], now: Now) -> None:
        if lines and not self._started:
            self._started = True
            if self._hello(lines[0]):
                lines = lines[1:]
        if not lines:
            return
        first = self._lines + 1
        # Read to the end before anything joins the group: rows without their mark would be taken twice.
        found = [taken for number, run in _runs(lines, first) for taken in self._reader.read(run, number, now.wall_us)]
        for taken in found:
            for number, reason in taken.bad.items():
                self._group.reject(self, number, reason)
            if taken.checked is not None:
                self._group.add(self, taken.stream, taken.checked, taken.lines, now)
            if taken.lot is not None:
                self._group.label(self, taken.lot, taken.lines[0], now)
        self._reach(self._lines + len(lines))

    def _reach(self, line: int) -> None:
        self._lines = line
        self._group.reach(self, line, Mark(CLIENTS, self.name, line, MOST_CLIENTS) if self.name else None)

    def _hello(self, line: bytes) -> bool:
        try:
            name = msgspec.json.decode(line, type=_Hello).client
            check_count(line, 1, [name])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        self.name = name
        self._lines = self._greet(self, name)
        self.answer(Outcome(self._lines, 0, []))
        return True

    def _reject_long(self, size: int) -> None:
        self._started = True
        self._group.reject(self, self._lines + 1, f"line of {size} bytes, the limit is {MAX_LINE}; split it")
        self._reach(self._lines + 1)


def _split(rest: bytes, data: bytes) -> tuple[list[bytes], bytes]:
    """The lines that end in `data`, the first of which begins with `rest`; and what has no end yet."""
    lines, start = [], 0
    # `find` goes over a long line much faster than `split`, and over short ones as fast.
    while (end := data.find(b"\n", start)) >= 0:
        lines.append(data[start:end])
        start = end + 1
    if not lines:
        return lines, rest + data
    lines[0] = rest + lines[0]
    return lines, data[start:]


def _runs(lines: list[bytes], first: int) -> list[tuple[int, list[bytes]]]:
    """Lines, numbered from `first`, in runs between the empty ones, each with its first number."""
    if all(map(bytes.strip, lines)):
        return [(first, lines)]
    runs: list[tuple[int, list[bytes]]] = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        if runs and number == runs[-1][0] + len(runs[-1][1]):
            runs[-1][1].append(line)
        else:
            runs.append((number, [line]))
    return runs
