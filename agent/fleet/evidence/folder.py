"""Writing a folder: under another name until all of it is on the disk, so that no half of one is ever found."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from agent import durable_files
from agent.errors import StorageError, StorageFull, UsageError
from agent.fleet.evidence.manifest import MANIFEST, TOKEN, File


class Draft:
    """A folder that becomes `out` when it is finished. Raises UsageError where something is there already."""

    def __init__(self, out: Path) -> None:
        if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise UsageError(f"--out {out}: is there already; name a new folder, evidence is never written over")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"--out {out}: its parent folder is not there; make it first")
        self.out = out
        self._home = out.with_name(f".{out.name}.new")
        self.files: list[File] = []
        try:
            # What a making that was killed has left.
            shutil.rmtree(self._home, ignore_errors=True)
            self._home.mkdir(mode=0o755)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be made: {error.strerror}") from None

    def write(self, path: str, parts: bytes | Iterable[bytes]) -> None:
        """A file of the folder, which the manifest will list."""
        size, sum_ = 0, hashlib.sha256()
        try:
            target = self._home / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                for part in (parts,) if isinstance(parts, bytes) else parts:
                    file.write(part)
                    sum_.update(part)
                    size += len(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kind = StorageFull if error.errno == 28 else StorageError
            raise kind(f"{self.out}: {path} cannot be written: {error.strerror}; nothing was left there") from None
        if path not in (MANIFEST, TOKEN):
            self.files.append(File(path, size, sum_.hexdigest()))

    def finish(self) -> None:
        """All of it is on the disk, and has its name."""
        try:
            for folder in [path for path in self._home.rglob("*") if path.is_dir()] + [self._home]:
                durable_files.sync(folder)
            if self.out.exists():
                self.out.rmdir()
            self._home.rename(self.out)
            durable_files.sync(self.out.absolute().parent)
        except OSError as error:
            raise StorageError(f"{self.out}: cannot be finished: {error.strerror}") from None

    def abandon(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
