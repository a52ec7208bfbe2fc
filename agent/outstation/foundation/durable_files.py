"""Durable files: written whole or not at all, and still there after a power cut.

A file is written under another name, flushed, renamed into place, and its folder is flushed (fsync(2), rename(2)).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from outstation.foundation.errors import StorageError, StorageFull


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path`, which one process at a time can.

    Raises BlockingIOError if it is taken and `wait` is False, and OSError if it cannot be opened.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(file)


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace the file at `path` by `data`. Raises StorageError; the old file is then unchanged.

    A device such as /dev/null, a pipe or a folder is not replaced.
    """
    new = path.with_name(path.name + ".new")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        make_folder(path.parent)
        # Removed first: never written through a link that another user left under this name.
        new.unlink(missing_ok=True)
        write_new(new, data, mode)
        rename(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"{path}: cannot be written: {error.strerror}; make room, or see who owns the folder") from error


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist yet; its folder is not flushed. Raises FileExistsError, OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        flush(file)


def flush(file: IO[Any]) -> None:
    """Put everything written to an open file on the disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Put a closed file's data, or the names that a folder lists, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a file that was flushed, or a folder, durably within its folder. Raises OSError."""
    os.replace(source, target)
    fsync(target.parent)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, each durable in the one above it. Raises OSError."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def remove(path: Path) -> None:
    """Remove a file durably. Raises StorageError if it stays."""
    try:
        path.unlink(missing_ok=True)
        fsync(path.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be removed: {error.strerror}; see who owns it and its folder") from error
