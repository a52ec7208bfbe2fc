"""Producer connection: bytes to lines and frames, these to rows of the group commit, outcomes to answer lines.

The first line must be a JSON object or a frame: no HTTP request begins so, and a web page cannot send rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec

from outstation.device.intake.frames import MAGIC, Frames
from outstation.device.intake.group_commit import CommitOutcome, GroupCommit, SourcePosition
from outstation.device.intake.listener import Refusal, User
from outstation.device.intake.protocol import BOM, MAX_LINE_BYTES, LineParser, ParsedLines
from outstation.device.intake.splitter import Oversized, Splitter
from outstation.foundation import decoders
from outstation.foundation.clock import ClockReading
from outstation.foundation.strict_json import check_key_count

CLIENT_SOURCE = "client"
# Client names whose positions are stored; of more, those that sent last.
MAX_CLIENTS = 1000
# Names of files that `outstation ingest` sends begin so: they do not push out the names of producers.
FILE_PREFIX = "file:"
FULL_COUNTER, CUT_COUNTER = "lines refused while full", "lines cut off"
FILE_SOURCE, MAX_FILES = "ingested file", 4096
# Small enough that a producer of noise, two bytes a line, delays the others by a quarter of a second at most.
_READ_BYTES = 1 << 16
# A single line costs twenty times as much as a line among others. Rows wait much longer for a commit anyway.
_SMALL_READ_BYTES, _GATHER_S = _READ_BYTES // 4, 0.002
# Frames of this size cost less: more are handled together. A small one costs as much as a line if it is rejected.
# Noise after a large frame delays the others by up to a second, once.
_FRAMES_READ_BYTES, _LARGE_FRAME_BYTES = 4 * _READ_BYTES, 1024
# Time that a producer which has closed its side has to read its last answers.
_FLUSH_S = 3.0
_OTHER_PROTOCOL = (
    "this is not the intake protocol: the first line must be a JSON object or a frame; see docs/reference/intake.md"
)
_NO_TOKEN = 'the first line on TCP must be {"token":"…"}, with the content of the file intake.token_file names'


def client_source(name: str) -> str:
    """Return the source of a client's stored position."""
    return FILE_SOURCE if name.startswith(FILE_PREFIX) else CLIENT_SOURCE


def client_position(name: str, line: int) -> SourcePosition:
    source = client_source(name)
    return SourcePosition(source, name, line, MAX_FILES if source == FILE_SOURCE else MAX_CLIENTS)


def make_buffer(group: GroupCommit) -> memoryview:
    """Return a buffer for the connections of a thread: for an unfinished line, and the bytes of a read."""
    return memoryview(bytearray(MAX_LINE_BYTES + max(_READ_BYTES, min(_FRAMES_READ_BYTES, group.max_bytes // 2))))


class _Hello(msgspec.Struct, forbid_unknown_fields=True):
    client: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    forget: bool | None = None
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None


class ProducerConnection(asyncio.BufferedProtocol):
    """Producer on a socket.

    `greet` is called with its name, and whether its lines are to be forgotten; it returns how many of them are stored,
    or raises Refusal. With `token`, the first line must have the same. `on_received` is called when received lines are
    in the group. All connections of a thread receive into one `buffer`, of MAX_LINE_BYTES and the bytes of a read.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        group: GroupCommit,
        reader: LineParser,
        greet: Callable[[ProducerConnection, str, bool], Awaitable[int]],
        on_received: Callable[[ProducerConnection], None],
        now: Callable[[], ClockReading],
        buffer: memoryview,
        user: User = None,
        token: str | None = None,
    ) -> None:
        self._group, self._reader, self._greet = group, reader, greet
        self._on_received, self._now, self._buffer = on_received, now, buffer
        self.user, self._token = user, token
        self._loop = asyncio.get_running_loop()
        self.last_read_s = self._loop.time()
        self._splitter, self._read_bytes = Splitter(), _READ_BYTES
        self._line_count = self._answered = 0
        self._started = False
        self._retired = self._is_cut_off = False
        self.name: str | None = None
        # Reasons not to read for now.
        self._pauses: set[str] = set()
        self._first_bytes: asyncio.Queue[bytes] = asyncio.Queue()
        self._end: asyncio.Future[None] = self._loop.create_future()
        self._closed = asyncio.Event()

    @property
    def awaits_answer(self) -> bool:
        """True while lines of an open connection wait for a commit."""
        return self._answered < self._line_count and not self._retired

    def held_bytes(self) -> int:
        """Return the bytes of its unfinished line or frame and of the answers that it has not read."""
        return len(self._splitter.partial) + self.transport.get_write_buffer_size()

    async def receive(self) -> None:
        """Add all lines to the group, until the producer closes its side. Raises Refusal, StorageError, OSError."""
        while not self._started and (data := await self._first_bytes.get()):
            await self._start(data)
            self._finish_read(len(data))
            self._resume("start")
        await self._end

    async def end(self) -> None:
        """Handle what is unfinished: the producer has closed its side, or died. Raises Refusal.

        A frame counts only if it is whole. A line without its newline counts only if it is a whole JSON object of a
        producer without a name. A named one sends it again.
        """
        partial = self._splitter.partial
        if self._retired or not (self._splitter.is_dropping or partial.strip()):
            return
        if self.name is None and _is_json_object(partial):
            if self._started:
                self._add_lines([partial], self._now())
            else:
                await self._start(partial + b"\n")
        elif self._token is not None and not self._started:
            raise Refusal(_NO_TOKEN)
        else:
            self._is_cut_off = True
            self._group.count(CUT_COUNTER)

    def lose(self) -> None:
        """Count what is unfinished: the connection broke, so nobody answers."""
        if not self._retired and (self._splitter.is_dropping or self._splitter.partial.strip()):
            self._group.count(CUT_COUNTER)

    async def close(self) -> None:
        """Close the connection after its last answers are sent; a producer that does not read them loses them."""
        self.transport.close()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), _FLUSH_S)
        finally:
            self.transport.abort()

    # --- called by the transport ---

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        partial = self._splitter.partial
        self._buffer[: len(partial)] = partial
        return self._buffer[len(partial) : len(partial) + self._read_bytes]

    def buffer_updated(self, nbytes: int) -> None:
        self.last_read_s = self._loop.time()
        if self._retired:
            return
        data = self._buffer[: len(self._splitter.partial) + nbytes]
        if not self._started:
            # A greeting may have to wait for a commit.
            self._pause("start")
            self._first_bytes.put_nowait(bytes(data))
            return
        try:
            items = self._splitter.split(data)
            if items:
                has_large = isinstance(items[-1], Frames) and items[-1].size >= _LARGE_FRAME_BYTES
                self._read_bytes = len(self._buffer) - MAX_LINE_BYTES if has_large and len(items) == 1 else _READ_BYTES
            self._add(items, self._now())
            self._finish_read(len(data))
        except Exception as error:
            self._set_end(error)

    def eof_received(self) -> bool:
        self._set_end(None)
        # Answers are still to be sent.
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_end(exc)
        self._closed.set()

    def pause_writing(self) -> None:
        # Only a producer that does not read its answers waits here.
        self._pause("answers")

    def resume_writing(self) -> None:
        self._resume("answers")

    def _pause(self, reason: str) -> None:
        self._pauses.add(reason)
        self.transport.pause_reading()

    def _resume(self, reason: str) -> None:
        self._pauses.discard(reason)
        if not self._pauses:
            self.transport.resume_reading()

    def _finish_read(self, size: int) -> None:
        """Report a read of `size` bytes, with those that were unfinished before."""
        self._on_received(self)
        # Short lines gather in the kernel's buffer for a moment: one read costs less, and no single line wakes this
        # thread. Part of a long line would gain nothing.
        if size < _SMALL_READ_BYTES:
            self._pause("gather")
            self._loop.call_later(_GATHER_S, self._resume, "gather")

    def _set_end(self, error: Exception | None) -> None:
        self._first_bytes.put_nowait(b"")
        if self._end.done():
            return
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)
            # After a refusal nothing awaits it, and asyncio would log the exception.
            self._end.exception()

    # --- answers ---

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
        self.transport.close()

    def refuse(self, refusal: Refusal) -> None:
        """Send the reason and close the connection. A producer that reads nothing loses what was to be sent."""
        self._retired = True
        self._group.count("connections refused")
        if self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        self.transport.write(refusal.to_line())
        self.transport.close()

    def answer(self, outcome: CommitOutcome) -> None:
        self._answered = outcome.through
        line = {"through": outcome.through, "accepted": outcome.accepted}
        rejected = [{"line": number, "reason": reason} for number, reason in outcome.rejected]
        self.transport.write(msgspec.json.encode({**line, "rejected": rejected}) + b"\n")
        if outcome.is_store_full:
            # The failed transaction counted nothing, and the producer may have gone when there is room.
            self._group.count(FULL_COUNTER, len(outcome.rejected))
            self._reader.forget_times()
        if outcome.is_store_full and self.name is not None:
            # If this answer is lost, a later accepted line would count the rejected ones as stored.
            self._group.discard(self)
            self.retire()

    # --- lines and frames ---

    async def _start(self, data: bytes) -> None:
        """Handle the first bytes, which begin with a greeting or not. Raises Refusal."""
        # The rest of a first line or frame beyond the limit is no beginning.
        if not self._splitter.is_dropping:
            _check_first_bytes(data)
        items, now = self._splitter.split(data), self._now()
        if not items:
            return
        self._started = True
        if isinstance(items[0], list):
            if await self._read_hello(items[0][0]):
                items[:1] = [items[0][1:]] if items[0][1:] else []
        elif self._token is not None:
            raise Refusal(_NO_TOKEN)
        if not self._retired:
            self._add(items, now)

    def _add(self, items: list[list[bytes] | Frames | Oversized], now: ClockReading) -> None:
        for item in items:
            first = self._line_count + 1
            if isinstance(item, list):
                self._add_lines(item, now)
            elif isinstance(item, Frames):
                self._add_parsed(self._reader.parse_frames(item, first, now.wall_us), now)
                self._advance(self._line_count + len(item))
            else:
                reason = f"{item.kind} of {item.size} bytes, the limit is {MAX_LINE_BYTES}; split it"
                self._group.reject(self, first, reason)
                self._advance(first)

    def _add_lines(self, lines: list[bytes], now: ClockReading) -> None:
        # Parsed to the end before anything joins the group: rows without their position would be stored twice.
        runs = _find_runs(lines, self._line_count + 1)
        self._add_parsed(
            [parsed for number, run in runs for parsed in self._reader.parse(run, number, now.wall_us)], now
        )
        self._advance(self._line_count + len(lines))

    def _add_parsed(self, parsed_runs: list[ParsedLines], now: ClockReading) -> None:
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
            raise Refusal(_NO_TOKEN)
        if hello.client is not None:
            self.name = hello.client
            self._line_count = await self._greet(self, hello.client, hello.forget is True)
            if self._retired:
                return True
        if members:
            self.answer(CommitOutcome(self._line_count, 0, []))
        return bool(members)


def _check_first_bytes(data: bytes) -> None:
    """Check that a connection begins with a frame or a JSON object, after white space or a BOM. Raises Refusal."""
    first = data.lstrip()
    if first and not first.startswith((b"{", BOM[:1], MAGIC[:1])):
        raise Refusal(_OTHER_PROTOCOL)


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
