"""Memory of this process: what it takes by `/proc`, and a limit on what it may take."""

from __future__ import annotations

import resource
from pathlib import Path


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the peak of resident bytes. Not from getrusage, which includes the parent's before exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def limit_growth(more_bytes: int) -> None:
    """Let the address space grow by `more_bytes` only, and write no core file."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
