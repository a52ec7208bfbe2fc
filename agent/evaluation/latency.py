"""Latency on this machine, measured in a child process: from rows to scores, in batches of several sizes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from agent.arrays import Float32s, Ints
from agent.errors import BadBundle
from agent.evaluation.document import BatchLatency
from agent.model.bundle import manifest as manifests
from agent.model.bundle.bundle import Bundle
from agent.model.inference import runtime
from agent.model.inference.features import WindowCut

BATCH_SIZES = (1, 8, 32, 128)
_WARMUP_RUNS, _MIN_RUNS, _MAX_RUNS, _BUDGET_S = 3, 10, 500, 0.4
_TIMEOUT_S = 120.0


def measure(bundle: Bundle, rows: Float32s, t: Ints) -> list[BatchLatency]:
    """Measure on `rows` (n, F), repeated as needed. Raises BadBundle."""
    work = (bundle.files["manifest.json"], bundle.model_bytes, rows.astype(np.float32).tobytes(), t.tobytes())
    try:
        child = subprocess.run(
            # -P: an `agent` in the working directory is not ours.
            [sys.executable, "-P", "-m", "agent.evaluation.latency"],
            input=msgspec.msgpack.encode(work),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        return msgspec.json.decode(child.stdout, type=list[BatchLatency])
    except (subprocess.SubprocessError, msgspec.MsgspecError) as error:
        raise BadBundle(f"latency could not be measured: the child process failed ({error})") from None


def main() -> None:
    head, model, rows, t = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=tuple[bytes, bytes, bytes, bytes])
    manifest = manifests.decode(head)
    values = np.frombuffer(rows, np.float32).reshape(-1, len(manifest.input.fields))
    measured = list(_measure_batches(manifest, model, values, np.frombuffer(t, np.int64)))
    sys.stdout.buffer.write(msgspec.json.encode(measured))


def _measure_batches(manifest: manifests.Manifest, model: bytes, rows: Float32s, t: Ints) -> Iterator[BatchLatency]:
    from agent.model.inference import inference

    run = inference.Inference(manifest, runtime.load_model(manifest, model))
    for batch in BATCH_SIZES:
        row_count = run.history_rows + run.rows * batch
        values, times = np.resize(rows, (row_count, rows.shape[1])), np.resize(t, row_count)
        cut = WindowCut(run.history_rows + run.rows * np.arange(batch), row_count)
        started_s = time.perf_counter()
        durations: list[float] = []
        while len(durations) < _WARMUP_RUNS + _MIN_RUNS or (
            time.perf_counter() - started_s < _BUDGET_S and len(durations) < _MAX_RUNS
        ):
            start = time.perf_counter()
            run.run_windows(values, times, cut)
            durations.append(time.perf_counter() - start)
        p50, p95 = (float(x) for x in np.quantile(durations[_WARMUP_RUNS:], [0.5, 0.95]))
        yield BatchLatency(
            batch=batch,
            p50_ms=float(f"{p50 * 1e3:.4g}"),
            p95_ms=float(f"{p95 * 1e3:.4g}"),
            per_second=float(f"{batch / p50:.4g}"),
            memory_mib=round(_peak_memory_mib(), 1),
        )


def _peak_memory_mib() -> float:
    """Return the peak of this process; getrusage would return the parent's if that was larger."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
