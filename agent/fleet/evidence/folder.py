"""Writing a folder: under another name until all of it is on the disk, so that no half of one is ever found."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from agent import durable_files
from agent.errors import StorageError, StorageFull, UsageError
from agent.fleet.evidence.manifest import MANIFEST_FILE, SIGNATURE_FILE, FileEntry


class FolderWriter:
    """A folder that becomes `out` when it is finished. Raises UsageError where something is there already."""

    def __init__(self, out: Path) -> None:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise UsageError(f"--out {out}: is there already; name a new folder, evidence is never written over")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out {out}: its parent folder is not there; make it first")
        self.out = out
        self._staging = out.with_name(f".{out.name}.new")
        self.files: list[FileEntry] = []
        try:
            # What a making that was killed has left.
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(mode=0o755)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from None

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> None:
        """A file of the folder, which the manifest will list."""
        size, sum_ = 0, hashlib.sha256()
        try:
            target = self._staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for part in (parts,) if isinstance(parts, bytes) else parts:
                    file.write(part)
                    sum_.update(part)
                    size += len(part)
                durable_files.flush(file)
        except OSError as error:
            kind = StorageFull if error.errno == 28 else StorageError
            raise kind(f"{self.out}: {path} cannot be written: {error.strerror}; nothing was left there") from None
        if path not in (MANIFEST_FILE, SIGNATURE_FILE):
            self.files.append(FileEntry(path, size, sum_.hexdigest()))

    def commit(self) -> None:
        """All of it is on the disk, and has its name."""
        try:
            for folder in [path for path in self._staging.rglob("*") if path.is_dir()] + [self._staging]:
                durable_files.fsync(folder)
            if self.out.exists():
                self.out.rmdir()
            self._staging.rename(self.out)
            durable_files.fsync(self.out.absolute().parent)
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be finished: {error.strerror}") from None

    def discard(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
