"""Model process by fork: it shares what this process has imported, and gets neither its open files nor its environment.

The process forks before it reads a config or a key. A fork of a process with threads would hold their locks for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from typing import IO, NoReturn

_FIRST_FREE = 3
# Fields of proc_pid_stat(5), counted from the one behind the name: where the environment is.
_STATUS, _ENVIRONMENT_BEGIN, _ENVIRONMENT_END = "/proc/self/stat", 47, 48


def can_fork() -> bool:
    """Return True if this process has one thread only."""
    return len(os.listdir("/proc/self/task")) == 1


class ForkedChild:
    """Child with pipes, as far as `subprocess.Popen` has the same for a model process."""

    def __init__(self, run: Callable[[], object], files: tuple[int, ...]) -> None:
        """Start a child that has `files` and its pipes only, calls `run` and ends. Raises OSError."""
        ends: list[int] = []
        try:
            for _ in range(3):
                ends += os.pipe()
            self.pid = os.fork()
        except OSError:
            for fd in ends:
                os.close(fd)
            raise
        if self.pid == 0:
            _run_child(run, (ends[0], ends[3], ends[5]), files)
        for fd in (ends[0], ends[3], ends[5]):
            os.close(fd)
        self.stdin: IO[bytes] = os.fdopen(ends[1], "wb", 0)
        self.stdout: IO[bytes] = os.fdopen(ends[2], "rb", 0)
        self.stderr: IO[bytes] = os.fdopen(ends[4], "rb", 0)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:
                # The parent process has it ignore SIGCHLD: the kernel keeps no exit codes.
                pid, status = self.pid, 0
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _run_child(run: Callable[[], object], pipes: tuple[int, int, int], files: tuple[int, ...]) -> NoReturn:
    code = 1
    try:
        _move_pipes(pipes)
        _close_all_but(files)
        _erase_environment()
        run()
        code = 0
    except BaseException:
        import traceback

        os.write(2, traceback.format_exc().encode(errors="replace"))
    finally:
        # Without what this process has registered for its own end.
        os._exit(code)


def _move_pipes(pipes: tuple[int, int, int]) -> None:
    """Make the pipes the standard streams, whatever number they have."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for fd in pipes]
    for number, fd in enumerate(moved):
        os.dup2(fd, number)


def _close_all_but(files: tuple[int, ...]) -> None:
    # By name: where the limit of open files is high, to close all numbers up to it would take long.
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd >= _FIRST_FREE and fd not in files:
            # The list itself had a file.
            with contextlib.suppress(OSError):
                os.close(fd)


def _erase_environment() -> None:
    """Overwrite the environment in this process's memory: a variable may hold a password."""
    with open(_STATUS, encoding="utf-8", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    begin, end = int(fields[_ENVIRONMENT_BEGIN]), int(fields[_ENVIRONMENT_END])
    if begin >= end:
        # A kernel that does not tell where: the first model's process is then started by exec.
        raise OSError(f"{_STATUS} does not have the place of the environment")
    ctypes.memset(begin, 0, end - begin)
    for copy in [text for item in os.environ._data.items() for text in item]:  # type: ignore[attr-defined]
        # Python shares objects of one byte.
        if len(copy) > 1:
            ctypes.memset(id(copy) + sys.getsizeof(b"") - 1, 0, len(copy))
    os.environ._data.clear()  # type: ignore[attr-defined]
