"""Inference in a subprocess, compared with inference in the same process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from agent.model.bundle import builtin, bundle
from agent.model.inference import runtime
from agent.model.inference.features import Floats
from agent.model.sandbox.subprocess_model import SubprocessModel
from scripts.benchmarks import Report, Result, benchmark

# Batch sizes of a device that keeps up with its readings, and of one that works off a backlog.
FEW, MANY = 30, 512
ROUNDS = 60
_PSS = "Pss:"
# Memory limit of a subprocess: Python, numpy, the runtime and the model, with a share of shared pages.
MOST_MIB = 60.0


@benchmark("apart")
def subprocess_overhead() -> Report:
    """Measure windows of `exercise` (medians of alternating runs), and the PSS of the subprocess."""
    shipped = bundle.read(builtin.bundles_dir() / "exercise", None)
    here = runtime.load_model(shipped.manifest, shipped.model_bytes)
    windows = np.random.default_rng(0).normal(0, 1, (MANY, *here.input_shape)).astype(np.float32)
    with SubprocessModel(shipped) as there:
        there.invoke(windows)
        results = []
        for count in (FEW, MANY):
            ours, reference = _median(there.invoke, here.invoke, windows[:count])
            note = f"{count} windows, {1e6 * (ours - reference):.0f} µs more"
            results.append(Result(f"apart, {count} windows", ours * 1e6, reference * 1e6, "µs", 2.0, note, less=True))
        memory = _mib(there.pid)
    results.append(
        Result("apart, memory", memory, MOST_MIB, "MiB", 1.0, "PSS of the child process", less=True, limit=True)
    )
    lines = [
        f"{result.name}: {result.ours:,.0f} {result.unit}, {result.reference:,.0f}, {result.ratio:.2f}"
        for result in results
    ]
    return Report(tuple(results), "\n".join(lines))


def _median(
    ours: Callable[[Floats], object], reference: Callable[[Floats], object], windows: Floats
) -> tuple[float, float]:
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for invoke, times in ((ours, took[0]), (reference, took[1])):
            began = time.perf_counter()
            invoke(windows)
            times.append(time.perf_counter() - began)
    return statistics.median(took[0]), statistics.median(took[1])


def _mib(pid: int | None) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith(_PSS):
            return int(line.split()[1]) / 1024
    return float("nan")
