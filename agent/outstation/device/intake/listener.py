"""Listening sockets of the intake: who connects, how many may, and the token of TCP producers.

Any local program can connect, and every connection costs a descriptor and memory. So each user has a share of the
connections, idle ones give way when the table is full, and a lack of descriptors only delays `accept`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import secrets
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec

from outstation.foundation import durable_files, input_files
from outstation.foundation.errors import UsageError

log = logging.getLogger("outstation.intake")

MAX_CONNECTIONS = 512
MAX_PER_USER = 256
# Lines without an end and answers that nobody reads, of all producers together.
MAX_HELD_BYTES = 16 << 20
# A producer that holds less is no reason to look at the others.
_SMALL_HELD_BYTES = 64 << 10
IDLE_S = 3600.0
# A connection that is idle for this time gives way if its user has no other left.
_IDLE_WHEN_FULL_S = 60.0
# For the store, models, files and the broker.
_RESERVED_DESCRIPTORS = 128
_WANTED_DESCRIPTORS = 4096
# If the queue is full, a producer that connects with a timeout fails at once.
_BACKLOG = 1024
# A flood of connections must not hold up those that are served.
_ACCEPTS_PER_TURN = 16
_RETRY_S = 1.0
_LOG_EVERY_S = 60.0
_PASSING_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_TOKEN_BYTES = 32

# User id of a producer on the Unix socket; None on TCP, where the kernel names nobody.
User = int | None


class Refusal(Exception):
    """Reason to end a connection; `retry` if the same producer may succeed later."""

    def __init__(self, reason: str, *, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry

    def to_line(self) -> bytes:
        return msgspec.json.encode({"error": str(self), "retry": self.retry}) + b"\n"


class Connection(Protocol):
    """Connection in the table; `last_read_s`: time of its last bytes on the clock of the loop."""

    user: User
    last_read_s: float

    def held_bytes(self) -> int: ...

    def refuse(self, refusal: Refusal) -> None: ...


class ConnectionTable:
    """Open connections within the limits of count, memory and idle time."""

    def __init__(self, max_connections: int = MAX_CONNECTIONS) -> None:
        self._max, self._max_per_user = max_connections, min(MAX_PER_USER, -(-max_connections // 2))
        self._connections: set[Connection] = set()

    def add(self, connection: Connection, now_s: float) -> None:
        """Add the connection, closing an idle one if the table is full. Raises Refusal if there is none."""
        counts = Counter(other.user for other in self._connections)
        own = counts[connection.user]
        if own >= self._max_per_user:
            self._make_room(connection.user, now_s, _IDLE_WHEN_FULL_S)
        elif len(self._connections) >= self._max:
            # The user with the most connections gives one up, so that no user can keep the others out.
            largest, most = counts.most_common(1)[0]
            self._make_room(largest, now_s, 0.0 if most > own + 1 else _IDLE_WHEN_FULL_S)
        self._connections.add(connection)

    def remove(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def close_idle(self, now_s: float) -> None:
        """Close connections on which nothing came for an hour."""
        for connection in [c for c in self._connections if now_s - c.last_read_s > IDLE_S]:
            self._close(connection, f"nothing was sent for {IDLE_S:g} s; connect again")

    def limit_memory(self, connection: Connection) -> None:
        """Close the largest holders of memory while all connections hold too much; `connection` has just grown."""
        if connection.held_bytes() < _SMALL_HELD_BYTES:
            return
        held = {other: other.held_bytes() for other in self._connections}
        excess = sum(held.values()) - MAX_HELD_BYTES
        for other in sorted(held, key=held.__getitem__, reverse=True):
            if excess <= 0:
                break
            excess -= held[other]
            self._close(other, "its unfinished line and unread answers take too much memory; read the answers")

    def _make_room(self, user: User, now_s: float, idle_s: float) -> None:
        oldest = min((c for c in self._connections if c.user == user), key=lambda c: c.last_read_s)
        if now_s - oldest.last_read_s < idle_s:
            raise Refusal(f"{self._describe_limit(user)}; close some, or send over fewer", retry=True)
        self._close(oldest, f"{self._describe_limit(user)}, and this one was idle longest; connect again")

    def _describe_limit(self, user: User) -> str:
        who = "TCP producers have" if user is None else f"user {user} has"
        return f"{who} too many connections ({self._max_per_user} a user, {self._max} in all)"

    def _close(self, connection: Connection, reason: str) -> None:
        self._connections.discard(connection)
        connection.refuse(Refusal(reason, retry=True))


class Listener:
    """Listening socket that accepts a few connections a turn and survives a lack of descriptors.

    `serve` gets the connected socket and its user; `count_failure` is called for each accept that failed.
    """

    def __init__(
        self,
        listening: socket.socket,
        serve: Callable[[socket.socket, User], None],
        count_failure: Callable[[], None],
    ) -> None:
        self._socket, self._serve, self._count_failure = listening, serve, count_failure
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._log_after_s = 0.0
        listening.setblocking(False)
        listening.listen(_BACKLOG)
        self._loop.add_reader(listening, self._accept)

    def close(self) -> None:
        """Accept what has connected, and close."""
        self._accept(_BACKLOG)
        self._loop.remove_reader(self._socket)
        if self._retry is not None:
            self._retry.cancel()
        self._socket.close()

    def _accept(self, limit: int = _ACCEPTS_PER_TURN) -> None:
        for _ in range(limit):
            try:
                connected, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _PASSING_ERRORS:
                    raise
                self._pause(error)
                return
            connected.setblocking(False)
            self._serve(connected, peer_user(connected))

    def _pause(self, error: OSError) -> None:
        """Accept again in a second: the socket stays readable, and its producers wait in the queue."""
        self._count_failure()
        if self._loop.time() >= self._log_after_s:
            self._log_after_s = self._loop.time() + _LOG_EVERY_S
            log.warning("no new connection can be accepted: %s; producers wait, the others go on", error.strerror)
        self._loop.remove_reader(self._socket)
        self._retry = self._loop.call_later(_RETRY_S, lambda: self._loop.add_reader(self._socket, self._accept))


class UnixListener:
    """Listener at `path`, which binds a new socket if the file is deleted or replaced. Raises UsageError."""

    def __init__(self, path: Path, listen: Callable[[socket.socket], Listener]) -> None:
        self._path, self._listen, self._problem = path, listen, ""
        self._listener = listen(bind_unix(path))
        self._file = path.stat()

    def restore(self) -> None:
        """Bind the socket again if its file is no longer there. A failure is logged once, and tried again."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.stat(), self._file):
                return
        try:
            bound = bind_unix(self._path)
            self._file = self._path.stat()
        except (OSError, UsageError) as error:
            if str(error) != self._problem:
                log.error("the socket's file is gone, and cannot be made again: %s", error)
            self._problem = str(error)
            return
        log.warning("%s: the socket's file was deleted or replaced; made again, producers can connect", self._path)
        self._listener.close()
        self._listener, self._problem = self._listen(bound), ""

    def close(self) -> None:
        self._listener.close()


def peer_user(connected: socket.socket) -> User:
    """Return the user id of the process at the other end of a Unix socket; None for TCP."""
    if connected.family != socket.AF_UNIX:
        return None
    _, user, _ = struct.unpack("iII", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def bind_unix(path: Path) -> socket.socket:
    """Bind a socket for the owner and group. Raises UsageError."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The folder's lock excludes another daemon.
        path.unlink(missing_ok=True)
        bound.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        bound.close()
        if error.errno is None:
            raise UsageError(f"{path}: {error}; a socket path has at most 107 bytes; shorten data_dir") from error
        raise UsageError(f"{path}: {error.strerror}; remove it: producers connect here") from error
    return bound


def bind_tcp(address: str, host: str, port: int) -> Iterable[socket.socket]:
    """Bind `address`, whose host may have an IPv4 and an IPv6 address. Raises UsageError."""
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sockets.append(bound := socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(target)
    except OSError as error:
        for bound in sockets:
            bound.close()
        raise UsageError(f"intake.tcp {address}: {error.strerror}; choose another port") from error
    return sockets


def load_token(path: Path) -> str:
    """Return the token of TCP producers, made on first use. Raises UsageError if others can read the file."""
    try:
        if not path.exists():
            durable_files.write(path, secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n", 0o600)
        if path.stat().st_mode & 0o077:
            raise UsageError(f"{path}: others can read this token; delete the file, and the next start makes a new one")
        token = input_files.read_text(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: the token of TCP producers cannot be read: {error}; see intake.token_file"
        ) from error
    if len(token) < _TOKEN_BYTES:
        raise UsageError(f"{path}: a token has at least {_TOKEN_BYTES} characters; delete the file to have one made")
    return token


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files, and return how many connections it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(2, min(MAX_CONNECTIONS, soft - _RESERVED_DESCRIPTORS))
