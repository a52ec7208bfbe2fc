"""Launch of model processes: the child with its pipes and shared memory, and a spare one that is started early.

The child imports the runtime first, and then waits for its job. The commands `run` and `batch` prepare a spare child
before their own imports, so that both processes import at the same time. This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from outstation.ml.model.sandbox import child_process
from outstation.ml.model.sandbox.child_process import ONE_BLAS_THREAD, child_environment
from outstation.ml.model.sandbox.forked_child import ForkedChild, can_fork

if TYPE_CHECKING:
    import subprocess

WORKER_MODULE = "outstation.ml.model.sandbox.worker"
_PAGE = mmap.PAGESIZE


def run_module(module: str, request: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run a module of ours to its end in a child process, with `request` on its standard input.

    Raises subprocess.TimeoutExpired.
    """
    import subprocess

    # -P: never import an `agent` package from the current folder.
    command = [sys.executable, "-P", "-m", module]
    environment = child_environment()
    return subprocess.run(command, input=request, capture_output=True, timeout=timeout_s, env=environment, check=False)


class SharedBuffer:
    """Shared memory that can only grow: a seal keeps the child from truncating it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("outstation-windows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = _PAGE
        os.ftruncate(self.fd, self.size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.map = mmap.mmap(self.fd, self.size)

    def grow(self, size: int) -> None:
        if size > self.size:
            pages = -(-size // _PAGE) * _PAGE
            os.ftruncate(self.fd, pages)
            # Without memory this raises, and the former map stays in use.
            grown = mmap.mmap(self.fd, pages)
            self._unmap()
            self.map, self.size = grown, pages

    def close(self) -> None:
        self._unmap()
        os.close(self.fd)

    def _unmap(self) -> None:
        # An array that is still in use keeps the former map until it goes.
        with contextlib.suppress(BufferError):
            self.map.close()


class Worker:
    """A child that waits for its job in a memory file; a line on its stdin says that the job is complete."""

    def __init__(self, fork_into: Callable[[int, int, int], None] | None = None) -> None:
        """Start the child; as a fork of this process it runs `fork_into`. Raises OSError."""
        self.child: ForkedChild | subprocess.Popen[bytes]
        self.shared = SharedBuffer()
        try:
            self._job_fd = os.memfd_create("outstation-job", os.MFD_CLOEXEC)
        except OSError:
            self.shared.close()
            raise
        files = self._job_fd, self.shared.fd
        try:
            with child_process.blocked_signals():
                if fork_into is not None:
                    self.child = ForkedChild(partial(fork_into, *files, os.getpid()), files)
                    return
                import subprocess

                self.child = subprocess.Popen(
                    # -P: never import an `agent` package from the current folder.
                    [sys.executable, "-P", "-m", WORKER_MODULE, *map(str, (*files, os.getpid()))],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=child_environment(),
                    pass_fds=files,
                )
        except OSError:
            self._close_memory()
            raise

    def send_job(self, job: bytes) -> None:
        """Hand over the job; a child that ended meanwhile is noticed at the first answer."""
        with open(self._job_fd, "wb", closefd=False) as file:
            file.write(job)
        os.close(self._job_fd)
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self.child.stdin.fileno(), b"\n")

    def discard(self) -> None:
        """End a child that got no job."""
        self.child.kill()
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout, self.child.stderr):
            if pipe is not None:
                pipe.close()
        self._close_memory()

    def _close_memory(self) -> None:
        self.shared.close()
        os.close(self._job_fd)


_spare: Worker | None = None


def prepare_spare() -> None:
    """Start a child for the first model, if there is none; without one, models start a little later."""
    global _spare
    if _spare is None:
        with contextlib.suppress(OSError):
            _spare = Worker()


def fork_spare() -> None:
    """Import NumPy and fork a child for the first model, so that NumPy is imported once for both.

    Call it before anything secret is read. A process with several threads has no such child.
    """
    global _spare
    for name, value in ONE_BLAS_THREAD.items():
        os.environ.setdefault(name, value)
    from outstation.ml.model.sandbox import worker

    with contextlib.suppress(OSError):
        if can_fork():
            _spare = Worker(worker.main)


def take_worker() -> Worker:
    """Return the spare child, or a new one. Raises OSError."""
    global _spare
    worker, _spare = _spare, None
    if worker is not None and worker.child.poll() is not None:
        worker.discard()
        worker = None
    return worker or Worker()


def discard_spare() -> None:
    """End the spare child, if no model needed it."""
    global _spare
    if _spare is not None:
        _spare.discard()
    _spare = None
