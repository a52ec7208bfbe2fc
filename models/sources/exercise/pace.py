"""How long models of one bundle take, in turns, so that whatever else the machine does is shared among them.

Measured of each, on one thread: the model with its quantization, on the wall; the same by the thread's CPU clock, which
says what batch is best; and all from readings to scores, in CPU seconds.

    python pace.py FOLDER    # of what variants.py made: with another runtime, or on another machine
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outstation.ml.model.bundle import builtin, bundle
from outstation.ml.model.inference import derived_features, features, inference, runtime, tuning
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import Inference
from outstation.ml.model.sandbox.autotune import BATCH_SIZES
from outstation.workbench.evaluation import examples

HELD_OUT = builtin.recordings_dir() / "exercise.npz"
ROUNDS = 15
MOMENT_S = 0.02
LEAST_CALLS = 5
AS_FAST = 0.98  # a batch as good as equally fast as the best: then the smallest is said to be best

Pace = dict[str, float | int]


@dataclass(frozen=True)
class Paces:
    """Of each model; `rest_us`: what a window takes beside the model, the same of all."""

    rounds: int
    rest_us: float
    each: list[Pace]


def loaded(file: Path) -> Inference:
    """The model in `file` in place of the shipped bundle's."""
    manifest = bundle.read(builtin.bundles_dir() / "exercise", None).manifest
    return Inference(manifest, inference.load_model(manifest, file.read_bytes()))


def measure(models: list[Inference]) -> Paces:
    source = examples.read(HELD_OUT, models[0], [])
    starts, _ = examples.cut_windows(source, models[0])
    cut = WindowCut(starts, len(source.values))
    spec = models[0].manifest.input
    windows = features.build_windows(derived_features.compute(source.values, source.t, spec, 0), starts, spec)
    wall = np.empty((ROUNDS, len(models), len(BATCH_SIZES)))
    cpu = np.empty_like(wall)
    for turn in range(ROUNDS):
        for i in np.roll(np.arange(len(models)), turn):
            for j, batch in enumerate(BATCH_SIZES):
                models[i].model.set_batch_size(batch)
                wall[turn, i, j], cpu[turn, i, j] = _moment(models[i], windows, batch)
    best = [_best(np.median(cpu[:, i], axis=0)) for i in range(len(models))]
    for model, j in zip(models, best, strict=True):
        model.model.set_batch_size(BATCH_SIZES[j])
    whole = np.empty((ROUNDS, len(models)))
    for turn in range(ROUNDS):
        for i in np.roll(np.arange(len(models)), turn):
            whole[turn, i] = _whole(models[i], source, cut)
    alone = np.stack([cpu[:, i, j] for i, j in enumerate(best)], axis=1)
    each = [_pace(wall, whole, i, best) for i in range(len(models))]
    return Paces(ROUNDS, round(float(np.median(whole - alone)) * 1e6, 1), each)


def _pace(wall: NDArray[np.float64], whole: NDArray[np.float64], i: int, best: list[int]) -> Pace:
    """Medians over rounds; ratios to the first model are those within a round."""

    def median(values: NDArray[np.float64], unit: float = 1.0) -> float:
        return float(f"{np.median(values) * unit:.3g}")

    one, in_batches = wall[:, i, 0], wall[:, i, best[i]]
    return {
        "us_one": median(one, 1e6),
        "times_one": median(one / wall[:, 0, 0]),
        "batch": BATCH_SIZES[best[i]],
        "us_best": median(in_batches, 1e6),
        "times_best": median(in_batches / wall[:, 0, best[0]]),
        "cpu_s_of_1000": median(whole[:, i], 1000),
    }


def _best(cost: NDArray[np.float64]) -> int:
    return int(np.flatnonzero(cost <= cost.min() / AS_FAST)[0])


def _moment(model: Inference, windows: NDArray[np.float32], batch: int) -> tuple[float, float]:
    """Seconds a window takes, on the wall and of this thread's CPU.

    On the wall of the fastest call: long ones are more likely to be interrupted, which says nothing of a model.
    """
    model.model.invoke(windows[:batch])
    calls: list[float] = []
    begun, cpu_begun = time.perf_counter(), time.thread_time()
    while len(calls) < LEAST_CALLS or time.perf_counter() - begun < MOMENT_S:
        first = len(calls) * batch % (len(windows) - batch)
        start = time.perf_counter()
        model.model.invoke(windows[first : first + batch])
        calls.append(time.perf_counter() - start)
    cpu_s = time.thread_time() - cpu_begun
    return min(calls) / batch, cpu_s / len(calls) / batch


def _whole(model: Inference, source: examples.Dataset, cut: WindowCut) -> float:
    """CPU seconds a window takes from readings to scores."""
    begun = time.process_time()
    model.run_windows(source.values, source.t, cut)
    return (time.process_time() - begun) / len(cut.starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    names = [one["file"] for one in json.loads((folder / "variants.json").read_text())]
    found = measure([loaded(folder / f"{name}.tflite") for name in names])
    print(f"{tuning.describe_machine()}; {runtime.RUNTIME_NAME}; {found.rest_us:g} µs a window beside the model")
    for name, pace in zip(names, found.each, strict=True):
        print(f"{name:16}", *(f"{key} {value:g}" for key, value in pace.items()), sep="  ")


if __name__ == "__main__":
    main()
