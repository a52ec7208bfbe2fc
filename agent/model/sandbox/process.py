"""The child process that a model runs in: its pipes, its end, and the memory that both sides map.

Windows go over in that memory and outputs come back in it; a pipe each way says when. Who the child is, is told in
another piece of memory, so that starting it waits for nothing. It is killed by the kernel where its parent is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.model.sandbox import worker
from agent.model.sandbox.worker import REQUEST_HEADER, WorkerJob

Floats = NDArray[np.float32]

# Of what the child writes to stderr, the end.
_MAX_STDERR_BYTES = 4096
_PIPE_BYTES = 1 << 16
_PAGE = mmap.PAGESIZE


class WorkerExited(Exception):
    """The child hung up."""


class ModelProcess:
    """The child, its pipes and the memory it shares."""

    def __init__(self, job: WorkerJob) -> None:
        self._shared = SharedBuffer()
        try:
            with _memory_file("job", msgspec.msgpack.encode(job)) as given, _blocked_signals():
                self._child = subprocess.Popen(
                    # -P: an `agent` in the folder it happens to run in is not ours.
                    [sys.executable, "-P", "-m", worker.__name__, str(given), str(self._shared.fd)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(given, self._shared.fd),
                )
        except OSError:
            self._shared.close()
            raise
        self.pid, self.started_s = self._child.pid, time.monotonic()
        self._stdout, self._stderr = b"", b""
        self._selector = selectors.DefaultSelector()
        for pipe in (self._child.stdout, self._child.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def write_windows(self, windows: Floats, output_values: int) -> None:
        self._shared.grow(windows.size * 4 + output_values * 4)
        target = np.frombuffer(self._shared.map, np.float32, windows.size)
        np.copyto(target.reshape(windows.shape), windows)

    def read_outputs(self, offset_values: int, shape: tuple[int, int]) -> Floats:
        found = np.frombuffer(self._shared.map, np.float32, math.prod(shape), offset=offset_values * 4)
        return found.reshape(shape).copy()

    def submit(self, count: int) -> None:
        """Raises Gone."""
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), REQUEST_HEADER.pack(count, self._shared.size))
        except BrokenPipeError:
            raise WorkerExited from None

    def read(self, size: int, timeout_s: float) -> bytes | None:
        """The next `size` bytes; None where they are not there in time. Raises Gone at their end."""
        if len(self._stdout) < size:
            for key, _ in self._selector.select(max(0.0, timeout_s)):
                if key.fileobj is self._child.stderr:
                    self._read_stderr()
                else:
                    self._read_stdout()
        if len(self._stdout) < size:
            return None
        said, self._stdout = self._stdout[:size], self._stdout[size:]
        return said

    def kill(self) -> tuple[int, bytes]:
        """Kill it, where it still is; its exit code, and the end of what it wrote to stderr."""
        self._child.kill()
        code = self._child.wait()
        self._read_stderr()
        self._selector.close()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._shared.close()
        return code, self._stderr

    def _read_stdout(self) -> None:
        """Raises Gone at their end."""
        found = _read_available(self._child.stdout)
        if not found:
            raise WorkerExited
        self._stdout += found

    def _read_stderr(self) -> None:
        found, pipe = _read_available(self._child.stderr), self._child.stderr
        if not found and pipe is not None and pipe in self._selector.get_map():
            # At its end it would be ready for ever.
            self._selector.unregister(pipe)
        self._stderr = (self._stderr + found)[-_MAX_STDERR_BYTES:]


class SharedBuffer:
    """Memory that both map; it only grows, which the kernel sees to, so that no child can take it from under us."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("outstation-windows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = _PAGE
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, self.size)

    def grow(self, size: int) -> None:
        if size > self.size:
            self.size = -(-size // _PAGE) * _PAGE
            os.ftruncate(self.fd, self.size)
            self.map.close()
            self.map = mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


@contextlib.contextmanager
def _memory_file(name: str, content: bytes) -> Iterator[int]:
    """A file in memory, to be read from its beginning."""
    fd = os.memfd_create(f"outstation-{name}", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _read_available(pipe: IO[bytes] | None) -> bytes:
    """What is there of a pipe that does not block, at least what fits into it; nothing at its end."""
    assert pipe is not None
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), _PIPE_BYTES)
    return b""


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """A child that is begun within never gets them: who stops the agent does not mean the model to have crashed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
