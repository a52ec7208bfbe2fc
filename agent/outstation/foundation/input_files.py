"""Input files that a person or a config names: opened without waiting, and read within a bound.

A name can lead to a folder, a pipe that nobody writes, an endless device or a file of the kernel. Each becomes an
OSError with a reason and the name, before anything is read.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from outstation.foundation.errors import UsageError, explain

MAX_BYTES = 256 << 20
# For a device whose config names none.
DATA_DIR = "/var/lib/outstation"
_PIPE_WAIT_MS = 10_000
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def find_config(explicit: str | None) -> Path:
    """Return a device's config file: `explicit`, `$OUTSTATION_CONFIG`, `./outstation.toml`, then `/etc/outstation/`."""
    if explicit or os.environ.get("OUTSTATION_CONFIG"):
        return Path(explicit or os.environ["OUTSTATION_CONFIG"])
    here = Path("outstation.toml")
    return here if here.exists() else Path("/etc/outstation/outstation.toml")


def open_regular(path: Path) -> BufferedReader[Any]:
    """Open a regular file. Raises OSError for everything else."""
    file = _open(path)
    try:
        _require_regular(path, os.fstat(file.fileno()))
    except OSError:
        file.close()
        raise
    return file


def require_regular(path: Path) -> None:
    """Raise OSError if something else than a regular file is at `path`, before a library waits for it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    _require_regular(path, status)


def _require_regular(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'of another kind')}, where a file is needed", str(path))


def open_stream(path: Path) -> BufferedReader[Any]:
    """Open a file, a pipe or a device that is read once from its beginning. Raises OSError.

    A named pipe that nobody opens for writing within 10 s is an error, not a reason to wait for ever.
    """
    file = _open(path)
    if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        poll = select.poll()
        poll.register(file, select.POLLIN)
        if not poll.poll(_PIPE_WAIT_MS):
            file.close()
            raise OSError(errno.ETIMEDOUT, "is a pipe that nobody writes to", str(path))
    os.set_blocking(file.fileno(), True)
    return file


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file. Raises OSError, also if it is larger than `max_bytes`."""
    with open_regular(path) as file:
        try:
            data: bytes = file.read(max_bytes + 1)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"is larger than {max_bytes:,} bytes", str(path))
    return data


def read_input(path: Path, max_bytes: int = MAX_BYTES, *, hint: str = "") -> bytes:
    """Return the content of a file that a person named. Raises UsageError, with `hint` at its end."""
    try:
        return read_bytes(path, max_bytes)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {explain(error)}{hint and f'; {hint}'}") from None


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a regular file. Raises OSError, and UnicodeDecodeError."""
    return read_bytes(path).decode(encoding)


def data_ranges(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each part of a file that is no hole, on file systems that know holes (lseek(2))."""
    end = os.fstat(file.fileno()).st_size
    at = 0
    while at < end:
        try:
            begin = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                yield at, end
            return
        at = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        yield begin, at


def _open(path: Path) -> BufferedReader[Any]:
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return os.fdopen(descriptor, "rb")
