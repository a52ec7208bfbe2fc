"""The process in which `apart` runs a model: what both say, and what it does. Its pipes are its stdin and stdout.

At the start it says STARTED and what it has loaded, or why not. Then, for each ASKED, there are windows in the shared
memory; it puts the outputs behind them and says ANSWER: whether it could, the seconds it took, and what was wrong.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from agent.errors import BadBundle
from agent.model.inference import runtime

STARTED_HEADER, REQUEST_HEADER, RESPONSE_HEADER = struct.Struct("<BI"), struct.Struct("<QQ"), struct.Struct("<BdI")
STATUS_OK, STATUS_FAILED = 0, 1
MAX_TEXT_BYTES = 2000
# Of address space, for the memory that is shared: windows of a batch and their answers, mapped twice while it grows.
_SHARED_BYTES = 128 << 20
_PR_SET_PDEATHSIG = 1


class WorkerJob(msgspec.Struct):
    """What it is to run, for the process `parent`. `memory_mib` on top of what Python, numpy and the runtime take."""

    content: bytes
    batch: int
    threads: int
    output: str | int | None
    memory_mib: int
    parent_pid: int


class ModelInfo(msgspec.Struct, frozen=True):
    """Of the loaded model."""

    input_shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=8)]
    outputs: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
    batch: int
    input_range: tuple[float, float]


def main() -> None:
    given, shared = int(sys.argv[1]), int(sys.argv[2])
    # What the runtime prints is no answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    with open(given, "rb") as file:
        job = msgspec.msgpack.decode(file.read(), type=WorkerJob)
    _die_with_parent(job.parent_pid)
    _apply_limits(job)
    try:
        model = runtime.TfliteModel(job.content, job.batch, job.threads, job.output)
    except BadBundle as problem:
        said = str(problem).encode()[:MAX_TEXT_BYTES]
        _write_all(answers, STARTED_HEADER.pack(STATUS_FAILED, len(said)) + said)
        return
    said = msgspec.msgpack.encode(ModelInfo(model.input_shape, model.outputs, model.batch, model.input_range))
    _write_all(answers, STARTED_HEADER.pack(STATUS_OK, len(said)) + said)
    _serve(model, shared, answers)


def _serve(model: runtime.TfliteModel, shared_fd: int, response_fd: int) -> None:
    width = int(np.prod(model.input_shape))
    size, mapped = 0, None
    while asked := _read_exactly(REQUEST_HEADER.size):
        count, wanted = REQUEST_HEADER.unpack(asked)
        if mapped is None or wanted != size:
            size, mapped = wanted, mmap.mmap(shared_fd, wanted)
        values = np.frombuffer(mapped, np.float32, count * (width + model.outputs))
        begun_s = time.perf_counter()
        try:
            outputs = model.invoke(values[: count * width].reshape(count, *model.input_shape))
        except BadBundle as problem:
            said = str(problem).encode()[:MAX_TEXT_BYTES]
            _write_all(response_fd, RESPONSE_HEADER.pack(STATUS_FAILED, 0.0, len(said)) + said)
            continue
        took_s = time.perf_counter() - begun_s
        values[count * width :].reshape(outputs.shape)[:] = outputs
        _write_all(response_fd, RESPONSE_HEADER.pack(STATUS_OK, took_s, 0))


def _die_with_parent(parent: int) -> None:
    """Be killed when the parent ends, even while the runtime hangs."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _apply_limits(job: WorkerJob) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + (job.memory_mib << 20) + _SHARED_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory is short for all, it goes before the agent does.
    Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")


def _read_exactly(size: int) -> bytes:
    """The next `size` bytes of stdin; none at its end."""
    found = b""
    while len(found) < size:
        part = os.read(0, size - len(found))
        if not part:
            return b""
        found += part
    return found


def _write_all(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    main()
