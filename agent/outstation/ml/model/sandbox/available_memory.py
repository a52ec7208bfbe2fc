"""Available memory: what the machine and the memory cgroups of this process still give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def available_bytes() -> int:
    """Return the bytes that processes beside this one may still take: of the machine, and of the memory cgroups."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    available = next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:")), 0)
    return min([available, *_iter_cgroup_bytes()])


def _iter_cgroup_bytes() -> Iterator[int]:
    """Yield the bytes left in each memory cgroup of this process, of version 1 or 2; see cgroups(7)."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, limit, usage = (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (Path("/sys/fs/cgroup"), "memory.max", "memory.current")
        )
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            # Files that cannot be read, and the word "max", are no limit.
            with contextlib.suppress(OSError, ValueError):
                left = int((group / limit).read_text("ascii")) - int((group / usage).read_text("ascii"))
                yield max(0, left + _reclaimable_bytes(group / "memory.stat"))


def _reclaimable_bytes(statistics: Path) -> int:
    """Return the bytes of cached files, which the kernel drops before it refuses memory."""
    lines = (line.split() for line in statistics.read_text(encoding="ascii").splitlines())
    return next((int(count) for name, count in lines if name in ("inactive_file", "total_inactive_file")), 0)
