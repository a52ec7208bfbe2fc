"""Files that are there whole or not at all, and still there after a power cut."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from agent.errors import StorageError, StorageFull


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path`, whatever was there. Raises StorageError; then what was there is still there."""
    new = path.with_name(path.name + ".new")
    try:
        make_folder(path.parent)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _sync(path.parent)
    except OSError as error:
        new.unlink(missing_ok=True)
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: cannot be written: {error.strerror}; make room, or see who owns the folder") from error


def make_folder(path: Path) -> None:
    """With its parents, each of which is told on disk of the next."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """A file that is on disk already."""
    os.replace(source, target)
    _sync(target.parent)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
