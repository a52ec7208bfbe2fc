"""Producer connection: bytes to lines and frames, these to rows of the group commit, outcomes to answer lines.

The first line must be a JSON object or a frame: no HTTP request begins so, and a web page cannot send rows.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec

from agent import decoders
from agent.clock import ClockReading
from agent.device.intake.frames import MAGIC
from agent.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from agent.device.intake.listener import Refusal, User
from agent.device.intake.protocol import BOM, MAX_LINE_BYTES, LineParser, ParsedLines
from agent.device.intake.splitter import Frame, Oversized, Splitter
from agent.strict_json import check_key_count

CLIENT_SOURCE = "client"
# Client names whose positions are stored; of more, those that sent last.
MAX_CLIENTS = 1000
# Names of files that `outstation ingest` sends begin so: they do not push out the names of producers.
FILE_PREFIX = "file:"
FULL_COUNTER, CUT_COUNTER = "lines refused while full", "lines cut off"
FILE_SOURCE, MAX_FILES = "ingested file", 4096


_OTHER_PROTOCOL = Refusal(
    "this is not the intake protocol: the first line must be a JSON object or a frame; see docs/reference/intake.md"
)
_NO_TOKEN = Refusal('the first line on TCP must be {"token":"…"}, with the content of the file intake.token_file names')


def client_source(name: str) -> str:
    """Return the source of a client's stored position."""
    return FILE_SOURCE if name.startswith(FILE_PREFIX) else CLIENT_SOURCE


def client_position(name: str, line: int) -> SourcePosition:
    source = client_source(name)
    return SourcePosition(source, name, line, MAX_FILES if source == FILE_SOURCE else MAX_CLIENTS)


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    client: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    forget: bool | None = None
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None


class ProducerConnection:
    """Producer on a socket.

    `greet` is called with its name, and whether its lines are to be forgotten; it returns how many of them are stored,
    or raises Refusal. With `token`, the first line must have the same.
    """

    def __init__(
        self,
        group: GroupCommit,
        reader: LineParser,
        greet: Callable[[ProducerConnection, str, bool], Awaitable[int]],
        writer: asyncio.StreamWriter,
        user: User = None,
        token: str | None = None,
    ) -> None:
        self._group, self._reader, self._greet, self._writer = group, reader, greet, writer
        self.user, self._token = user, token
        self.last_read_s = asyncio.get_running_loop().time()
        self._splitter = Splitter()
        self._line_count = self._answered = 0
        self._started = False
        self._retired = self._is_cut_off = False
        self.name: str | None = None

    @property
    def awaits_answer(self) -> bool:
        """True while lines of an open connection wait for a commit."""
        return self._answered < self._line_count and not self._retired

    def held_bytes(self) -> int:
        """Return the bytes of its unfinished line or frame and of the answers that it has not read."""
        return len(self._splitter.partial) + self._writer.transport.get_write_buffer_size()

    async def feed(self, data: bytes, now: ClockReading) -> int:
        """Parse received bytes. Return their number, with the incomplete part of the last call. Raises Refusal."""
        self.last_read_s = asyncio.get_running_loop().time()
        if self._retired:
            return 0
        # Of a first line or frame beyond the limit, the rest is no beginning.
        if not self._started and not self._splitter.is_dropping:
            _check_first_bytes(self._splitter.partial, data)
        size = len(self._splitter.partial) + len(data)
        for item in self._splitter.split(data):
            if isinstance(item, list):
                await self._parse_lines(item, now)
            elif isinstance(item, Frame):
                self._parse_frame(item.content, now)
            else:
                self._reject_oversized(item)
        return size

    async def end(self, now: ClockReading) -> None:
        """Handle what is unfinished: the producer has closed its side, or died. Raises Refusal.

        A frame counts only if it is whole. A line without its newline counts only if it is a whole JSON object of a
        producer without a name. A named one sends it again.
        """
        partial = self._splitter.partial
        if self._retired or not (self._splitter.is_dropping or partial.strip()):
            return
        if self.name is None and _is_json_object(partial):
            await self._parse_lines([partial], now)
        elif self._token is not None and not self._started:
            raise _NO_TOKEN
        else:
            self._is_cut_off = True
            self._group.count(CUT_COUNTER)

    def lose(self) -> None:
        """Count what is unfinished: the connection broke, so nobody answers."""
        if not self._retired and (self._splitter.is_dropping or self._splitter.partial.strip()):
            self._group.count(CUT_COUNTER)

    def report_cut_off_line(self) -> None:
        """Tell a producer without a name, which may still read, that its last line does not count."""
        if self._is_cut_off and self.name is None and not self._retired:
            kind = self._splitter.kind
            advice = "end each line with a newline" if kind == "line" else "send all bytes of each frame"
            reason = f"the connection ended inside this {kind}; {advice}"
            self.answer(CommitOutcome(self._line_count, 0, [(self._line_count + 1, reason)]))

    def retire(self) -> None:
        """Close the connection after the answers are sent: the client continues in another one."""
        self._retired = True
        self._writer.close()

    def refuse(self, refusal: Refusal) -> None:
        """Send the reason and close the connection. A producer that reads nothing loses what was to be sent."""
        self._retired = True
        self._group.count("connections refused")
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()
            return
        self._writer.write(refusal.to_line())
        self._writer.close()

    def answer(self, outcome: CommitOutcome) -> None:
        self._answered = outcome.through
        line = {"through": outcome.through, "accepted": outcome.accepted}
        rejected = [{"line": number, "reason": reason} for number, reason in outcome.rejected]
        self._writer.write(msgspec.json.encode({**line, "rejected": rejected}) + b"\n")
        if outcome.is_store_full:
            # The failed transaction counted nothing, and the producer may have gone when there is room.
            self._group.count(FULL_COUNTER, len(outcome.rejected))
            self._reader.forget_times()
        if outcome.is_store_full and self.name is not None:
            # If this answer is lost, a later accepted line would count the rejected ones as stored.
            self._group.discard(self)
            self.retire()

    async def _parse_lines(self, lines: list[bytes], now: ClockReading) -> None:
        if lines and not self._started:
            self._started = True
            if await self._read_hello(lines[0]):
                lines = lines[1:]
        if not lines or self._retired:
            return
        first = self._line_count + 1
        # Parsed to the end before anything joins the group: rows without their position would be stored twice.
        runs = _find_runs(lines, first)
        self._add([parsed for number, run in runs for parsed in self._reader.parse(run, number, now.wall_us)], now)
        self._advance(self._line_count + len(lines))

    def _parse_frame(self, frame: bytes, now: ClockReading) -> None:
        self._start_without_hello()
        if not self._retired:
            self._add([self._reader.parse_frame(frame, self._line_count + 1, now.wall_us)], now)
            self._advance(self._line_count + 1)

    def _add(self, parsed_runs: list[ParsedLines], now: ClockReading) -> None:
        for parsed in parsed_runs:
            for number, reason in parsed.rejected.items():
                self._group.reject(self, number, reason)
            if parsed.validated is not None:
                is_recording = self.name is not None and self.name.startswith(FILE_PREFIX)
                self._group.add_rows(
                    *(self, parsed.stream, parsed.validated, parsed.lines, now),
                    is_recording=is_recording,
                    client=None if is_recording else self.name,
                )
            if parsed.label_batch is not None:
                self._group.add_labels(self, parsed.label_batch, parsed.lines[0], now)

    def _advance(self, line: int) -> None:
        self._line_count = line
        self._group.advance(self, line, client_position(self.name, line) if self.name else None)

    async def _read_hello(self, line: bytes) -> bool:
        """Read the name and the token, if the line is a greeting. Raises Refusal."""
        try:
            hello = decoders.from_json(line, _Hello)
            members = [text for text in (hello.client, hello.token) if text is not None]
            check_key_count(line, len(members) + (hello.forget is not None), members)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            hello, members = _Hello(), []
        if self._token is not None and not hmac.compare_digest((hello.token or "").encode(), self._token.encode()):
            raise _NO_TOKEN
        if hello.client is not None:
            self.name = hello.client
            self._line_count = await self._greet(self, hello.client, hello.forget is True)
            if self._retired:
                return True
        if members:
            self.answer(CommitOutcome(self._line_count, 0, []))
        return bool(members)

    def _reject_oversized(self, item: Oversized) -> None:
        self._start_without_hello()
        reason = f"{item.kind} of {item.size} bytes, the limit is {MAX_LINE_BYTES}; split it"
        self._group.reject(self, self._line_count + 1, reason)
        self._advance(self._line_count + 1)

    def _start_without_hello(self) -> None:
        """Begin with something else than a line. Raises Refusal if the first line must hold a token."""
        if not self._started and self._token is not None:
            raise _NO_TOKEN
        self._started = True


def _check_first_bytes(before: bytes, data: bytes) -> None:
    """Check that a connection begins with a frame or a JSON object, after white space or a BOM. Raises Refusal."""
    first = data.lstrip()
    if first and not before.strip() and not first.startswith((b"{", BOM[:1], MAGIC[:1])):
        raise _OTHER_PROTOCOL


def _is_json_object(line: bytes) -> bool:
    try:
        decoders.from_json(line, dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


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
