"""Subprocess model: run a model in a child process, so that a crash, hang or lack of memory ends only that process."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation import decoders
from outstation.foundation.arrays import Float32s
from outstation.foundation.errors import BadBundle, ModelProcessFailed
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.inference.tuning import DEFAULT_BATCH, Tuning
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.ml.model.sandbox.process import ModelProcess, WorkerExited
from outstation.ml.model.sandbox.worker import (
    ALIGNMENT,
    RESPONSE_HEADER,
    SHARED_BYTES,
    STARTED_HEADER,
    STATUS_OK,
    ModelInfo,
    WorkerJob,
    outputs_offset,
)

# A desktop starts Python, numpy and the runtime in a tenth of this; a busy small board needs longer.
_START_TIMEOUT_S = 30.0
_POLL_INTERVAL_S = 1.0
# A caller that did not look for `_ABSENCE_S`, because of a slow commit, gives an overdue process this long once more:
# what slowed the caller, such as a busy card, may have slowed the process.
_ABSENCE_S, _GRACE_S = 2 * _POLL_INTERVAL_S, 5.0


class SubprocessModel:
    """A model used like `TfliteModel`; or with `poll_ready`, `submit` and `poll`, by callers that must not block.

    Several callers may share it: each request keeps its own answer, also if another caller waits for the process.

    The process starts at once, is awaited at the first use, and is restarted after its death. `on_wait` is called about
    once a second while `invoke` waits. Use and close it on the thread that made it: the process ends with that thread.
    `seconds` is the model's time, without the transfer.
    """

    def __init__(
        self,
        bundle: Bundle,
        tuning: Tuning | None = None,
        policy: ModelPolicy | None = None,
        on_wait: Callable[[], None] = lambda: None,
        call_timeout_s: float = 30.0,
    ) -> None:
        """Start the process; `call_timeout_s` bounds one `invoke`. Raises ModelProcessFailed."""
        self.call_timeout_s, self.seconds = call_timeout_s, 0.0
        policy = policy or ModelPolicy()
        self._limits = policy.cap(bundle.manifest.limits)
        batch, threads = (tuning.batch, tuning.threads) if tuning else (DEFAULT_BATCH, 1)
        self._job = WorkerJob(
            content=bundle.model_bytes,
            batch=batch,
            threads=threads,
            tensors=bundle.manifest.tensors,
            memory_mib=self._limits.memory_mib,
            policy=policy,
            trusted_content=builtin.read_smallest_model(),
        )
        self._on_wait = on_wait
        self._process: ModelProcess | None = None
        self._loaded: ModelInfo | None = None
        self._pending: ModelRequest | None = None
        self._allocated: tuple[int, NDArray[Any]] | None = None
        self.start()

    def __enter__(self) -> SubprocessModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_alive

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_confined(self) -> bool:
        return self.wait_loaded().is_confined

    @property
    def outputs(self) -> int:
        return self.wait_loaded().outputs

    @property
    def kernels(self) -> str:
        return self.wait_loaded().kernels

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.wait_loaded().input_shape

    @property
    def input(self) -> Quantization:
        return self.wait_loaded().input

    @property
    def output(self) -> Quantization:
        return self.wait_loaded().output

    @property
    def input_range(self) -> tuple[float, float]:
        return self.input.input_range

    @property
    def output_range(self) -> tuple[float, float]:
        return self.output.range

    def start(self) -> None:
        """Start the process if none runs, without waiting for it. Raises ModelProcessFailed."""
        if self.is_running:
            return
        self.close()
        try:
            self._process = ModelProcess(self._job)
            # A task that is replaced drops its model: the process then ends, too.
            self._finalizer = weakref.finalize(self, self._process.kill)
        except OSError as error:
            raise ModelProcessFailed("error", f"no process can be started for the model: {error.strerror}") from error

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._finalizer.detach()
        if self._pending is not None:
            self._pending.failure = ModelProcessFailed("error", "its process was ended before it answered")
        self._process, self._loaded, self._pending, self._allocated = None, None, None, None

    def allocate(self, count: int) -> NDArray[Any]:
        """Return an array for windows (w, n), in the input's numbers: memory that the process shares.

        It is theirs until they are run, or another one is allocated. Raises ModelProcessFailed.
        """
        loaded = self.wait_loaded()
        assert self._process is not None
        shape, dtype = (count, math.prod(loaded.input_shape)), loaded.input.dtype
        busy, begin = self._pending, 0
        # A request that the process computes keeps its memory.
        if busy is not None and self._end_of_outputs(count, begin) > busy.begin:
            begin = -(-busy.end // ALIGNMENT) * ALIGNMENT
        if (end := self._end_of_outputs(count, begin)) > SHARED_BYTES:
            return np.empty(shape, dtype)
        self._process.grow_memory(end)
        windows = self._process.map_numbers(shape, dtype, begin)
        self._allocated = begin, windows
        return windows

    def _end_of_outputs(self, count: int, begin: int) -> int:
        """Return the end of what a request for windows at byte `begin` takes of the shared memory."""
        loaded = self.wait_loaded()
        windows = count * math.prod(loaded.input_shape) * loaded.input.dtype.itemsize
        return outputs_offset(begin, windows) + count * loaded.outputs * loaded.output.dtype.itemsize

    def _wait_idle(self) -> None:
        while self._pending is not None:
            # Another caller's request is answered first.
            self._collect_or_wait(self._pending)

    def invoke(self, windows: Float32s) -> Float32s:
        """Return the outputs (w, K) of `windows` (w, …), as `TfliteModel` does. Raises ModelProcessFailed."""
        self._wait_idle()
        return self._finish(self.submit(windows)).take_outputs()

    @property
    def is_concurrent(self) -> bool:
        return True

    def start_run(self, windows: NDArray[Any]) -> ModelRequest:
        """Have the process compute `windows`, quantized, once it is idle; `wait` returns the outputs.

        Raises ModelProcessFailed.
        """
        self._wait_idle()
        return self._send(windows)

    def wait(self, request: ModelRequest) -> NDArray[Any]:
        """Return the outputs of `request`, in the tensor's numbers. Raises ModelProcessFailed."""
        return self._finish(request).take_numbers()

    def _finish(self, request: ModelRequest) -> ModelRequest:
        while not request.is_done:
            self._collect_or_wait(request)
        return request

    def poll_ready(self, timeout_s: float = 0.0) -> bool:
        """Return True if it is loaded and idle; start it if needed. Raises ModelProcessFailed."""
        # The sender of the pending request may never ask for its answer.
        self._collect(timeout_s)
        if not self.is_running:
            self.start()
        if self._loaded is None:
            self._poll_started(timeout_s)
        return self._loaded is not None and self._pending is None

    def submit(self, windows: Float32s) -> ModelRequest:
        """Send `windows`; `poll` then returns the outputs. One request at a time. Raises ModelProcessFailed."""
        loaded = self.wait_loaded()
        assert self._pending is None, "a request is pending"
        width = math.prod(loaded.input_shape)
        if windows.size != len(windows) * width:
            raise BadBundle(f"the model takes {list(loaded.input_shape)} values, got {list(windows.shape[1:])}")
        return self._send(loaded.input.quantize(windows.reshape(len(windows), width)))

    def _send(self, windows: NDArray[Any]) -> ModelRequest:
        loaded, count = self.wait_loaded(), len(windows)
        begin, allocated = self._allocated or (0, None)
        if allocated is not windows:
            begin = 0
            if self._end_of_outputs(count, begin) > SHARED_BYTES:
                # The process alone says how many outputs its model has.
                raise ModelProcessFailed("error", f"{count} windows of {loaded.outputs} outputs need too much")
            # No request is pending: this is where its memory begins.
            np.copyto(self.allocate(count), windows)
        end = self._end_of_outputs(count, begin)
        process = self._process
        assert process is not None
        try:
            process.submit(count, begin)
        except WorkerExited:
            raise self._make_crash_error(f"within {count} windows") from None
        now_s = time.monotonic()
        self._pending = ModelRequest(count, begin, end, now_s + self.call_timeout_s, now_s, loaded.output)
        self._allocated = None
        return self._pending

    def poll(self, request: ModelRequest, timeout_s: float = 0.0) -> Float32s | None:
        """Return the outputs of `request`; None if they are not ready. Raises ModelProcessFailed, also if overdue."""
        if request is self._pending:
            self._collect(timeout_s)
        return request.take_outputs() if request.is_done else None

    def _collect(self, timeout_s: float) -> None:
        """Move the answer to the pending request, if it came, or the failure, into the request."""
        process, pending, loaded = self._process, self._pending, self._loaded
        if pending is None:
            return
        assert process is not None
        assert loaded is not None
        try:
            message = process.read_message(RESPONSE_HEADER, timeout_s)
            if message is None:
                pending.note_look(time.monotonic())
                self._check_timeout(pending.deadline_s, self.call_timeout_s)
                return
        except WorkerExited:
            pending.failure = self._make_crash_error(f"within {pending.count} windows")
            return
        except ModelProcessFailed as overdue:
            pending.failure = overdue
            return
        self._pending = None
        (status, seconds, _), error = message
        if status != STATUS_OK:
            pending.failure = ModelProcessFailed("error", error.decode(errors="replace"))
            return
        self.seconds += seconds
        pending.seconds = seconds
        shape, dtype = (pending.count, loaded.outputs), loaded.output.dtype
        begin = pending.end - pending.count * loaded.outputs * dtype.itemsize
        pending.numbers = process.map_numbers(shape, dtype, begin).copy()

    def _collect_or_wait(self, request: ModelRequest) -> None:
        self._collect(max(0.0, min(_POLL_INTERVAL_S, request.deadline_s - time.monotonic())))
        if not request.is_done:
            self._on_wait()

    def wait_loaded(self) -> ModelInfo:
        """Wait for the start and return the model's properties. Raises ModelProcessFailed."""
        if self._pending is not None and self._loaded is not None:
            return self._loaded
        while not self.poll_ready(_POLL_INTERVAL_S) and self._loaded is None:
            self._on_wait()
        assert self._loaded is not None
        return self._loaded

    def _poll_started(self, timeout_s: float) -> None:
        process = self._process
        assert process is not None
        try:
            message = process.read_message(STARTED_HEADER, timeout_s)
            if message is None:
                self._check_timeout(process.started_s + _START_TIMEOUT_S, _START_TIMEOUT_S)
                return
            (status, _), body = message
        except WorkerExited:
            raise self._make_crash_error("while it was loaded") from None
        if status != STATUS_OK:
            self.close()
            raise ModelProcessFailed("error", body.decode(errors="replace"))
        try:
            self._loaded = decoders.from_msgpack(body, ModelInfo)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.close()
            raise ModelProcessFailed("crash", f"its process sent an invalid start message ({error})") from None

    def _check_timeout(self, deadline_s: float, timeout_s: float) -> None:
        """Kill an overdue process and raise ModelProcessFailed."""
        if time.monotonic() >= deadline_s:
            self.close()
            raise ModelProcessFailed("hang", f"did not answer within {timeout_s:g} s and was killed")

    def _make_crash_error(self, when: str) -> ModelProcessFailed:
        from outstation.ml.model.sandbox import probe

        assert self._process is not None
        code, stderr = self._process.kill()
        self._finalizer.detach()
        self._process, self._loaded, self._pending, self._allocated = None, None, None, None
        return ModelProcessFailed("crash", f"{probe.describe_death(code, stderr, self._limits)}, {when}")


class ModelRequest(msgspec.Struct, eq=False):
    """A request for the outputs of `count` windows, due at `deadline_s` (monotonic), and its answer or failure.

    Its caller last looked at `looked_s`; `had_grace` once an absence of the caller has put off the deadline.
    Its windows and outputs take bytes `begin` to `end` of the shared memory.
    """

    count: int
    begin: int
    end: int
    deadline_s: float
    looked_s: float
    quantization: Quantization
    numbers: NDArray[Any] | None = None
    seconds: float = 0.0  # of the model
    failure: ModelProcessFailed | None = None
    had_grace: bool = False

    def note_look(self, now_s: float) -> None:
        """Record a look without an answer. After an absence beyond the deadline, put that off, once."""
        if now_s >= self.deadline_s and now_s - self.looked_s > _ABSENCE_S and not self.had_grace:
            self.deadline_s, self.had_grace = now_s + _GRACE_S, True
        self.looked_s = now_s

    @property
    def is_done(self) -> bool:
        return self.numbers is not None or self.failure is not None

    def take_outputs(self) -> Float32s:
        """Return the outputs of a request that is done. Raises its failure."""
        return self.quantization.dequantize(self.take_numbers())

    def take_numbers(self) -> NDArray[Any]:
        """Return the outputs of a request that is done, in the tensor's numbers. Raises its failure."""
        if self.failure is not None:
            raise self.failure
        assert self.numbers is not None
        return self.numbers
