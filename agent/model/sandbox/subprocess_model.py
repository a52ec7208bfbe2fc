"""A model in a process of its own: a crash, a hang or hunger for memory ends that process, and no other."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle, ModelProcessFailed
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import ResourceLimits
from agent.model.inference import runtime
from agent.model.inference.tuning import Tuning
from agent.model.sandbox import probe
from agent.model.sandbox.process import ModelProcess, WorkerExited
from agent.model.sandbox.worker import MAX_TEXT_BYTES, RESPONSE_HEADER, STARTED_HEADER, STATUS_OK, ModelInfo, WorkerJob

Floats = NDArray[np.float32]

# Python, numpy and the runtime start in a tenth of this on a desktop; a small board that is busy takes its time.
_START_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 1.0


class SandboxLimits(msgspec.Struct, frozen=True):
    """What the process may use. `memory_mib` on top of what it starts with, as the manifest says where it is None.

    `call_s`: of waiting for one `invoke`.
    """

    call_timeout_s: float = 30.0
    memory_mib: int | None = None


class SubprocessModel:
    """Used as `runtime.Model` is; or with `ready`, `ask` and `hear`, by who does not wait.

    Starts at once, is waited for when it is first needed, and is started anew after it died. `waiting` is called about
    once a second while `invoke` waits. To be used and ended by the thread that made it: the process ends with that.
    `seconds` in all that the model took, without the way there and back.
    """

    def __init__(
        self,
        bundle: Bundle,
        tuning: Tuning | None = None,
        sandbox_limits: SandboxLimits | None = None,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises ModelDied where no process can be started."""
        self.sandbox_limits, self.seconds = sandbox_limits or SandboxLimits(), 0.0
        memory = self.sandbox_limits.memory_mib or bundle.manifest.limits.memory_mib
        self._limits = ResourceLimits(memory_mib=max(64, memory))
        batch, threads = (tuning.batch, tuning.threads) if tuning else (runtime.DEFAULT_BATCH, 1)
        output = bundle.manifest.output.tensor
        self._job = WorkerJob(bundle.model_bytes, batch, threads, output, memory, os.getpid())
        self._on_wait = on_wait
        self._process: ModelProcess | None = None
        self._loaded: ModelInfo | None = None
        self._pending: _PendingRequest | None = None
        self.start()

    def __enter__(self) -> SubprocessModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_alive

    @property
    def is_busy(self) -> bool:
        """Whether it was asked something that nobody heard the answer to."""
        return self._pending is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self._wait_loaded().input_shape

    @property
    def outputs(self) -> int:
        return self._wait_loaded().outputs

    @property
    def batch(self) -> int:
        return self._wait_loaded().batch

    @property
    def input_range(self) -> tuple[float, float]:
        return self._wait_loaded().input_range

    def start(self) -> None:
        """Begin to start the process, where none runs. Raises ModelDied."""
        if self.is_running:
            return
        self.close()
        try:
            self._process = ModelProcess(self._job)
        except OSError as error:
            raise ModelProcessFailed("error", f"no process can be started for it: {error.strerror}") from error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
        self._process, self._loaded, self._pending = None, None, None

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows` (w, …), as `runtime.Model.invoke`, to the bit. Raises ModelDied."""
        while self._pending is not None:
            self._poll_once()
        self.submit(windows)
        while (found := self._poll_once()) is None:
            pass
        return found

    def poll_ready(self, timeout_s: float = 0.0) -> bool:
        """Whether it has started and waits for windows; starts it. Raises ModelDied."""
        if not self.is_running:
            self.start()
        if self._loaded is None:
            self._poll_started(timeout_s)
        return self._loaded is not None and self._pending is None

    def submit(self, windows: Floats) -> None:
        """Begin with `windows`, which `hear` then gives the outputs of; one question at a time. Raises ModelDied."""
        loaded = self._wait_loaded()
        assert self._pending is None, "it is still at work on the question before"
        width = math.prod(loaded.input_shape)
        if windows.size != len(windows) * width:
            raise BadBundle(
                f"the model takes {list(loaded.input_shape)} values, it was given {list(windows.shape[1:])}"
            )
        process = self._process
        assert process is not None
        try:
            process.write_windows(windows, len(windows) * loaded.outputs)
            process.submit(len(windows))
        except WorkerExited:
            raise self._make_crash_error(f"within {len(windows)} windows") from None
        self._pending = _PendingRequest(len(windows), time.monotonic() + self.sandbox_limits.call_timeout_s)

    def poll(self, timeout_s: float = 0.0) -> Floats | None:
        """The outputs of what was asked; None where they are not there yet. Raises ModelDied, in time."""
        process, asked, loaded = self._process, self._pending, self._loaded
        assert process is not None
        assert asked is not None
        assert loaded is not None
        try:
            said = process.read(RESPONSE_HEADER.size, timeout_s)
            if said is None:
                self._check_timeout(asked.deadline_s, self.sandbox_limits.call_timeout_s)
                return None
            status, seconds, size = RESPONSE_HEADER.unpack(said)
            why = self._read_all(
                process, min(size, MAX_TEXT_BYTES), asked.deadline_s, self.sandbox_limits.call_timeout_s
            )
        except WorkerExited:
            raise self._make_crash_error(f"within {asked.count} windows") from None
        self._pending = None
        if status != STATUS_OK:
            raise ModelProcessFailed("error", why.decode(errors="replace"))
        self.seconds += seconds
        return process.read_outputs(asked.count * math.prod(loaded.input_shape), (asked.count, loaded.outputs))

    def _poll_once(self) -> Floats | None:
        """`hear`, for about a second."""
        asked = self._pending
        assert asked is not None
        found = self.poll(min(_POLL_INTERVAL_S, asked.deadline_s - time.monotonic()))
        if found is None:
            self._on_wait()
        return found

    def _wait_loaded(self) -> ModelInfo:
        """What the started process says of the model. Raises ModelDied, also where the model is none."""
        while not self.poll_ready(_POLL_INTERVAL_S) and self._loaded is None:
            self._on_wait()
        assert self._loaded is not None
        return self._loaded

    def _poll_started(self, timeout_s: float) -> None:
        """Hear whether it has started."""
        process = self._process
        assert process is not None
        try:
            head = process.read(STARTED_HEADER.size, timeout_s)
            if head is None:
                self._check_timeout(process.started_s + _START_TIMEOUT_S, _START_TIMEOUT_S)
                return
            status, size = STARTED_HEADER.unpack(head)
            said = self._read_all(
                process, min(size, MAX_TEXT_BYTES), process.started_s + _START_TIMEOUT_S, _START_TIMEOUT_S
            )
        except WorkerExited:
            raise self._make_crash_error("while it was loaded") from None
        if status != STATUS_OK:
            self.close()
            raise ModelProcessFailed("error", said.decode(errors="replace"))
        try:
            self._loaded = msgspec.msgpack.decode(said, type=ModelInfo)
        except msgspec.MsgspecError as error:
            self.close()
            raise ModelProcessFailed("crash", f"its process answered something else ({error})") from None

    def _read_all(self, process: ModelProcess, size: int, deadline_s: float, timeout_s: float) -> bytes:
        """The next `size` bytes it says, which follow at once on what it just said. Raises ModelDied, Gone."""
        while (said := process.read(size, min(_POLL_INTERVAL_S, deadline_s - time.monotonic()))) is None:
            self._check_timeout(deadline_s, timeout_s)
        return said

    def _check_timeout(self, deadline_s: float, timeout_s: float) -> None:
        """Ends it where its time is over, and raises ModelDied."""
        if time.monotonic() >= deadline_s:
            self.close()
            raise ModelProcessFailed("hang", f"did not answer within {timeout_s:g} s and was ended")

    def _make_crash_error(self, when: str) -> ModelProcessFailed:
        process = self._process
        assert process is not None
        code, said = process.kill()
        self._process, self._loaded, self._pending = None, None, None
        return ModelProcessFailed("crash", f"{probe.describe_death(code, said, self._limits)}, {when}")


class _PendingRequest(msgspec.Struct, frozen=True):
    """Of `count` windows, to be answered before `until_s`, monotonic."""

    count: int
    deadline_s: float
