"""Send readings to the agent on this machine.

    with Client("/var/lib/outstation/intake.sock", name="gateway-1") as client:
        client.send("watch", t=time.time(), ax=0.1, ay=0.2)
        client.send_columns("watch", {"t": times, "ax": xs, "ay": ys})
        answer = client.flush()

`flush` returns when everything sent is on the agent's disk. With a `name` of its own, a client that loses the
connection comes back, asks how far it got, and sends the rest: each line is taken exactly once.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

_MOST_WAITING = 4096


@dataclass
class Answer:
    """What became of the lines since the last `flush`: rows accepted, and (line, reason) of what was not."""

    accepted: int = 0
    rejected: list[tuple[int, str]] = field(default_factory=list)


class _Rejection(msgspec.Struct):
    line: int
    reason: str


class _Reply(msgspec.Struct):
    through: int
    accepted: int
    rejected: list[_Rejection]


class Client:
    """One producer. Not thread-safe. Raises ConnectionError where the agent stays away for `patience_s`."""

    def __init__(self, address: str | Path, *, name: str | None = None, patience_s: float = 30.0) -> None:
        self._address, self._name, self._patience_s = str(address), name, patience_s
        self._waiting: deque[bytes] = deque()
        self._sent = 0
        self._safe = 0
        self._answer = Answer()
        self._received = b""
        self._socket = self._connect()

    def send(self, stream: str, **row: Any) -> None:
        """One row; `t` in epoch seconds may be left out."""
        self._send_line(msgspec.json.encode({"stream": stream, **row}))

    def send_columns(self, stream: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Many rows as columns of one length, plain lists or numpy arrays; keep a line under 1 MiB."""
        plain = {name: column.tolist() if hasattr(column, "tolist") else column for name, column in columns.items()}
        self._send_line(msgspec.json.encode({"stream": stream, "columns": plain}))

    def flush(self) -> Answer:
        """Wait until all lines are safe; what became of them."""
        while self._safe < self._sent:
            try:
                self._read(self._patience_s)
            except OSError as error:
                self._reconnect(error)
        answer, self._answer = self._answer, Answer()
        return answer

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _send_line(self, line: bytes) -> None:
        self._waiting.append(line + b"\n")
        self._sent += 1
        try:
            self._socket.sendall(self._waiting[-1])
            self._read(0.0)
            while len(self._waiting) >= _MOST_WAITING:
                self._read(self._patience_s)
        except OSError as error:
            self._reconnect(error)

    def _read(self, timeout_s: float) -> None:
        """Take the answers that are there, waiting for the first one up to `timeout_s`. Raises OSError."""
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        finally:
            self._socket.settimeout(self._patience_s)
        if not data:
            raise ConnectionResetError("the agent closed the connection")
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            reply = msgspec.json.decode(line, type=_Reply)
            self._reach(reply.through)
            self._answer.accepted += reply.accepted
            self._answer.rejected += [(one.line, one.reason) for one in reply.rejected]

    def _reach(self, through: int) -> None:
        for _ in range(min(len(self._waiting), through - self._safe)):
            self._waiting.popleft()
        self._safe = max(self._safe, through)

    def _connect(self) -> socket.socket:
        if "/" in self._address:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            target: Any = self._address
        else:
            host, _, port = self._address.rpartition(":")
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            target = (host, int(port))
        sock.settimeout(self._patience_s)
        try:
            sock.connect(target)
            if self._name is not None:
                self._greet(sock)
        except OSError:
            sock.close()
            raise
        return sock

    def _greet(self, sock: socket.socket) -> None:
        """Tell who we are, and learn how many of our lines are safe."""
        sock.sendall(msgspec.json.encode({"client": self._name}) + b"\n")
        received = b""
        while not received.endswith(b"\n"):
            data = sock.recv(4096)
            if not data:
                raise ConnectionResetError("the agent closed the connection")
            received += data
        through = msgspec.json.decode(received, type=_Reply).through
        if not self._sent:
            self._sent = self._safe = through
        self._reach(through)

    def _reconnect(self, cause: OSError) -> None:
        if self._name is None:
            raise ConnectionError(
                f"{self._address}: {cause}; {len(self._waiting)} lines are not acknowledged and may be sent again"
            ) from cause
        self._received = b""
        deadline = time.monotonic() + self._patience_s
        while True:
            self._socket.close()
            try:
                self._socket = self._connect()
                for line in list(self._waiting):
                    self._socket.sendall(line)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConnectionError(f"{self._address}: {error}") from error
                time.sleep(0.2)
