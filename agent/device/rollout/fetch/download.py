"""One archive, piece by piece: what has come is on the disk and is gone on with, whatever ends a download.

Rules:
- `<sha256>.part` grows, synced each SYNC_EVERY bytes; of full length and with the signed SHA-256 it is synced and
  renamed to `<sha256>.zip`, and only such a file has that name
- what was left by an earlier try is gone on with; should the whole not have the SHA-256 then, it begins anew, once
- more bytes than were signed end it, and nothing is kept of them
- one `.part` at a time, and of other archives the last OTHERS
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from agent.device.rollout.fetch.protocol import Target
from agent.device.rollout.fetch.transport import Source
from agent.errors import FetchFailed

SYNC_EVERY = 1 << 20
OTHERS = 2
_BLOCK = 1 << 18


class Download:
    """Of `target`, which the source has as `name`, to folder `into`. `received` counts what came now."""

    def __init__(self, source: Source, name: str, target: Target, into: Path) -> None:
        self._source, self._name, self._target, self._into = source, name, target, into
        self._part, self._whole = into / f"{target.sha256}.part", into / f"{target.sha256}.zip"
        self.received = 0

    @property
    def missing(self) -> int:
        """Bytes that have to come still."""
        if self._whole.exists():
            return 0
        return max(0, self._target.length - (self._part.stat().st_size if self._part.exists() else 0))

    def run(self) -> Path:
        """The archive, verified and on the disk. Raises FetchFailed."""
        with _full():
            self._into.mkdir(parents=True, exist_ok=True)
            self._prune()
            if self._whole.exists():
                if self._is_right(self._whole):
                    return self._whole
                self._whole.unlink()
            resumed = self._part.exists()
            self._fill()
            if not self._is_right(self._part) and resumed:
                # Its tail may not have come through a power cut.
                self._part.unlink()
                self._fill()
            if not self._is_right(self._part):
                self._part.unlink()
                raise FetchFailed(
                    "LengthOrHashMismatchError",
                    f"{self._target.path}: what came is not what was signed; nothing is kept",
                )
            self._finish()
        return self._whole

    def _fill(self) -> None:
        """Until the part is as long as the target. Raises FetchFailed."""
        with self._part.open("ab") as file:
            have = file.tell()
            if have > self._target.length:
                file.truncate(have := 0)
            if have == self._target.length:
                return
            reading = self._source.read(self._name, have)
            if reading.start < have:
                file.truncate(have := 0)
            self._copy(file, reading.chunks, have)

    def _copy(self, file: IO[bytes], chunks: Iterator[bytes], have: int) -> None:
        synced = have
        try:
            for chunk in chunks:
                have += len(chunk)
                self.received += len(chunk)
                if have > self._target.length:
                    self._part.unlink()
                    raise FetchFailed(
                        "DownloadLengthMismatchError",
                        f"{self._target.path}: more than the {self._target.length} bytes came that were signed",
                    )
                file.write(chunk)
                if have >= synced + SYNC_EVERY:
                    _sync(file)
                    synced = have
        finally:
            _sync(file)
        if have < self._target.length:
            raise FetchFailed(
                "DownloadError",
                f"{self._target.path}: it ended after {have} of {self._target.length} bytes, which are kept",
            )

    def _finish(self) -> None:
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        self._part.rename(self._whole)
        folder = os.open(self._into, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _is_right(self, path: Path) -> bool:
        if path.stat().st_size != self._target.length:
            return False
        found = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
        return found.hexdigest() == self._target.sha256

    def _prune(self) -> None:
        for part in self._into.glob("*.part"):
            if part != self._part:
                part.unlink()
        others = [path for path in self._into.glob("*.zip") if path != self._whole]
        for path in sorted(others, key=lambda one: one.stat().st_mtime_ns)[:-OTHERS]:
            path.unlink()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """The disk's errors by a name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FetchFailed("NoSpace", f"the disk is full ({error.strerror}); what came so far is kept") from error
        raise
