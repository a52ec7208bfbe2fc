"""Inference in the sandbox: autotuning against the best setting of a longer search, and the cost of a subprocess."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s
from outstation.ml.datasets.recordings import load
from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import runtime
from outstation.ml.model.inference.runtime import MAX_BATCH, TfliteModel
from outstation.ml.model.inference.tuning import count_cores
from outstation.ml.model.sandbox import autotune
from outstation.ml.model.sandbox.subprocess_model import SubprocessModel
from outstation.workbench.simulate.scenario import SCENARIOS
from scripts.benchmarks import Result, benchmark, device_task, rates
from scripts.kit.bundles import THIRD_PARTY
from scripts.kit.process_stats import pss_mb

SECONDS = 6.0
# Batch sizes of a device that keeps up with its readings, and of one that works off a backlog.
_FEW, _MANY = 30, 512
_ROUNDS = 60
# Windows of a backlog that a whole device works off.
_BACKLOG, _BATCH_ROUNDS = 4096, 9
# Memory limit of a subprocess: Python, numpy, the runtime and the model, with a share of shared pages.
_MAX_MIB = 60.0


@benchmark("autotune")
def compare_tuned_batch_size() -> Result:
    """Report the model for which autotuning is furthest from the best setting, among all models in this checkout."""
    contents = {"exercise": (builtin.bundles_dir() / "exercise" / "model.tflite").read_bytes()}
    for name in ("ad01", "kws"):
        path = THIRD_PARTY / f"mlperf_{name}_int8.tflite"
        if path.exists():
            contents[name] = path.read_bytes()
    measurements = {name: compare_with_best(content) for name, content in contents.items()}
    worst = min(measurements.values(), key=lambda measurement: measurement.ours / measurement.best)
    note = "; ".join(
        f"{name} × {measurement.ours / measurement.best:.3f} in {measurement.took_s:.1f} s ({measurement.how})"
        for name, measurement in measurements.items()
    )
    return Result("autotune", worst.ours, worst.best, "rows/s", 0.95, f"one thread in CPU time; {note}")


class TuningComparison(msgspec.Struct, frozen=True):
    """The tuned setting of one model, its rows per second, the best rows per second, and the tuning time."""

    how: str
    ours: float
    best: float
    took_s: float


def compare_with_best(content: bytes) -> TuningComparison:
    loaded = TfliteModel(content)
    low, high = loaded.input_range
    rows = np.random.default_rng(0).uniform(low, high, (MAX_BATCH, *loaded.input_shape)).astype(np.float32)
    started_s = time.perf_counter()
    choice = autotune.tune(content, rows, 1 << 29)
    took_s = time.perf_counter() - started_s
    threads = range(1, min(count_cores(), autotune.MAX_THREADS) + 1)
    models = {(batch, count): TfliteModel(content, batch, count) for count in threads for batch in autotune.BATCH_SIZES}
    seen: dict[tuple[int, int], list[tuple[float, float]]] = {size: [] for size in models}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for size, model in models.items():
            cpu_s, wall_s = time.thread_time(), time.perf_counter()
            model.invoke(rows)
            seen[size].append((time.thread_time() - cpu_s, time.perf_counter() - wall_s))
    single_thread = {size: len(rows) / min(cpu_s for cpu_s, _ in times) for size, times in seen.items() if size[1] == 1}
    more = {size: len(rows) / statistics.median(s for _, s in times) for size, times in seen.items() if size[1] > 1}
    # The rule of autotuning: more threads only if they are clearly faster.
    clearly = [pace for pace in more.values() if pace > autotune.MIN_THREAD_SPEEDUP * max(single_thread.values())]
    ours = {**single_thread, **more}[choice.batch, choice.threads]
    return TuningComparison(str(choice), ours, max([*single_thread.values(), *clearly]), took_s)


@benchmark("subprocess")
def subprocess_overhead() -> list[Result]:
    """Measure windows of `exercise` (medians of alternating runs), and the PSS of the subprocess."""
    shipped = bundle.read(builtin.bundles_dir() / "exercise", None)
    here = runtime.load_model(shipped.manifest, shipped.model_bytes)
    windows = np.random.default_rng(0).normal(0, 1, (_MANY, *here.input_shape)).astype(np.float32)
    with SubprocessModel(shipped) as there:
        there.invoke(windows)
        results = []
        for count in (_FEW, _MANY):
            ours, reference = _median(there.invoke, here.invoke, windows[:count])
            note = f"{count} windows, {1e6 * (ours - reference):.0f} µs more"
            results.append(
                Result(f"subprocess, {count} windows", ours * 1e6, reference * 1e6, "µs", 2.0, note, less=True)
            )
        memory = Result.within(
            "subprocess, memory", pss_mb(there.pid or 0), _MAX_MIB, "MiB", "PSS of the child process"
        )
    return [*results, memory]


@benchmark("confinement")
def confined_batches() -> Result:
    """Measure batches, from stored rows to signed messages, by wall clock."""
    recorded = load(SCENARIOS["exercise"].file).rows
    names = [name for name, _ in SCENARIOS["exercise"].fields]
    with (
        device_task.device_with_task(names, "exercise") as confined,
        device_task.device_with_task(names, "exercise", confinement="off") as free,
    ):
        rows = np.resize(recorded, (_BACKLOG * free.task.window_rows, len(names)))

        def prepare() -> None:
            confined.fill(rows)
            free.fill(rows)

        pace = rates(confined.work_off, free.work_off, rounds=_BATCH_ROUNDS, prepare=prepare)
    note = f"exercise, {_BACKLOG:,} windows waiting; reference: the model in the daemon itself"
    return Result.timed("confinement", pace, "windows/s", 0.9, note)


def _median(
    ours: Callable[[Float32s], object], reference: Callable[[Float32s], object], windows: Float32s
) -> tuple[float, float]:
    took: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for invoke, times in ((ours, took[0]), (reference, took[1])):
            began = time.perf_counter()
            invoke(windows)
            times.append(time.perf_counter() - began)
    return statistics.median(took[0]), statistics.median(took[1])
