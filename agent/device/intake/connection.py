"""Producer connection: bytes to lines, lines to rows of the group commit, outcomes to answer lines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated

import msgspec

from agent.clock import ClockReading
from agent.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from agent.device.intake.protocol import MAX_LINE_BYTES, LineParser
from agent.strict_json import check_key_count

CLIENT_SOURCE = "client"
# Client names whose positions are stored; of more, those that sent last.
MAX_CLIENTS = 1000


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    client: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class ProducerConnection:
    """Producer on a socket.

    `greet` is called with its name and returns how many of its lines are stored.
    """

    def __init__(
        self,
        group: GroupCommit,
        reader: LineParser,
        greet: Callable[[ProducerConnection, str], int],
        writer: asyncio.StreamWriter,
    ) -> None:
        self._group, self._reader, self._greet, self._writer = group, reader, greet, writer
        self._partial_line = b""
        self._skipped_bytes = 0
        self._line_count = 0
        self._started = False
        self._retired = False
        self.name: str | None = None

    def feed(self, data: bytes, now: ClockReading) -> int:
        """Parse received bytes. Return their number, including the incomplete line of the last call."""
        if self._retired:
            return 0
        size = len(self._partial_line) + len(data)
        lines, start = [], 0
        # `find` is much faster than `split` on a long line, and as fast on short ones.
        while (end := data.find(b"\n", start)) >= 0:
            lines.append(data[start:end])
            start = end + 1
        if lines:
            lines[0] = self._partial_line + lines[0]
            self._partial_line = data[start:]
        else:
            self._partial_line += data
        if self._skipped_bytes and lines:
            self._reject_long_line(self._skipped_bytes + len(lines.pop(0)))
            self._skipped_bytes = 0
        if len(self._partial_line) > MAX_LINE_BYTES:
            # Dropped: a line without an end must not fill the memory.
            self._skipped_bytes += len(self._partial_line)
            self._partial_line = b""
        self._parse_lines(lines, now)
        return size

    def end(self, now: ClockReading) -> None:
        """Parse the last line, which may have no newline: the producer has closed its side."""
        if self._retired:
            return
        if self._skipped_bytes:
            self._reject_long_line(self._skipped_bytes + len(self._partial_line))
        elif self._partial_line.strip():
            self._parse_lines([self._partial_line], now)

    def retire(self) -> None:
        """Close the connection after the answers are sent: the client continues in another one."""
        self._retired = True
        self._writer.close()

    def answer(self, outcome: CommitOutcome) -> None:
        line = {"through": outcome.through, "accepted": outcome.accepted}
        rejected = [{"line": number, "reason": reason} for number, reason in outcome.rejected]
        self._writer.write(msgspec.json.encode({**line, "rejected": rejected}) + b"\n")
        if outcome.is_store_full and self.name is not None:
            # If this answer is lost, a later accepted line would count the rejected ones as stored.
            self.retire()

    def _parse_lines(self, lines: list[bytes], now: ClockReading) -> None:
        if lines and not self._started:
            self._started = True
            if self._read_hello(lines[0]):
                lines = lines[1:]
        if not lines:
            return
        first = self._line_count + 1
        # Parsed to the end before anything joins the group: rows without their position would be stored twice.
        runs = _find_runs(lines, first)
        parsed_runs = [parsed for number, run in runs for parsed in self._reader.parse(run, number, now.wall_us)]
        for parsed in parsed_runs:
            for number, reason in parsed.rejected.items():
                self._group.reject(self, number, reason)
            if parsed.validated is not None:
                self._group.add_rows(self, parsed.stream, parsed.validated, parsed.lines, now)
            if parsed.label_batch is not None:
                self._group.add_labels(self, parsed.label_batch, parsed.lines[0], now)
        self._advance(self._line_count + len(lines))

    def _advance(self, line: int) -> None:
        self._line_count = line
        self._group.advance(
            self, line, SourcePosition(CLIENT_SOURCE, self.name, line, MAX_CLIENTS) if self.name else None
        )

    def _read_hello(self, line: bytes) -> bool:
        try:
            name = msgspec.json.decode(line, type=_Hello).client
            check_key_count(line, 1, [name])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return False
        self.name = name
        self._line_count = self._greet(self, name)
        self.answer(CommitOutcome(self._line_count, 0, []))
        return True

    def _reject_long_line(self, size: int) -> None:
        self._started = True
        self._group.reject(self, self._line_count + 1, f"line of {size} bytes, the limit is {MAX_LINE_BYTES}; split it")
        self._advance(self._line_count + 1)


def _find_runs(lines: list[bytes], first: int) -> list[tuple[int, list[bytes]]]:
    """Group lines, numbered from `first`, into runs without empty lines, each with its first number."""
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
