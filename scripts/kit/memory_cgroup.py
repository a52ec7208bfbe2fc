"""Memory cgroup of one process and its children, of version 1 or 2; see cgroups(7). Only root may make one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from agent.testing.process import MissingProgram, wait_until

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
    """Make a group with a limit, and remove it once it is empty. Raises MissingProgram where none can be made."""
    for root, limit_file, peak_file in _VERSIONS:
        folder = root / f"outstation-{os.getpid()}-{time.monotonic_ns()}"
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                (folder / limit_file).write_text(str(limit_bytes), encoding="ascii")
            except OSError:
                folder.rmdir()
                raise
            break
    else:
        raise MissingProgram("no memory cgroup can be made here; run the test as root on a machine with cgroups")
    try:
        yield MemoryCgroup(folder, peak_file)
    finally:
        wait_until(f"{folder} is empty", lambda: _remove(folder))


def _remove(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()
