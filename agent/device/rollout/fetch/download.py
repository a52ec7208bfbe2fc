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
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from agent import durable_files
from agent.device.rollout.fetch.protocol import SignedTarget
from agent.device.rollout.fetch.transport import Transport
from agent.errors import FetchFailed

SYNC_INTERVAL_BYTES = 1 << 20
MAX_OTHER_ARCHIVES = 2
_HASH_BLOCK_BYTES = 1 << 18


class Download:
    """Of `target`, which the source has as `name`, to folder `into`. `received` counts what came now."""

    def __init__(self, transport: Transport, name: str, target: SignedTarget, folder: Path) -> None:
        self._transport, self._name, self._target, self._folder = transport, name, target, folder
        self._part, self._archive = folder / f"{target.sha256}.part", folder / f"{target.sha256}.zip"
        self.received = 0

    @property
    def missing_bytes(self) -> int:
        """Bytes that have to come still."""
        if self._archive.exists():
            return 0
        return max(0, self._target.length - (self._part.stat().st_size if self._part.exists() else 0))

    def run(self) -> Path:
        """The archive, verified and on the disk. Raises FetchFailed."""
        with _map_disk_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._prune()
            if self._archive.exists():
                if self._is_valid(self._archive):
                    return self._archive
                self._archive.unlink()
            resumed = self._part.exists()
            self._download_rest()
            if not self._is_valid(self._part) and resumed:
                # Its tail may not have come through a power cut.
                self._part.unlink()
                self._download_rest()
            if not self._is_valid(self._part):
                self._part.unlink()
                raise FetchFailed(
                    "LengthOrHashMismatchError",
                    f"{self._target.path}: what came is not what was signed; nothing is kept",
                )
            self._rename_complete()
        return self._archive

    def _download_rest(self) -> None:
        """Until the part is as long as the target. Raises FetchFailed."""
        with self._part.open("ab") as file:
            have = file.tell()
            if have > self._target.length:
                file.truncate(have := 0)
            if have == self._target.length:
                return
            reading = self._transport.read(self._name, have)
            if reading.start < have:
                file.truncate(have := 0)
            self._copy(file, reading.chunks, have)

    def _copy(self, file: IO[bytes], chunks: Iterator[bytes], offset: int) -> None:
        synced = offset
        try:
            for chunk in chunks:
                offset += len(chunk)
                self.received += len(chunk)
                if offset > self._target.length:
                    self._part.unlink()
                    raise FetchFailed(
                        "DownloadLengthMismatchError",
                        f"{self._target.path}: more than the {self._target.length} bytes came that were signed",
                    )
                file.write(chunk)
                if offset >= synced + SYNC_INTERVAL_BYTES:
                    durable_files.flush(file)
                    synced = offset
        finally:
            durable_files.flush(file)
        if offset < self._target.length:
            raise FetchFailed(
                "DownloadError",
                f"{self._target.path}: it ended after {offset} of {self._target.length} bytes, which are kept",
            )

    def _rename_complete(self) -> None:
        durable_files.fsync(self._part)
        durable_files.rename(self._part, self._archive)

    def _is_valid(self, path: Path) -> bool:
        if path.stat().st_size != self._target.length:
            return False
        found = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                found.update(block)
        return found.hexdigest() == self._target.sha256

    def _prune(self) -> None:
        for part in self._folder.glob("*.part"):
            if part != self._part:
                part.unlink()
        others = [path for path in self._folder.glob("*.zip") if path != self._archive]
        for path in sorted(others, key=lambda one: one.stat().st_mtime_ns)[:-MAX_OTHER_ARCHIVES]:
            path.unlink()


@contextlib.contextmanager
def _map_disk_errors() -> Iterator[None]:
    """The disk's errors by a name."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FetchFailed("NoSpace", f"the disk is full ({error.strerror}); what came so far is kept") from error
        raise
