"""A model in a process of its own: a crash, a hang or hunger for memory ends that process, and no other.

Parent and child share one piece of memory, in which windows go over and outputs come back; a pipe each way says when.
The child is killed where it does not answer in time, and by the kernel where its parent is gone.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle, ModelDied
from agent.model import apart_child, probe, runtime
from agent.model.apart_child import ANSWER, ASKED, OK, STARTED, Job, Loaded
from agent.model.bundle import Bundle
from agent.model.choice import Choice
from agent.model.manifest import Limits

Floats = NDArray[np.float32]

# Python, numpy and the runtime start in a tenth of this on a desktop; a small board that is busy takes its time.
_START_S = 30.0
_TICK_S = 1.0
# Of what the child writes to stderr, the end.
_MOST_SAID = 4096
_PIPE_BYTES = 1 << 16
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the process may use. `memory_mib` on top of what it starts with, as the manifest says where it is None.

    `call_s`: of waiting for one `invoke`. `patient`: it yields to everything else on this machine.
    """

    call_s: float = 30.0
    memory_mib: int | None = None
    patient: bool = False


class Apart:
    """Used as `runtime.Model` is. Starts at once, is waited for when it is first needed, and is started anew after it
    died. `waiting` is called about once a second while it works. To be used and ended by the thread that made it.

    `seconds` in all that the model took, without the way there and back.
    """

    def __init__(
        self,
        bundle: Bundle,
        choice: Choice | None = None,
        bounds: Bounds | None = None,
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises ModelDied where no process can be started."""
        self.bounds, self.seconds = bounds or Bounds(), 0.0
        memory = self.bounds.memory_mib or bundle.manifest.limits.memory_mib
        self._limits = Limits(memory_mib=max(64, memory))
        batch, threads = (choice.batch, choice.threads) if choice else (runtime.BATCH, 1)
        output = bundle.manifest.output.tensor
        self._job = Job(bundle.model, batch, threads, output, memory, self.bounds.patient, os.getpid())
        self._waiting = waiting
        self._process: _Process | None = None
        self._loaded: Loaded | None = None
        self.start()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._ready().input_shape

    @property
    def outputs(self) -> int:
        return self._ready().outputs

    @property
    def batch(self) -> int:
        return self._ready().batch

    @property
    def input_range(self) -> tuple[float, float]:
        return self._ready().input_range

    def start(self) -> None:
        """Begin to start the process, where none runs. Raises ModelDied."""
        if self.running:
            return
        self.close()
        try:
            self._process = _Process(self._job)
        except OSError as error:
            raise ModelDied("error", f"no process can be started for it: {error.strerror}") from error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.end()
        self._process, self._loaded = None, None

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows` (w, …), as `runtime.Model.invoke`, to the bit. Raises ModelDied."""
        loaded = self._ready()
        count, width = len(windows), math.prod(loaded.input_shape)
        if windows.size != count * width:
            raise BadBundle(
                f"the model takes {list(loaded.input_shape)} values, it was given {list(windows.shape[1:])}"
            )
        if not count:
            return np.empty((0, loaded.outputs), np.float32)
        process = self._process
        assert process is not None
        process.put(windows, count * loaded.outputs)
        try:
            process.ask(count)
            status, seconds, size = ANSWER.unpack(self._hear(process, ANSWER.size, self.bounds.call_s))
            why = self._hear(process, min(size, apart_child.MOST_TEXT), self.bounds.call_s)
        except _Gone:
            raise self._died(f"within {count} windows") from None
        if status != OK:
            raise ModelDied("error", why.decode(errors="replace"))
        self.seconds += seconds
        return process.take(count * width, (count, loaded.outputs))

    def _ready(self) -> Loaded:
        """What the started process says of the model. Raises ModelDied, also where the model is none."""
        if not self.running:
            self.start()
        if self._loaded is None:
            process = self._process
            assert process is not None
            try:
                status, size = STARTED.unpack(self._hear(process, STARTED.size, _START_S))
                said = self._hear(process, min(size, apart_child.MOST_TEXT), _START_S)
                if status != OK:
                    self.close()
                    raise ModelDied("error", said.decode(errors="replace"))
                self._loaded = msgspec.msgpack.decode(said, type=Loaded)
            except _Gone:
                raise self._died("while it was loaded") from None
            except msgspec.MsgspecError as error:
                self.close()
                raise ModelDied("crash", f"its process answered something else ({error})") from None
        return self._loaded

    def _hear(self, process: _Process, size: int, within_s: float) -> bytes:
        """The next `size` bytes it says. Raises ModelDied and ends it where they do not come in time, and _Gone."""
        end_s = time.monotonic() + within_s
        while (said := process.said(size, min(_TICK_S, end_s - time.monotonic()))) is None:
            if time.monotonic() >= end_s:
                self.close()
                raise ModelDied("hang", f"did not answer within {within_s:g} s and was ended")
            self._waiting()
        return said

    def _died(self, when: str) -> ModelDied:
        process = self._process
        assert process is not None
        code, said = process.end()
        self._process, self._loaded = None, None
        return ModelDied("crash", f"{probe.death(code, said, self._limits)}, {when}")


class _Gone(Exception):
    """The child hung up."""


class _Process:
    """The child, its pipes and the memory it shares."""

    def __init__(self, job: Job) -> None:
        self._shared = _Shared()
        try:
            with _memory("job", msgspec.msgpack.encode(job)) as given, _signals_held():
                self._child = subprocess.Popen(
                    # -P: an `agent` in the folder it happens to run in is not ours.
                    [sys.executable, "-P", "-m", apart_child.__name__, str(given), str(self._shared.fd)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(given, self._shared.fd),
                )
        except OSError:
            self._shared.close()
            raise
        self.pid = self._child.pid
        self._said, self._errors = b"", b""
        self._selector = selectors.DefaultSelector()
        for pipe in (self._child.stdout, self._child.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ)

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    def put(self, windows: Floats, answers: int) -> None:
        self._shared.grow(windows.size * 4 + answers * 4)
        target = np.frombuffer(self._shared.map, np.float32, windows.size)
        np.copyto(target.reshape(windows.shape), windows)

    def take(self, after: int, shape: tuple[int, int]) -> Floats:
        found = np.frombuffer(self._shared.map, np.float32, math.prod(shape), offset=after * 4)
        return found.reshape(shape).copy()

    def ask(self, count: int) -> None:
        """Raises _Gone."""
        assert self._child.stdin is not None
        try:
            os.write(self._child.stdin.fileno(), ASKED.pack(count, self._shared.size))
        except BrokenPipeError:
            raise _Gone from None

    def said(self, size: int, within_s: float) -> bytes | None:
        """The next `size` bytes; None where they are not there in time. Raises _Gone at their end."""
        if len(self._said) < size:
            for key, _ in self._selector.select(max(0.0, within_s)):
                if key.fileobj is self._child.stderr:
                    self._read_errors()
                else:
                    self._read_answers()
        if len(self._said) < size:
            return None
        said, self._said = self._said[:size], self._said[size:]
        return said

    def end(self) -> tuple[int, bytes]:
        """Kill it, where it still is; its exit code, and the end of what it wrote to stderr."""
        self._child.kill()
        code = self._child.wait()
        self._read_errors()
        self._selector.close()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._shared.close()
        return code, self._errors

    def _read_answers(self) -> None:
        """Raises _Gone at their end."""
        found = _available(self._child.stdout)
        if not found:
            raise _Gone
        self._said += found

    def _read_errors(self) -> None:
        found, pipe = _available(self._child.stderr), self._child.stderr
        if not found and pipe is not None and pipe in self._selector.get_map():
            # At its end it would be ready for ever.
            self._selector.unregister(pipe)
        self._errors = (self._errors + found)[-_MOST_SAID:]


class _Shared:
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
def _memory(name: str, content: bytes) -> Iterator[int]:
    """A file in memory, to be read from its beginning."""
    fd = os.memfd_create(f"outstation-{name}", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _available(pipe: IO[bytes] | None) -> bytes:
    """What is there of a pipe that does not block, at least what fits into it; nothing at its end."""
    assert pipe is not None
    with contextlib.suppress(BlockingIOError):
        return os.read(pipe.fileno(), _PIPE_BYTES)
    return b""


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A child that is begun within never gets them: who stops the agent does not mean the model to have crashed."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
