"""Producer client: send readings to the daemon on this machine.

    with Client("/var/lib/outstation/intake.sock", name="gateway-1") as client:
        client.send("watch", t=time.time(), ax=0.1, ay=0.2)
        client.send_columns("watch", {"t": times, "ax": xs, "ay": ys})
        answer = client.flush()

`flush` returns once everything sent is on the daemon's disk. Its `rejected` has the refused lines with reasons; the end
of `with` flushes, too, but reports none. A client with a `name` reconnects after a lost connection, asks which lines
were committed, and sends the rest: each line is processed exactly once. While the daemon is away, `send` keeps up to
20,000 lines or 16 MiB in memory, then waits. A frame of arrays counts as a line.

This file needs the standard library of Python 3.9 only. `outstation client > outstation_client.py` copies it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Protocol

    class Array(Protocol):
        """Numpy array, without a dependency on numpy."""

        @property
        def dtype(self) -> Any: ...
        @property
        def ndim(self) -> int: ...
        def tolist(self) -> Any: ...
        def tobytes(self) -> bytes: ...


# More than the daemon commits at once, so that a fast producer never waits for the commit timer. They also bound the
# memory while the daemon is away.
_MAX_PENDING_LINES = 20_000
_MAX_PENDING_BYTES = 1 << 24
_RETRY_S = 0.1
# One reply covers thousands of lines, and polling costs as much as sending a line.
_POLL_EVERY_LINES = 64
# Short lines occupy five times their length in the kernel; its default buffer holds about 160 of them.
_SEND_BUFFER_BYTES = 1 << 20
# Type of a column in a frame, by numpy's name of it.
_FRAME_TYPES = {"<f4": 1, "<f8": 2, "<i4": 3, "<i8": 4}
_FRAME_PREFIX, _FRAME_HEAD = b"\x9cOF\x01", struct.Struct("<4sIIBBH")
_MAX_NAME_BYTES = 255
# Times beyond are sent as they are, so that the daemon names them.
_MAX_TIME_S = 1e12
_TCP_ADDRESS = re.compile(r"(localhost|127\.0\.0\.1|\[::1\]|::1):(\d{1,5})")
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


def _encode_plainly(document: dict[str, Any]) -> bytes:
    try:
        return _to_json(document).encode()
    except ValueError:
        return _to_json(_without_nan(document)).encode()


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON does not have by null: they are missing."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_encode: Callable[[dict[str, Any]], bytes] = _encode_plainly
# Several times as fast, where it is installed.
with contextlib.suppress(ImportError):
    import msgspec.json

    _encode = msgspec.json.encode


class FlushResult(NamedTuple):
    """Outcome of the lines since the last `flush` or `answered`: accepted rows, and (line, reason) of rejected ones.

    Lines count from 1 per client; a named client continues the count for ever. Replies lost with a connection are
    missing here.
    """

    accepted: int
    rejected: list[tuple[int, str]]


class _Refused(PermissionError):
    """The daemon refuses this producer; a retry would not help."""


class Client:
    """A producer. Not thread-safe.

    `address` is the daemon's socket file, or `127.0.0.1:PORT` with the `token` of the daemon's `intake.token_file`.
    `name`, 1 to 64 characters, belongs to one producer at a time. `patience_s` bounds the wait for an answer, and must
    exceed the daemon's `commit_every`. `outage_s` bounds how long a named client continues without the daemon. With
    `reconnect` False, a lost connection is an error at once; a new client of the same name continues after `through`.
    With `forget` True, the daemon forgets the lines of this name before, and counts from 1.

    Raises ConnectionError if the daemon is away: with a name after `patience_s` at the start and `outage_s` later;
    without one at once, because the fate of the last lines is then unknown. A named client may be used afterwards: it
    has not kept the row of the `send` that raised, and sends earlier rows once the daemon answers. Raises
    PermissionError if the daemon refuses the producer, and RuntimeError if another producer uses the name.
    """

    def __init__(
        self,
        address: str | Path,
        *,
        name: str | None = None,
        token: str | None = None,
        patience_s: float = 30.0,
        outage_s: float = 3600.0,
        reconnect: bool = True,
        forget: bool = False,
    ) -> None:
        if name is not None and not 1 <= len(name) <= 64:
            raise ValueError(f"name {name[:80]!r} must have 1-64 characters")
        self._address, self._name, self._token, self._patience_s = str(address), name, token, patience_s
        self._reconnects, self._forgets = reconnect and name is not None, forget
        self._outage_s = outage_s
        self._is_connected = False
        # Monotonic s, until the daemon answers again.
        self._outage_end: float | None = None
        self._next_attempt = 0.0
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._sent = 0
        self._acknowledged = 0
        # The daemon's line numbers are lower by this if it lost count: its store was full, or is a new one.
        self._line_offset = 0
        self._greeted = False
        self._accepted = 0
        self._rejected: list[tuple[int, str]] = []
        self._receive_buffer = b""
        self._lines_since_poll = 0
        self._socket = socket.socket(socket.AF_UNIX)
        self._connect()

    @property
    def through(self) -> int:
        """Number of lines processed for good. A new process with the same name continues after them."""
        return self._acknowledged

    def send(self, stream: str, **row: Any) -> None:
        """Send one row; `t` in epoch seconds is optional."""
        self._send(_encode({"stream": stream, **row}) + b"\n")

    def send_columns(self, stream: str, columns: Mapping[str, Sequence[Any] | Array]) -> None:
        """Send many rows as columns of one length: sequences or numpy arrays, at most 1 MiB at a time.

        Arrays of float32, float64, int32 and int64 are sent as bytes, without conversion of each value; NaN is a
        missing value.
        """
        frame = _encode_frame(stream, columns)
        if frame is not None:
            self._send(frame)
            return
        packed: dict[str, tuple[str, str]] = {}
        plain: dict[str, list[Any]] = {}
        for name, column in columns.items():
            if isinstance(column, Sequence):
                plain[name] = list(column)
            elif not hasattr(column, "dtype"):
                raise TypeError(f"column {name!r} must be a sequence or a numpy array, not {type(column).__name__}")
            elif _frame_type(column):
                packed[name] = column.dtype.str[1:], base64.b64encode(column.tobytes()).decode()
            else:
                plain[name] = column.tolist()
        parts = {"columns": plain} if plain or not packed else {}
        self._send(_encode({"stream": stream, **parts, **({"packed": packed} if packed else {})}) + b"\n")

    def label(
        self,
        task: str,
        label: str | float,
        *,
        row: int | None = None,
        t: float | None = None,
        source: str = "human",
        author: tuple[str, str] | None = None,
        output: str = "",
    ) -> None:
        """Send the ground truth of the prediction of `task` at `row`, or nearest to `t` in epoch seconds.

        `source` is human, system, model or verdict; the last two do not count in the model's metrics. `author`: a name
        and its token from `outstation label-token`. A label without one is counted, but no roll-out acts on it.
        `output` names a further output of the model.
        """
        place = {"row": row} if row is not None else {"t": t}
        more = {"output": output} if output else {}
        proof = {} if author is None else {"by": author[0], "token": author[1]}
        self._send(_encode({"labels": task, **place, "label": label, "source": source, **more, **proof}) + b"\n")

    def flush(self) -> FlushResult:
        """Wait until all lines are committed, and return their outcome."""
        while self._acknowledged < self._sent:
            self._await_replies()
        return self.answered()

    def answered(self) -> FlushResult:
        """Return the outcome known so far since the last `flush` or `answered`, without waiting."""
        answer = FlushResult(self._accepted, self._rejected)
        self._accepted, self._rejected = 0, []
        return answer

    def close(self) -> None:
        """Close the connection; lines that were not flushed may be lost."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _send(self, line: bytes) -> None:
        """Send a line with its newline, or a frame. Where the daemon is away for too long, the line is not kept."""
        if not self._is_connected:
            self._reconnect()
        while self._must_wait():
            self._await_replies()
        size = len(line)
        self._pending.append(line)
        self._pending_bytes += size
        self._sent += 1
        self._lines_since_poll += 1
        if not self._is_connected:
            return
        try:
            sent = self._try_send(line)
            if sent < size or self._lines_since_poll >= _POLL_EVERY_LINES:
                self._send_all(memoryview(line)[sent:])
        except OSError as error:
            # The daemon may have the line: it is kept, and a later call raises if the daemon stays away.
            self._note_loss(error)
            self._reconnect()

    def _must_wait(self) -> bool:
        """Return whether no further line fits into memory, or the outage lasts too long for another."""
        if len(self._pending) >= _MAX_PENDING_LINES or self._pending_bytes >= _MAX_PENDING_BYTES:
            return True
        return self._is_overdue()

    def _await_replies(self) -> None:
        """Wait for a reply, or for the daemon. Raises ConnectionError if it answers no line for `outage_s`."""
        if self._is_connected:
            cause = self._read_next_replies()
        elif (cause := self._reconnect()) is None and not self._is_connected:
            time.sleep(_RETRY_S)
        if cause is not None and self._is_overdue():
            self._fail(cause)

    def _read_next_replies(self) -> OSError | None:
        """Wait for replies and read them; return why the connection was lost instead."""
        try:
            self._wait_ready(select.POLLIN)
            self._read_replies()
        except OSError as error:
            self._note_loss(error)
            return error
        return None

    def _is_overdue(self) -> bool:
        return self._outage_end is not None and time.monotonic() >= self._outage_end

    def _send_all(self, rest: memoryview) -> None:
        """Send, and read replies meanwhile: two sides that only write would deadlock."""
        while True:
            self._read_replies()
            if not rest:
                return
            self._wait_ready(select.POLLIN | select.POLLOUT)
            rest = rest[self._try_send(rest) :]

    def _try_send(self, data: bytes | memoryview) -> int:
        """Return how many bytes the socket accepted. Raises OSError."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def _wait_ready(self, events: int) -> None:
        """Wait until the socket is ready. Raises TimeoutError after `patience_s`, OSError once it is closed."""
        if self._socket.fileno() < 0:
            raise ConnectionResetError("the connection is closed")
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(self._patience_s * 1000):
            raise TimeoutError(f"no answer for {self._patience_s:g} s")

    def _read_replies(self) -> None:
        """Read the available replies. Raises OSError."""
        self._lines_since_poll = 0
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        *lines, self._receive_buffer = (self._receive_buffer + data).split(b"\n")
        for line in lines:
            reply = self._decode_reply(line)
            self._acknowledge_through(reply["through"] + self._line_offset)
            self._accepted += reply["accepted"]
            self._rejected += [(item["line"] + self._line_offset, item["reason"]) for item in reply["rejected"]]

    def _decode_reply(self, line: bytes) -> dict[str, Any]:
        """Decode a line of the daemon. Raises OSError if it closes the connection."""
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = ConnectionRefusedError if reply["retry"] else _Refused
            raise kind(reply["error"])
        return reply

    def _acknowledge_through(self, through: int) -> None:
        if through > self._acknowledged:
            self._outage_end = None
        for _ in range(min(len(self._pending), through - self._acknowledged)):
            self._pending_bytes -= len(self._pending.popleft())
        self._acknowledged = max(self._acknowledged, through)

    def _connect(self) -> None:
        """Connect; a named client retries for `patience_s`."""
        deadline = time.monotonic() + self._patience_s
        self._socket.close()
        while True:
            try:
                self._open_socket()
                return
            except _Refused as error:
                self._fail(error)
            except OSError as error:
                # The listen queue is full: the one reason to retry without a name, too.
                crowded = isinstance(error, BlockingIOError)
                if time.monotonic() >= deadline or (not self._reconnects and not crowded):
                    self._fail(error)
                self._socket.close()
                time.sleep(_RETRY_S)

    def _open_socket(self) -> None:
        """Connect, and send the lines that are not committed. Raises OSError."""
        tcp = _TCP_ADDRESS.fullmatch(self._address)
        self._receive_buffer = b""
        if tcp:
            self._socket = socket.create_connection((tcp[1].strip("[]"), int(tcp[2])), self._patience_s)
        else:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            self._socket.settimeout(self._patience_s)
            self._socket.connect(self._address)
        if self._name is not None or self._token is not None:
            self._handshake()
        self._socket.settimeout(0.0)
        if self._pending:
            self._send_all(memoryview(b"".join(self._pending)))
        else:
            self._outage_end = None
        self._is_connected = True

    def _handshake(self) -> None:
        """Send the client's name and token, and receive how many of its lines are committed."""
        hello = {"client": self._name, "token": self._token, "forget": (self._forgets and not self._greeted) or None}
        self._socket.sendall(_encode({key: value for key, value in hello.items() if value is not None}) + b"\n")
        received = b""
        while b"\n" not in received:
            data = self._socket.recv(4096)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            received += data
        line, _, self._receive_buffer = received.partition(b"\n")
        through = self._decode_reply(line)["through"]
        if not self._greeted:
            self._greeted = True
            self._sent = self._acknowledged = through
        if through + self._line_offset > self._sent:
            # A retry would not help: another process counts lines under this name.
            raise RuntimeError(f"{self._address}: another producer uses the name {self._name!r}; give each its own")
        self._line_offset = max(self._line_offset, self._acknowledged - through)
        self._acknowledge_through(through + self._line_offset)

    def _note_loss(self, cause: OSError) -> None:
        """Close a lost connection. Raises PermissionError or ConnectionError if the client must not reconnect."""
        # Replies from before the loss say which lines are stored, and that an earlier outage is over.
        with contextlib.suppress(OSError):
            self._read_replies()
        if not self._reconnects or isinstance(cause, _Refused):
            self._fail(cause)
        self._socket.close()
        self._is_connected = False
        self._begin_outage()

    def _begin_outage(self) -> None:
        """Start the clock of `outage_s`, unless no line was acknowledged since it was started."""
        if self._outage_end is None:
            self._outage_end = time.monotonic() + self._outage_s

    def _reconnect(self) -> OSError | None:
        """Try to connect, unless the last attempt was just now; return why it failed."""
        now = time.monotonic()
        if now < self._next_attempt:
            return None
        self._next_attempt = now + _RETRY_S
        try:
            self._open_socket()
        except _Refused as error:
            self._fail(error)
        except OSError as error:
            self._socket.close()
            # A reply may have ended the outage before the daemon was lost again.
            self._begin_outage()
            return error
        return None

    def _fail(self, cause: OSError) -> NoReturn:
        """Close the connection for good. Raises PermissionError or ConnectionError."""
        self._socket.close()
        kind = PermissionError if isinstance(cause, _Refused) else ConnectionError
        raise kind(f"{self._address}: {cause.strerror or cause}{self._pending_note()}") from cause

    def _pending_note(self) -> str:
        if not self._pending:
            return ""
        # A caller who uses this client again must not send them twice.
        unless = ", unless you go on with this client: it sends them itself" if self._reconnects else ""
        return f"; {len(self._pending)} lines are not acknowledged; send them again{unless}"


def _encode_frame(stream: str, columns: Mapping[str, Any]) -> bytes | None:
    """Return arrays of equal length as a binary frame; None if a column is something else."""
    heads, lengths = [stream.encode()], set()
    data: list[Any] = []
    times, data_bytes = b"", 0
    for name, column in columns.items():
        # Only arrays have a type; cheaper than to ask whether it is a sequence.
        kind = _frame_type(column) if hasattr(column, "dtype") else 0
        if not kind:
            return None
        n = len(column)
        lengths.add(n)
        if name == "t":
            times = _to_epoch_us(column)
            if not times:
                return None
            continue
        encoded = name.encode()
        heads += (bytes((kind, len(encoded) & _MAX_NAME_BYTES)), encoded)
        # Joined from the array itself: to copy it twice would cost half of the time.
        data.append(column.data if column.flags.c_contiguous else column.tobytes())
        # Types 1 and 3 have four bytes; a column fills a multiple of eight.
        if kind & 1 and n & 1:
            data.append(bytes(4))
        data_bytes += (n + 1) // 2 * 8 if kind & 1 else 8 * n
    count = len(heads) // 2
    if len(lengths) != 1 or not count or max(map(len, heads)) > _MAX_NAME_BYTES or count >= 1 << 16:
        return None
    names = b"".join(heads)
    padding = bytes(-(_FRAME_HEAD.size + len(names)) % 8)
    size = _FRAME_HEAD.size - 8 + len(names) + len(padding) + len(times) + data_bytes
    head = _FRAME_HEAD.pack(_FRAME_PREFIX, size, lengths.pop(), times != b"", len(heads[0]), count)
    return b"".join([head, names, padding, times, *data])


def _frame_type(column: Any) -> int:
    """Return the type of an array in a frame; 0 if it has none, or a mask, under which values are missing."""
    if column.ndim != 1 or hasattr(column, "mask"):
        return 0
    return _FRAME_TYPES.get(column.dtype.str, 0)


def _to_epoch_us(seconds: Any) -> bytes:
    """Return epoch seconds as int64 µs; nothing if one of them is far from any clock's time, or NaN."""
    numbers = seconds.astype("<f8")
    if not len(numbers) or not (numbers.min() > -_MAX_TIME_S and numbers.max() < _MAX_TIME_S):
        return b""
    microseconds: bytes = (numbers * 1e6).round().astype("<i8").tobytes()
    return microseconds
