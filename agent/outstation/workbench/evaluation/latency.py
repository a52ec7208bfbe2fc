"""Latency on this machine, measured in a confined child process: from rows to scores, in batches of several sizes."""

from __future__ import annotations

import subprocess
import sys
import time

import msgspec
import numpy as np

from outstation.foundation import decoders
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import BadBundle
from outstation.ml.model.bundle import builtin
from outstation.ml.model.bundle import manifest as manifests
from outstation.ml.model.bundle.bundle import Bundle
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.joins import JoinedValues
from outstation.ml.model.sandbox import confinement, launch, memory
from outstation.ml.model.sandbox.confinement import ModelPolicy
from outstation.workbench.evaluation.document import BatchLatency

BATCH_SIZES = (1, 8, 32, 128)
_WARMUP_RUNS, _MIN_RUNS, _MAX_RUNS, _BUDGET_S = 3, 10, 500, 0.4
_TIMEOUT_S = 120.0


def measure(bundle: Bundle, rows: Float32s, t: Ints) -> list[BatchLatency]:
    """Measure on `rows` (n, F), repeated as needed. Raises BadBundle."""
    files = bundle.files["manifest.json"], bundle.model_bytes, builtin.read_smallest_model()
    work = (*files, rows.astype(np.float32).tobytes(), t.tobytes())
    try:
        child = launch.run_module("outstation.workbench.evaluation.latency", msgspec.msgpack.encode(work), _TIMEOUT_S)
        child.check_returncode()
        return decoders.from_json(child.stdout, list[BatchLatency])
    except (subprocess.SubprocessError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadBundle(f"latency could not be measured: the child process failed ({error})") from None


def main() -> None:
    from outstation.ml.model.inference import inference, runtime

    work = decoders.from_msgpack(sys.stdin.buffer.read(), tuple[bytes, bytes, bytes, bytes, bytes])
    head, model, trusted, rows, t = work
    manifest = manifests.decode(head)
    # A confined process can read no file: the runtime, NumPy and `memory` read theirs before.
    runtime.detect_processor(trusted)
    np.quantile(np.zeros(2), [0.5])
    memory.peak_bytes()
    confinement.confine_by(ModelPolicy())
    values, times = np.frombuffer(rows, np.float32).reshape(-1, len(manifest.input.fields)), np.frombuffer(t, np.int64)
    run = inference.Inference(manifest, runtime.load_model(manifest, model))
    measured = []
    for batch in BATCH_SIZES:
        row_count = run.history_rows + run.rows * batch
        block, block_t = np.resize(values, (row_count, values.shape[1])), np.resize(times, row_count)
        joined = None
        if further := sum(spec.size for spec in manifest.joined.values()):
            joined = JoinedValues(np.zeros((batch, further), np.float32), np.zeros(batch, np.int64))
        cut = WindowCut(run.history_rows + run.rows * np.arange(batch, dtype=np.int64), row_count, joined)
        started_s = time.perf_counter()
        durations: list[float] = []
        while len(durations) < _WARMUP_RUNS + _MIN_RUNS or (
            time.perf_counter() - started_s < _BUDGET_S and len(durations) < _MAX_RUNS
        ):
            start = time.perf_counter()
            run.run_windows(block, block_t, cut)
            durations.append(time.perf_counter() - start)
        p50, p95 = (float(x) for x in np.quantile(durations[_WARMUP_RUNS:], [0.5, 0.95]))
        measured.append(
            BatchLatency(
                batch=batch,
                p50_ms=float(f"{p50 * 1e3:.4g}"),
                p95_ms=float(f"{p95 * 1e3:.4g}"),
                per_second=float(f"{batch / p50:.4g}"),
                memory_mib=round(memory.peak_bytes() / 2**20, 1),
            )
        )
    sys.stdout.buffer.write(msgspec.json.encode(measured))


if __name__ == "__main__":
    main()
