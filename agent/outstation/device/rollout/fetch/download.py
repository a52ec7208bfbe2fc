"""Resumable download of one archive. Bytes that arrived stay on the disk, whatever ends the download.

Rules:
- `<sha256>.part` grows and is synced every SYNC_INTERVAL_BYTES. At full length, and with the signed SHA-256, it is
  synced and renamed to `<sha256>.zip`; no other file gets that name
- an existing part is resumed; if the whole then has another SHA-256, the download starts over, once
- more bytes than were signed end the download, and nothing is kept
- one `.part` at a time, and the last MAX_OTHER_ARCHIVES other archives, are kept
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

from outstation.device.rollout.fetch.protocol import SignedTarget
from outstation.device.rollout.fetch.transport import Transport
from outstation.foundation import durable_files
from outstation.foundation.errors import FetchFailed

SYNC_INTERVAL_BYTES = 1 << 20
MAX_OTHER_ARCHIVES = 2


class Download:
    """Download of `target` into `folder`; the transport calls it `name`. `received` counts new bytes."""

    def __init__(self, transport: Transport, name: str, target: SignedTarget, folder: Path) -> None:
        self._transport, self._name, self._target, self._folder = transport, name, target, folder
        self._part, self._archive = folder / f"{target.sha256}.part", folder / f"{target.sha256}.zip"
        self.received = 0

    @property
    def missing_bytes(self) -> int:
        if self._archive.exists():
            return 0
        return max(0, self._target.length - (self._part.stat().st_size if self._part.exists() else 0))

    def run(self) -> Path:
        """Return the verified archive, durable on the disk. Raises FetchFailed."""
        with _map_disk_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            for part in self._folder.glob("*.part"):
                if part != self._part:
                    part.unlink()
            others = [path for path in self._folder.glob("*.zip") if path != self._archive]
            for path in sorted(others, key=lambda path: path.stat().st_mtime_ns)[:-MAX_OTHER_ARCHIVES]:
                path.unlink()
            if self._archive.exists():
                if self._is_valid(self._archive):
                    return self._archive
                self._archive.unlink()
            resumed = self._part.exists()
            self._download_rest()
            if not self._is_valid(self._part) and resumed:
                # A power cut may have damaged the unsynced tail of the part.
                self._part.unlink()
                self._download_rest()
            if not self._is_valid(self._part):
                self._part.unlink()
                raise FetchFailed(
                    "LengthOrHashMismatchError",
                    f"{self._target.path}: the downloaded bytes are not the signed ones; nothing is kept",
                )
            durable_files.fsync(self._part)
            durable_files.rename(self._part, self._archive)
        return self._archive

    def _download_rest(self) -> None:
        """Download until the part is as long as the target. Raises FetchFailed."""
        with self._part.open("ab") as file:
            have = file.tell()
            if have > self._target.length:
                file.truncate(have := 0)
            if have == self._target.length:
                return
            stream = self._transport.read(self._name, have)
            if stream.start < have:
                file.truncate(have := 0)
            offset = have
            synced = offset
            try:
                for chunk in stream.chunks:
                    offset += len(chunk)
                    self.received += len(chunk)
                    if offset > self._target.length:
                        self._part.unlink()
                        raise FetchFailed(
                            "DownloadLengthMismatchError",
                            f"{self._target.path}: the server sent more than the {self._target.length} signed bytes",
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

    def _is_valid(self, path: Path) -> bool:
        if path.stat().st_size != self._target.length:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self._target.sha256


@contextlib.contextmanager
def _map_disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise FetchFailed("DiskFull", f"the disk is full ({error.strerror}); the bytes so far are kept") from error
        raise
