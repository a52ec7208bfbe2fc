"""Where a repository's files come from, http(s) or a folder: never faster, never slower and never longer than agreed.

Rules:
- a file's name leads nowhere outside the repository; in a folder no symbolic link is followed, and only files are read
- redirects are not followed: an address is given by the device's config and by nobody else
- a server that gives less than LEAST_BYTES in PATIENCE_S is given up, whatever it drips: headers count as nothing
- all requests together end at the deadline
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol
from urllib.parse import quote, urlsplit

import msgspec

from agent.device.rollout.fetch.protocol import MIN_STALL_BYTES, STALL_TIMEOUT_S
from agent.errors import FetchFailed

_CHUNK_BYTES = 65_536
_ERROR_BODY_BYTES = 8_192
_NOT_FOUND_STATUSES = frozenset({403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(?:\d{1,15}|\*)", re.ASCII)


class RemoteFileNotFound(FetchFailed):
    """The repository has no such file."""

    def __init__(self, name: str, status: int = 404) -> None:
        super().__init__("DownloadHTTPError", f"{name}: the repository has no such file ({status})")
        self.status = status


class FileStream(msgspec.Struct, frozen=True):
    """Chunks of a file from byte `start` on; not to be mixed with another reading of the same source."""

    start: int
    chunks: Iterator[bytes]


class Transport(Protocol):
    def read(self, name: str, offset: int = 0) -> FileStream:
        """File `name`, from `offset` on or, where that cannot be had, from its beginning. Raises FetchFailed."""
        ...


class TransferLimiter:
    """Watches a transfer. Only for the main thread: it needs the alarm signal."""

    def __init__(self, timeout_s: float, max_rate: int | None, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._max_rate, self._stall_timeout_s = max_rate, stall_timeout_s
        self.chunk_bytes = _CHUNK_BYTES if max_rate is None else max(512, min(_CHUNK_BYTES, max_rate))
        self._stall_left_s, self._bytes_since_reset = stall_timeout_s, 0
        self._next_read_s = time.monotonic()

    @contextlib.contextmanager
    def enforce_timeout(self) -> Iterator[None]:
        """Around whatever waits for the other end. Raises FetchFailed."""
        begun_s = time.monotonic()
        rest_s = self._deadline_s - begun_s
        if rest_s <= 0:
            raise self._timeout_error()
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, min(self._stall_left_s, rest_s)))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._stall_left_s -= time.monotonic() - begun_s

    def throttle(self, count: int) -> None:
        """So many bytes came; waits where they came too fast."""
        self._bytes_since_reset += count
        if self._bytes_since_reset >= MIN_STALL_BYTES:
            self.reset()
        if self._max_rate is not None:
            self._next_read_s = max(self._next_read_s, time.monotonic() - 1) + count / self._max_rate
            time.sleep(max(0.0, self._next_read_s - time.monotonic()))

    def reset(self) -> None:
        """Another request begins, or enough has come."""
        self._stall_left_s, self._bytes_since_reset = self._stall_timeout_s, 0

    def _on_alarm(self, _signal: int, _frame: FrameType | None) -> None:
        if time.monotonic() >= self._deadline_s:
            raise self._timeout_error()
        raise FetchFailed(
            "SlowRetrievalError",
            f"less than {MIN_STALL_BYTES} bytes came in {self._stall_timeout_s:g} s; the connection is given up",
        )

    def _timeout_error(self) -> FetchFailed:
        return FetchFailed("TimeOver", "it was not done in the time a fetch may take; what came so far is kept")


class HttpTransport:
    """A repository behind http or https; one connection for all of it. `close` it."""

    def __init__(self, url: str, ca_file: str | None, limiter: TransferLimiter) -> None:
        parts = urlsplit(url)
        self._path, self._limiter, self._url = parts.path.rstrip("/"), limiter, url
        host, port = parts.hostname or "", parts.port
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            with _map_errors(f"[updates] ca_file {ca_file}"):
                context = ssl.create_default_context(cafile=ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._connection = http.client.HTTPSConnection(host, port, timeout=STALL_TIMEOUT_S, context=context)
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=STALL_TIMEOUT_S)

    def read(self, name: str, offset: int = 0) -> FileStream:
        path = "/".join([self._path, *(quote(part, safe="") for part in _split_name(name))])
        response = self._send_request(path, offset)
        if response.status not in (200, 206):
            self._drain_error_body(response)
            if response.status == 416 and offset:
                return self.read(name)
            if response.status in _NOT_FOUND_STATUSES:
                raise RemoteFileNotFound(name, response.status)
            raise FetchFailed("DownloadHTTPError", self._describe_refusal(name, response))
        return FileStream(self._start_offset(name, response, offset), self._iter_chunks(name, response))

    def close(self) -> None:
        self._connection.close()

    def _send_request(self, path: str, offset: int) -> http.client.HTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "outstation"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        reused = self._connection.sock is not None
        self._limiter.reset()
        try:
            with _map_errors(self._url), self._limiter.enforce_timeout():
                self._connection.request("GET", path, headers=headers)
                return self._connection.getresponse()
        except FetchFailed as failure:
            self.close()
            # A server may have closed a connection that was idle for a moment.
            if reused and isinstance(failure.__cause__, ConnectionError | http.client.HTTPException):
                return self._send_request(path, offset)
            raise

    def _drain_error_body(self, response: http.client.HTTPResponse) -> None:
        """The words beside an error; the connection stays, where they are few."""
        with _map_errors(self._url), self._limiter.enforce_timeout():
            response.read(_ERROR_BODY_BYTES)
        if not response.isclosed():
            self.close()

    def _start_offset(self, name: str, response: http.client.HTTPResponse, offset: int) -> int:
        if response.status == 200:
            return 0
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset or not offset:
            self.close()
            raise FetchFailed("DownloadError", f"{name}: the server answers with another part than it was asked for")
        return offset

    def _iter_chunks(self, name: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while True:
                with _map_errors(f"{self._url}: {name}"), self._limiter.enforce_timeout():
                    data = response.read1(self._limiter.chunk_bytes)
                if not data:
                    return
                self._limiter.throttle(len(data))
                yield data
        finally:
            if not response.isclosed():
                # What is left of it would be taken for the next answer.
                self.close()

    def _describe_refusal(self, name: str, response: http.client.HTTPResponse) -> str:
        if response.status in (301, 302, 303, 307, 308):
            to = response.headers.get("Location", "")[:200]
            return (
                f"{name}: the server redirects to {to!r} ({response.status}), which is not followed; if that is where "
                "the repository is, give it as [updates] url"
            )
        return f"{name}: the server answers {response.status} {response.reason[:80]!r}"


class FolderTransport:
    """A repository in a folder of this machine, which may be a stick."""

    def __init__(self, folder: Path, limiter: TransferLimiter) -> None:
        self._folder, self._limiter = folder, limiter

    def read(self, name: str, offset: int = 0) -> FileStream:
        parts = _split_name(name)
        with _map_errors(f"{self._folder}: is the stick there? {name}"):
            opened = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            opened = self._open_child(opened, part, name)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise FetchFailed("DownloadError", f"{self._folder}: {name} is no plain file")
        os.lseek(opened, offset, os.SEEK_SET)
        return FileStream(offset, self._iter_chunks(opened, name))

    def close(self) -> None:
        """Nothing is held."""

    def _open_child(self, folder: int, part: str, name: str) -> int:
        try:
            # O_NONBLOCK: a pipe in the way must not hold us.
            return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            raise RemoteFileNotFound(name) from None
        except OSError as error:
            raise FetchFailed("DownloadError", f"{self._folder}: {name}: {error.strerror}") from error
        finally:
            os.close(folder)

    def _iter_chunks(self, opened: int, name: str) -> Iterator[bytes]:
        try:
            while True:
                with _map_errors(f"{self._folder}: {name}"), self._limiter.enforce_timeout():
                    data = os.read(opened, self._limiter.chunk_bytes)
                if not data:
                    return
                self._limiter.throttle(len(data))
                yield data
        finally:
            os.close(opened)


def open_transport(url: str, ca_file: str | None, limiter: TransferLimiter) -> HttpTransport | FolderTransport:
    """Raises FetchFailed."""
    return HttpTransport(url, ca_file, limiter) if "://" in url else FolderTransport(Path(url), limiter)


def _split_name(name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise FetchFailed("DownloadError", f"{name!r} leads out of the repository")
    return parts


@contextlib.contextmanager
def _map_errors(subject: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = str(error) or type(error).__name__
        raise FetchFailed("DownloadError", f"{subject}: {said[:300]}") from error
