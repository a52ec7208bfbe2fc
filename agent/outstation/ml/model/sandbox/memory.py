"""Memory of this process: what it takes by `/proc`, and a limit on what it may take.

Files stay open after their first use, because a confined process cannot open them again.
"""

from __future__ import annotations

import functools
import os
import resource


def resident_bytes() -> int:
    return int(_read("statm").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the peak of resident bytes. Not from getrusage, which includes the parent's before exec."""
    lines = _read("status").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(b"VmHWM:")), 0)


def limit_growth(more_bytes: int) -> None:
    """Let the address space grow by `more_bytes` only, and write no core file."""
    pages = int(_read("statm").split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(name: str) -> bytes:
    return os.pread(_open(name), 1 << 16, 0)


@functools.cache
def _open(name: str) -> int:
    return os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC)
