"""A model in a process of its own: a crash, a hang or hunger for memory ends that process, and no other."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.errors import BadBundle, ModelDied
from agent.model.bundle.bundle import Bundle
from agent.model.bundle.manifest import Limits
from agent.model.inference import runtime
from agent.model.inference.tuning import Choice
from agent.model.sandbox import probe
from agent.model.sandbox.process import Gone, Process
from agent.model.sandbox.worker import ANSWER, MOST_TEXT, OK, STARTED, Job, Loaded

Floats = NDArray[np.float32]

# Python, numpy and the runtime start in a tenth of this on a desktop; a small board that is busy takes its time.
_START_S = 30.0
_TICK_S = 1.0


class Bounds(msgspec.Struct, frozen=True):
    """What the process may use. `memory_mib` on top of what it starts with, as the manifest says where it is None.

    `call_s`: of waiting for one `invoke`.
    """

    call_s: float = 30.0
    memory_mib: int | None = None


class Apart:
    """Used as `runtime.Model` is; or with `ready`, `ask` and `hear`, by who does not wait.

    Starts at once, is waited for when it is first needed, and is started anew after it died. `waiting` is called about
    once a second while `invoke` waits. To be used and ended by the thread that made it: the process ends with that.
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
        self._job = Job(bundle.model, batch, threads, output, memory, os.getpid())
        self._waiting = waiting
        self._process: Process | None = None
        self._loaded: Loaded | None = None
        self._asked: _Question | None = None
        self.start()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.alive

    @property
    def busy(self) -> bool:
        """Whether it was asked something that nobody heard the answer to."""
        return self._asked is not None

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
            self._process = Process(self._job)
        except OSError as error:
            raise ModelDied("error", f"no process can be started for it: {error.strerror}") from error

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.end()
        self._process, self._loaded, self._asked = None, None, None

    def invoke(self, windows: Floats) -> Floats:
        """Outputs (w, K) of `windows` (w, …), as `runtime.Model.invoke`, to the bit. Raises ModelDied."""
        while self._asked is not None:
            self._wait()
        self.ask(windows)
        while (found := self._wait()) is None:
            pass
        return found

    def ready(self, within_s: float = 0.0) -> bool:
        """Whether it has started and waits for windows; starts it. Raises ModelDied."""
        if not self.running:
            self.start()
        if self._loaded is None:
            self._begin(within_s)
        return self._loaded is not None and self._asked is None

    def ask(self, windows: Floats) -> None:
        """Begin with `windows`, which `hear` then gives the outputs of; one question at a time. Raises ModelDied."""
        loaded = self._ready()
        assert self._asked is None, "it is still at work on the question before"
        width = math.prod(loaded.input_shape)
        if windows.size != len(windows) * width:
            raise BadBundle(
                f"the model takes {list(loaded.input_shape)} values, it was given {list(windows.shape[1:])}"
            )
        process = self._process
        assert process is not None
        try:
            process.put(windows, len(windows) * loaded.outputs)
            process.ask(len(windows))
        except Gone:
            raise self._died(f"within {len(windows)} windows") from None
        self._asked = _Question(len(windows), time.monotonic() + self.bounds.call_s)

    def hear(self, within_s: float = 0.0) -> Floats | None:
        """The outputs of what was asked; None where they are not there yet. Raises ModelDied, in time."""
        process, asked, loaded = self._process, self._asked, self._loaded
        assert process is not None
        assert asked is not None
        assert loaded is not None
        try:
            said = process.said(ANSWER.size, within_s)
            if said is None:
                self._require_time(asked.until_s, self.bounds.call_s)
                return None
            status, seconds, size = ANSWER.unpack(said)
            why = self._all(process, min(size, MOST_TEXT), asked.until_s, self.bounds.call_s)
        except Gone:
            raise self._died(f"within {asked.count} windows") from None
        self._asked = None
        if status != OK:
            raise ModelDied("error", why.decode(errors="replace"))
        self.seconds += seconds
        return process.take(asked.count * math.prod(loaded.input_shape), (asked.count, loaded.outputs))

    def _wait(self) -> Floats | None:
        """`hear`, for about a second."""
        asked = self._asked
        assert asked is not None
        found = self.hear(min(_TICK_S, asked.until_s - time.monotonic()))
        if found is None:
            self._waiting()
        return found

    def _ready(self) -> Loaded:
        """What the started process says of the model. Raises ModelDied, also where the model is none."""
        while not self.ready(_TICK_S) and self._loaded is None:
            self._waiting()
        assert self._loaded is not None
        return self._loaded

    def _begin(self, within_s: float) -> None:
        """Hear whether it has started."""
        process = self._process
        assert process is not None
        try:
            head = process.said(STARTED.size, within_s)
            if head is None:
                self._require_time(process.started_s + _START_S, _START_S)
                return
            status, size = STARTED.unpack(head)
            said = self._all(process, min(size, MOST_TEXT), process.started_s + _START_S, _START_S)
        except Gone:
            raise self._died("while it was loaded") from None
        if status != OK:
            self.close()
            raise ModelDied("error", said.decode(errors="replace"))
        try:
            self._loaded = msgspec.msgpack.decode(said, type=Loaded)
        except msgspec.MsgspecError as error:
            self.close()
            raise ModelDied("crash", f"its process answered something else ({error})") from None

    def _all(self, process: Process, size: int, until_s: float, allowed_s: float) -> bytes:
        """The next `size` bytes it says, which follow at once on what it just said. Raises ModelDied, Gone."""
        while (said := process.said(size, min(_TICK_S, until_s - time.monotonic()))) is None:
            self._require_time(until_s, allowed_s)
        return said

    def _require_time(self, until_s: float, allowed_s: float) -> None:
        """Ends it where its time is over, and raises ModelDied."""
        if time.monotonic() >= until_s:
            self.close()
            raise ModelDied("hang", f"did not answer within {allowed_s:g} s and was ended")

    def _died(self, when: str) -> ModelDied:
        process = self._process
        assert process is not None
        code, said = process.end()
        self._process, self._loaded, self._asked = None, None, None
        return ModelDied("crash", f"{probe.death(code, said, self._limits)}, {when}")


class _Question(msgspec.Struct, frozen=True):
    """Of `count` windows, to be answered before `until_s`, monotonic."""

    count: int
    until_s: float
