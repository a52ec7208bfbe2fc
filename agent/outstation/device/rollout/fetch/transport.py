"""Repository transport: read a repository's files over http(s) or from a folder, within limits of rate and time.

Rules:
- a file name never leads outside the repository; in a folder only regular files are read, and no symbolic link is
  followed
- redirects are not followed: only the device's config sets an address
- a server that sends fewer than MIN_STALL_BYTES in `stall_timeout_s` is given up; headers do not count
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

from outstation.device.rollout.fetch.protocol import MIN_STALL_BYTES, STALL_TIMEOUT_S
from outstation.foundation.errors import FetchFailed

_CHUNK_BYTES = 65_536
_ERROR_BODY_BYTES = 8_192
_MISSING_STATUSES = frozenset({403, 404, 410})
_CONTENT_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(?:\d{1,15}|\*)", re.ASCII)


class RemoteFileMissing(FetchFailed):
    """The repository has no such file."""

    def __init__(self, name: str, status: int = 404) -> None:
        super().__init__("DownloadHTTPError", f"{name}: the repository has no such file ({status})")
        self.status = status


class FileStream(msgspec.Struct, frozen=True):
    """Chunks of a file from byte `start` on. Read them before the next file of the same transport."""

    start: int
    chunks: Iterator[bytes]


class Transport(Protocol):
    def read(self, name: str, offset: int = 0) -> FileStream:
        """Read file `name` from `offset` on, or from its start if the server cannot resume. Raises FetchFailed."""
        ...


class TransferLimiter:
    """Rate limit and timeouts of a transfer. For the main thread only: it uses the alarm signal."""

    def __init__(self, timeout_s: float, max_rate: int | None, stall_timeout_s: float = STALL_TIMEOUT_S) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._max_rate, self._stall_timeout_s = max_rate, stall_timeout_s
        self.chunk_bytes = _CHUNK_BYTES if max_rate is None else max(512, min(_CHUNK_BYTES, max_rate))
        self._stall_left_s, self._bytes_since_reset = stall_timeout_s, 0
        self._next_read_s = time.monotonic()

    @contextlib.contextmanager
    def enforce_timeout(self) -> Iterator[None]:
        """Interrupt a block that waits for the server too long. Raises FetchFailed."""
        start_s = time.monotonic()
        rest_s = self._deadline_s - start_s
        if rest_s <= 0:
            raise self._timeout_error()
        before = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, min(self._stall_left_s, rest_s)))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._stall_left_s -= time.monotonic() - start_s

    def throttle(self, count: int) -> None:
        """Count received bytes and sleep if they exceed the rate."""
        self._bytes_since_reset += count
        if self._bytes_since_reset >= MIN_STALL_BYTES:
            self.reset()
        if self._max_rate is not None:
            self._next_read_s = max(self._next_read_s, time.monotonic() - 1) + count / self._max_rate
            time.sleep(max(0.0, self._next_read_s - time.monotonic()))

    def reset(self) -> None:
        self._stall_left_s, self._bytes_since_reset = self._stall_timeout_s, 0

    def _on_alarm(self, _signal: int, _frame: FrameType | None) -> None:
        if time.monotonic() >= self._deadline_s:
            raise self._timeout_error()
        raise FetchFailed(
            "SlowRetrievalError",
            f"the server sent fewer than {MIN_STALL_BYTES} bytes in {self._stall_timeout_s:g} s; connection closed",
        )

    def _timeout_error(self) -> FetchFailed:
        return FetchFailed("Timeout", "the fetch did not finish in its time limit; the bytes so far are kept")


class HttpTransport:
    """A repository behind http or https, over one connection. Close it."""

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
            # A short body is read to its end, so that the connection can be used again.
            with _map_errors(self._url), self._limiter.enforce_timeout():
                response.read(_ERROR_BODY_BYTES)
            if not response.isclosed():
                self.close()
            if response.status == 416 and offset:
                return self.read(name)
            if response.status in _MISSING_STATUSES:
                raise RemoteFileMissing(name, response.status)
            raise FetchFailed("DownloadHTTPError", self._describe_refusal(name, response))
        if response.status == 200:
            offset = 0
        else:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != offset or not offset:
                self.close()
                raise FetchFailed("DownloadError", f"{name}: the server sent another range than the requested one")
        return FileStream(offset, self._iter_chunks(name, response))

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
                # Unread bytes would be taken for the next response.
                self.close()

    def _describe_refusal(self, name: str, response: http.client.HTTPResponse) -> str:
        if response.status in (301, 302, 303, 307, 308):
            location = response.headers.get("Location", "")[:200]
            return (
                f"{name}: the server redirects to {location!r} ({response.status}), which is not followed; if the "
                "repository is there, set [updates] url"
            )
        reason = f" {response.reason[:80]!r}" if response.reason else ""
        return f"{name}: the server answers {response.status}{reason}"


class FolderTransport:
    """A repository in a local folder, such as a USB stick."""

    def __init__(self, folder: Path, limiter: TransferLimiter) -> None:
        self._folder, self._limiter = folder, limiter

    def read(self, name: str, offset: int = 0) -> FileStream:
        parts = _split_name(name)
        with _map_errors(f"{self._folder}: is the medium mounted? {name}"):
            opened = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            opened = self._open_child(opened, part, name)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise FetchFailed("DownloadError", f"{self._folder}: {name} is not a regular file")
        os.lseek(opened, offset, os.SEEK_SET)
        return FileStream(offset, self._iter_chunks(opened, name))

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _open_child(self, folder: int, part: str, name: str) -> int:
        try:
            # O_NONBLOCK: opening a FIFO must not block.
            return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            raise RemoteFileMissing(name) from None
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
    """Open the transport for `url`, or for a folder. Raises FetchFailed."""
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
        text = str(error) or type(error).__name__
        raise FetchFailed("DownloadError", f"{subject}: {text[:300]}") from error
