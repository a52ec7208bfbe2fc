"""Train what `--compare` shows beside the shipped network: a wide teacher, and a small network with and without it.

The small network's filters are half as many, so that it has a quarter of the parameters. Everything is trained with
SEEDS seeds, the small one each time alone and from the first teacher, with the same first weights and the same windows:
one run says nothing, as runs differ by as much as what is looked for. The weights of the first seed are kept, whichever
is best.

Writes teacher.npz, small_alone.npz, small_distilled.npz and small_seeds.json.

    python train_small.py    # half an hour on one core
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import keras
import network
import numpy as np
import recordings
from numpy.typing import NDArray
from recordings import HERE, Recordings
from train import Net, Recipe, fit, one_thread

TEACHER_WIDTH, SMALL_WIDTH = 1.5, 0.5
PASSES = 50
SEEDS = 5
TEACHER, ALONE, DISTILLED = HERE / "teacher.npz", HERE / "small_alone.npz", HERE / "small_distilled.npz"
SEEDS_FILE = HERE / "small_seeds.json"


def main() -> None:
    one_thread()
    train = recordings.load(recordings.REFERENCE)
    scored: dict[str, list[float]] = {"teacher": [], "alone": [], "distilled": []}

    def run(name: str, seed: int, width: float, keep: Path, teachers: tuple[Net, ...] = ()) -> Net:
        begun = time.monotonic()
        net = fit(train, Recipe(), seed, passes=PASSES, teachers=teachers, width=width)
        if name == "teacher":
            halve(net.model)
        if not scored[name]:
            network.save_weights(keep, net.model, net.mean, net.std)
        scored[name].append(accuracy(net))
        print(f"{name}, seed {seed}: {scored[name][-1]:.4f} in {time.monotonic() - begun:.0f} s", flush=True)
        return net

    teachers = [run("teacher", seed, TEACHER_WIDTH, TEACHER) for seed in range(SEEDS, 2 * SEEDS)]
    for seed in range(SEEDS):
        run("alone", seed, SMALL_WIDTH, ALONE)
        run("distilled", seed, SMALL_WIDTH, DISTILLED, (teachers[0],))
    SEEDS_FILE.write_text(json.dumps({"accuracy": scored, "passes": PASSES}, indent=1) + "\n")


def halve(model: keras.Model) -> None:
    """Round weights to half precision: the file shrinks, and what teaches is what is kept."""
    for variable in model.weights:
        variable.assign(variable.numpy().astype(np.float16).astype(np.float32))


def accuracy(net: Net) -> float:
    """Share of right answers among the windows of the held-out subjects, as float."""
    test: Recordings = recordings.load(recordings.HELD_OUT)
    windows, source = test.windows()
    label: NDArray[np.int64] = test.label[source]
    return float(np.mean(net.probabilities(windows).argmax(1) == label))


if __name__ == "__main__":
    main()
