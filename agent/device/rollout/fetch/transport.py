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

from agent.device.rollout.fetch.protocol import LEAST_BYTES, PATIENCE_S
from agent.errors import FetchFailed

_CHUNK = 65_536
_FEW = 8_192
_MISSING = frozenset({403, 404, 410})
_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(?:\d{1,15}|\*)", re.ASCII)


class Missing(FetchFailed):
    """The repository has no such file."""

    def __init__(self, name: str, status: int = 404) -> None:
        super().__init__("DownloadHTTPError", f"{name}: the repository has no such file ({status})")
        self.status = status


class Reading(msgspec.Struct, frozen=True):
    """Chunks of a file from byte `start` on; not to be mixed with another reading of the same source."""

    start: int
    chunks: Iterator[bytes]


class Source(Protocol):
    def read(self, name: str, offset: int = 0) -> Reading:
        """File `name`, from `offset` on or, where that cannot be had, from its beginning. Raises FetchFailed."""
        ...


class Pace:
    """Watches a transfer. Only for the main thread: it needs the alarm signal."""

    def __init__(self, seconds: float, max_rate: int | None, patience_s: float = PATIENCE_S) -> None:
        self._end_s = time.monotonic() + seconds
        self._rate, self._patience_s = max_rate, patience_s
        self.chunk = _CHUNK if max_rate is None else max(512, min(_CHUNK, max_rate))
        self._left_s, self._since = patience_s, 0
        self._free_s = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for the other end. Raises FetchFailed."""
        begun_s = time.monotonic()
        rest_s = self._end_s - begun_s
        if rest_s <= 0:
            raise self._over()
        before = signal.signal(signal.SIGALRM, self._ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.001, min(self._left_s, rest_s)))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._left_s -= time.monotonic() - begun_s

    def got(self, count: int) -> None:
        """So many bytes came; waits where they came too fast."""
        self._since += count
        if self._since >= LEAST_BYTES:
            self.anew()
        if self._rate is not None:
            self._free_s = max(self._free_s, time.monotonic() - 1) + count / self._rate
            time.sleep(max(0.0, self._free_s - time.monotonic()))

    def anew(self) -> None:
        """Another request begins, or enough has come."""
        self._left_s, self._since = self._patience_s, 0

    def _ring(self, _signal: int, _frame: FrameType | None) -> None:
        if time.monotonic() >= self._end_s:
            raise self._over()
        raise FetchFailed(
            "SlowRetrievalError",
            f"less than {LEAST_BYTES} bytes came in {self._patience_s:g} s; the connection is given up",
        )

    def _over(self) -> FetchFailed:
        return FetchFailed("TimeOver", "it was not done in the time a fetch may take; what came so far is kept")


class WebSource:
    """A repository behind http or https; one connection for all of it. `close` it."""

    def __init__(self, url: str, ca_file: str | None, pace: Pace) -> None:
        parts = urlsplit(url)
        self._path, self._pace, self._url = parts.path.rstrip("/"), pace, url
        host, port = parts.hostname or "", parts.port
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            with _translated(f"[updates] ca_file {ca_file}"):
                context = ssl.create_default_context(cafile=ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._connection = http.client.HTTPSConnection(host, port, timeout=PATIENCE_S, context=context)
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_S)

    def read(self, name: str, offset: int = 0) -> Reading:
        path = "/".join([self._path, *(quote(part, safe="") for part in _parts(name))])
        response = self._answer(path, offset)
        if response.status not in (200, 206):
            self._pass_over(response)
            if response.status == 416 and offset:
                return self.read(name)
            if response.status in _MISSING:
                raise Missing(name, response.status)
            raise FetchFailed("DownloadHTTPError", self._refusal(name, response))
        return Reading(self._start(name, response, offset), self._chunks(name, response))

    def close(self) -> None:
        self._connection.close()

    def _answer(self, path: str, offset: int) -> http.client.HTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "outstation"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        reused = self._connection.sock is not None
        self._pace.anew()
        try:
            with _translated(self._url), self._pace.waiting():
                self._connection.request("GET", path, headers=headers)
                return self._connection.getresponse()
        except FetchFailed as failure:
            self.close()
            # A server may have closed a connection that was idle for a moment.
            if reused and isinstance(failure.__cause__, ConnectionError | http.client.HTTPException):
                return self._answer(path, offset)
            raise

    def _pass_over(self, response: http.client.HTTPResponse) -> None:
        """The words beside an error; the connection stays, where they are few."""
        with _translated(self._url), self._pace.waiting():
            response.read(_FEW)
        if not response.isclosed():
            self.close()

    def _start(self, name: str, response: http.client.HTTPResponse, offset: int) -> int:
        if response.status == 200:
            return 0
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != offset or not offset:
            self.close()
            raise FetchFailed("DownloadError", f"{name}: the server answers with another part than it was asked for")
        return offset

    def _chunks(self, name: str, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while True:
                with _translated(f"{self._url}: {name}"), self._pace.waiting():
                    data = response.read1(self._pace.chunk)
                if not data:
                    return
                self._pace.got(len(data))
                yield data
        finally:
            if not response.isclosed():
                # What is left of it would be taken for the next answer.
                self.close()

    def _refusal(self, name: str, response: http.client.HTTPResponse) -> str:
        if response.status in (301, 302, 303, 307, 308):
            to = response.headers.get("Location", "")[:200]
            return (
                f"{name}: the server redirects to {to!r} ({response.status}), which is not followed; if that is where "
                "the repository is, give it as [updates] url"
            )
        return f"{name}: the server answers {response.status} {response.reason[:80]!r}"


class FolderSource:
    """A repository in a folder of this machine, which may be a stick."""

    def __init__(self, folder: Path, pace: Pace) -> None:
        self._folder, self._pace = folder, pace

    def read(self, name: str, offset: int = 0) -> Reading:
        parts = _parts(name)
        with _translated(f"{self._folder}: is the stick there? {name}"):
            opened = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            opened = self._step(opened, part, name)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise FetchFailed("DownloadError", f"{self._folder}: {name} is no plain file")
        os.lseek(opened, offset, os.SEEK_SET)
        return Reading(offset, self._chunks(opened, name))

    def close(self) -> None:
        """Nothing is held."""

    def _step(self, folder: int, part: str, name: str) -> int:
        try:
            # O_NONBLOCK: a pipe in the way must not hold us.
            return os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            raise Missing(name) from None
        except OSError as error:
            raise FetchFailed("DownloadError", f"{self._folder}: {name}: {error.strerror}") from error
        finally:
            os.close(folder)

    def _chunks(self, opened: int, name: str) -> Iterator[bytes]:
        try:
            while True:
                with _translated(f"{self._folder}: {name}"), self._pace.waiting():
                    data = os.read(opened, self._pace.chunk)
                if not data:
                    return
                self._pace.got(len(data))
                yield data
        finally:
            os.close(opened)


def of(url: str, ca_file: str | None, pace: Pace) -> WebSource | FolderSource:
    """Raises FetchFailed."""
    return WebSource(url, ca_file, pace) if "://" in url else FolderSource(Path(url), pace)


def _parts(name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise FetchFailed("DownloadError", f"{name!r} leads out of the repository")
    return parts


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        said = str(error) or type(error).__name__
        raise FetchFailed("DownloadError", f"{what}: {said[:300]}") from error
