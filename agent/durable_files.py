"""Files that are there whole or not at all, and still there after a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from agent.errors import StorageError, StorageFull
from agent.wire.keys import write_new


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Put `data` at `path`, whatever was there. Raises StorageError; then what was there is still there."""
    new = path.with_name(path.name + ".new")
    try:
        make_folder(path.parent)
        # Anew, and never through a link that somebody laid there.
        new.unlink(missing_ok=True)
        write_new(new, data, mode)
        os.replace(new, path)
        fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: cannot be written: {error.strerror}; make room, or see who owns the folder") from error


def make_folder(path: Path) -> None:
    """With its parents, each of which is told on disk of the next."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def rename(source: Path, target: Path) -> None:
    """A file that is on disk already."""
    os.replace(source, target)
    fsync_folder(target.parent)


def remove(path: Path) -> None:
    """Raises StorageError where it stays."""
    try:
        path.unlink(missing_ok=True)
        fsync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror}; see who owns it and its folder") from error


def fsync_folder(folder: Path) -> None:
    """What a folder lists is on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
