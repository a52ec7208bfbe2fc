"""Worker of a subprocess model: the child's side of the protocol over its stdin and stdout.

It gives up the rights that computation does not need (`confinement`), loads the model, and sends STARTED_HEADER with
the model's properties, or an error. For each REQUEST_HEADER it reads quantized windows from the shared memory, writes
the outputs behind them as they are, and sends RESPONSE_HEADER: status, seconds, and an error text.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    # Imports leave no garbage, and looking for it is an eighth of their time.
    gc.disable()

import ctypes
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from outstation.foundation import decoders
from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle.tensor_selection import TensorSelection
from outstation.ml.model.inference.quantization import Quantization
from outstation.ml.model.sandbox import confinement, memory
from outstation.ml.model.sandbox.confinement import ConfinementError, ModelPolicy

if TYPE_CHECKING:
    from outstation.ml.model.inference.runtime import TfliteModel

STARTED_HEADER, REQUEST_HEADER, RESPONSE_HEADER = struct.Struct("<BI"), struct.Struct("<QQQ"), struct.Struct("<BdI")
STATUS_OK, STATUS_FAILED = 0, 1
MAX_TEXT_BYTES = 2000
# Address space for the shared memory: windows and outputs of a batch, mapped twice while it grows.
SHARED_BYTES = 128 << 20
ALIGNMENT = 64
_PR_SET_PDEATHSIG = 1


class WorkerJob(msgspec.Struct):
    """The model to run, and a trusted one for `runtime.detect_processor`.

    `memory_mib` is added to what Python, NumPy and the runtime take.
    """

    content: bytes
    batch: int
    threads: int
    tensors: TensorSelection
    memory_mib: int
    policy: ModelPolicy
    trusted_content: bytes


class ModelInfo(msgspec.Struct, frozen=True):
    input_shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=8)]
    outputs: Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
    input: Quantization
    output: Quantization
    is_confined: bool
    kernels: Annotated[str, msgspec.Meta(max_length=40)]


def main(job_fd: int, shared_fd: int, parent_pid: int) -> None:
    # The kernel kills this process when the parent ends, even while the runtime hangs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    # Output that the runtime prints goes to stderr.
    response_fd = os.dup(1)
    os.dup2(2, 1)
    # Imported here: the daemon imports this module, and loads no runtime.
    from outstation.ml.model.inference import runtime

    # A spare process may wait long for its job, or be of no use.
    if not _read_exactly(1):
        return
    with open(job_fd, "rb") as file:
        file.seek(0)
        job = decoders.from_msgpack(file.read(), WorkerJob)
    memory.limit_growth((job.memory_mib << 20) + SHARED_BYTES)
    # When the machine runs out of memory, the kernel kills this process before the daemon.
    Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    try:
        runtime.detect_processor(job.trusted_content)
        is_confined = confinement.confine_by(job.policy)
        model = runtime.TfliteModel(job.content, job.batch, job.threads, job.tensors)
    except (BadBundle, ConfinementError) as problem:
        text = str(problem).encode()[:MAX_TEXT_BYTES]
        _write_all(response_fd, STARTED_HEADER.pack(STATUS_FAILED, len(text)) + text)
        return
    info = msgspec.msgpack.encode(
        ModelInfo(
            *(model.input_shape, model.outputs, model.input, model.output),
            *(is_confined, model.kernels),
        )
    )
    _write_all(response_fd, STARTED_HEADER.pack(STATUS_OK, len(info)) + info)
    gc.freeze()
    gc.enable()
    _serve(model, shared_fd, response_fd)


def _serve(model: TfliteModel, shared_fd: int, response_fd: int) -> None:
    width = int(np.prod(model.input_shape))
    size, mapped = 0, None
    while header := _read_exactly(REQUEST_HEADER.size):
        count, begin, required = REQUEST_HEADER.unpack(header)
        if mapped is None or required != size:
            size, mapped = required, mmap.mmap(shared_fd, required)
        windows = np.frombuffer(mapped, model.input.dtype, count * width, begin).reshape(count, width)
        begin = outputs_offset(begin, windows.nbytes)
        outputs = np.frombuffer(mapped, model.output.dtype, count * model.outputs, begin).reshape(count, model.outputs)
        start_s = time.perf_counter()
        try:
            model.run(windows, outputs)
        except BadBundle as problem:
            text = str(problem).encode()[:MAX_TEXT_BYTES]
            _write_all(response_fd, RESPONSE_HEADER.pack(STATUS_FAILED, 0.0, len(text)) + text)
            continue
        seconds = time.perf_counter() - start_s
        _write_all(response_fd, RESPONSE_HEADER.pack(STATUS_OK, seconds, 0))


def outputs_offset(begin: int, windows_bytes: int) -> int:
    """Return where the outputs of windows that begin at `begin` are in the shared memory: behind them, aligned."""
    return -(-(begin + windows_bytes) // ALIGNMENT) * ALIGNMENT


def _read_exactly(size: int) -> bytes:
    """Return the next `size` bytes of stdin; b"" at its end."""
    data = b""
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            return b""
        data += part
    return data


def _write_all(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
