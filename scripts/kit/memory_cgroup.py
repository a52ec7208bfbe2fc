"""Memory cgroup of one process and its children, of version 1 or 2; see cgroups(7). Only root may make one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from outstation.workbench.testing.patience import wait_until

_ROOT = Path("/sys/fs/cgroup")
# Where the memory controller is, with the files of its limit and of its largest use.
_VERSIONS = (
    (_ROOT / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (_ROOT, "memory.max", "memory.peak"),
)


class MemoryCgroup:
    """A group with a limit. `prefix` starts a command in it."""

    def __init__(self, folder: Path, peak_file: str) -> None:
        self.folder, self._peak_file = folder, peak_file
        self.prefix = ("/bin/sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")

    def peak_bytes(self) -> int:
        return int((self.folder / self._peak_file).read_text(encoding="ascii"))

    def pids(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text(encoding="ascii").split()]


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a group with a limit, and remove it once it is empty. Raises OSError where none can be made."""
    group = _make_group(limit_bytes)
    try:
        yield group
    finally:
        wait_until(f"{group.folder} is empty", lambda: _remove(group.folder))


def _make_group(limit_bytes: int) -> MemoryCgroup:
    for root, limit_file, peak_file in _VERSIONS:
        folder = root / f"outstation-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                # Only a kernel's folder has the file.
                with (folder / limit_file).open("r+", encoding="ascii") as file:
                    file.write(str(limit_bytes))
                return MemoryCgroup(folder, peak_file)
            except OSError:
                folder.rmdir()
    raise OSError("no memory cgroup can be made: this needs root, and cgroups of version 1 or 2 with `memory`")


def _remove(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
