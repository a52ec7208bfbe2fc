"""Process of a sandboxed model: the child, its pipes, and the memory that both sides share.

Windows and outputs are exchanged in shared memory; a pipe in each direction signals them.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import struct
import time
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.model.sandbox import launch
from outstation.ml.model.sandbox.worker import MAX_TEXT_BYTES, REQUEST_HEADER, WorkerJob

# The last bytes of stderr are kept.
_MAX_STDERR_BYTES = 4096
_PIPE_BYTES = 1 << 16


class WorkerExited(Exception):
    """The child closed its pipe."""


class ModelProcess:
    def __init__(self, job: WorkerJob) -> None:
        """Start the child with its job. Raises OSError."""
        started = launch.take_worker()
        started.send_job(msgspec.msgpack.encode(job))
        self._child, self._shared = started.child, started.shared
        # The time of a spare child does not count: it waited for the job.
        self.pid, self.started_s = self._child.pid, time.monotonic()
        self._stdout, self._stderr = b"", b""
        self._end: tuple[int, bytes] | None = None
        self._selector = selectors.DefaultSelector()
        for pipe in (self._child.stdout, self._child.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def grow_memory(self, size: int) -> None:
        """Have the shared memory hold `size` bytes. Raises OSError; it then stays as it was."""
        self._shared.grow(size)

    def map_numbers(self, shape: tuple[int, int], dtype: np.dtype[Any], begin: int) -> NDArray[Any]:
        """Return an array of this shape and type in the shared memory, from byte `begin` on."""
        return np.frombuffer(self._shared.map, dtype, math.prod(shape), begin).reshape(shape)

    def submit(self, count: int, begin: int) -> None:
        """Request the outputs of the `count` windows at byte `begin`. Raises WorkerExited."""
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), REQUEST_HEADER.pack(count, begin, self._shared.size))
        except BrokenPipeError:
            raise WorkerExited from None

    def read_message(self, header: struct.Struct, timeout_s: float) -> tuple[tuple[Any, ...], bytes] | None:
        """Return the fields of a header and the text behind it, whose size is the last field.

        None while either is incomplete, after the timeout. Raises WorkerExited at the end of the pipe.
        """
        if (message := self._take_message(header)) is None:
            for key, _ in self._selector.select(max(0.0, timeout_s)):
                if key.fileobj is self._child.stderr:
                    self._read_stderr()
                else:
                    data = _read_available(self._child.stdout)
                    if not data:
                        raise WorkerExited
                    self._stdout += data
            message = self._take_message(header)
        return message

    def _take_message(self, header: struct.Struct) -> tuple[tuple[Any, ...], bytes] | None:
        if len(self._stdout) < header.size:
            return None
        fields = header.unpack_from(self._stdout)
        end = header.size + min(fields[-1], MAX_TEXT_BYTES)
        if len(self._stdout) < end:
            return None
        text, self._stdout = self._stdout[header.size : end], self._stdout[end:]
        return fields, text

    def kill(self) -> tuple[int, bytes]:
        """Kill it if it is alive. Return its exit code and the last bytes of its stderr."""
        if self._end is not None:
            return self._end
        self._child.kill()
        code = self._child.wait()
        self._read_stderr()
        self._selector.close()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._shared.close()
        self._end = code, self._stderr
        return self._end

    def _read_stderr(self) -> None:
        data, pipe = _read_available(self._child.stderr), self._child.stderr
        if not data and pipe is not None and pipe in self._selector.get_map():
            # A pipe at its end is always ready.
            self._selector.unregister(pipe)
        self._stderr = (self._stderr + data)[-_MAX_STDERR_BYTES:]


def _read_available(pipe: IO[bytes] | None) -> bytes:
    """Read what a non-blocking pipe holds; b"" if nothing, and at its end."""
    assert pipe is not None
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), _PIPE_BYTES)
    return b""
