"""Train the float network; every choice here was made by cross-validation on the training subjects.

Several teachers are trained on the hard labels; one student then learns from their average opinion and from the labels.
Writes `weights.npz`, `crossval.npz` (each training subject predicted by a net that never saw them: calibration comes
from it), the score table and the lines of `bundle.toml` that follow from them.

    python train.py                    # cross-validation and the final net, about half an hour on two cores
    python train.py --leave-one-out    # the recipe on all ten subjects in turn: leave_one_out.npz
"""

from __future__ import annotations

import argparse
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import calibration
import keras
import network
import numpy as np
import recordings
import tensorflow as tf
from augment import Augmentation, one_pass
from convert import WEIGHTS
from numpy.typing import NDArray
from recordings import LABELS, Recordings

HERE = recordings.HERE
CROSSVAL = HERE / "crossval.npz"
LEAVE_ONE_OUT = HERE / "leave_one_out.npz"
SCORE_TABLE = HERE / "score_table.json"
SPEC = HERE / "bundle.toml"


@dataclass(frozen=True)
class Recipe:
    teachers: int = 3
    teacher_passes: int = 30
    student_passes: int = 50
    opinion: float = 0.7  # weight of the teachers against the label
    batch: int = 64
    rate: float = 2e-3  # highest; cosine decay after a twentieth of the steps
    decay: float = 1e-4


@dataclass(frozen=True)
class Net:
    model: keras.Model
    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    def probabilities(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 100, 6) in physical units to (n, 7)."""
        logits = self.model(network.scale(windows, self.mean, self.std), training=False)
        return np.asarray(tf.nn.softmax(logits))


def fit(
    train: Recordings,
    recipe: Recipe,
    seed: int,
    *,
    passes: int,
    teachers: tuple[Net, ...] = (),
    width: float = 1.0,
    augmentation: Augmentation | None = None,
) -> Net:
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    mean, std = train.rows.mean(0, dtype=np.float64), train.rows.std(0, dtype=np.float64)
    net = Net(network.build(width=width), mean.astype(np.float32), std.astype(np.float32))
    variables = net.model.trainable_variables
    augmentation = augmentation or Augmentation()
    steps = passes * int(sum(np.diff(train.starts) // augmentation.every) // recipe.batch)
    warm = steps // 20
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps - warm, warmup_target=recipe.rate, warmup_steps=warm)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.decay)
    optimizer.build(variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(y, net.model(x, training=True)))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for _ in range(passes):
        windows, label = one_pass(rng, train, net.std, augmentation)
        target = np.eye(len(LABELS), dtype=np.float32)[label]
        if teachers:
            opinion = np.mean([t.probabilities(windows) for t in teachers], axis=0)
            target = recipe.opinion * opinion + (1 - recipe.opinion) * target
        x = network.scale(windows, net.mean, net.std)
        for i in range(0, len(x) - recipe.batch + 1, recipe.batch):
            step(tf.constant(x[i : i + recipe.batch]), tf.constant(target[i : i + recipe.batch].astype(np.float32)))
    return net


def distil(train: Recordings, recipe: Recipe, seed: int) -> Net:
    teachers = tuple(fit(train, recipe, seed + 1 + k, passes=recipe.teacher_passes) for k in range(recipe.teachers))
    return fit(train, recipe, seed, passes=recipe.student_passes, teachers=teachers)


def predict_without(
    everyone: Recordings, subject: int, recipe: Recipe
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One fold: probabilities (w, 7) of the windows of `subject`, from a net that never saw them, and labels (w,)."""
    one_thread()
    net = distil(everyone.where(everyone.subject != subject), recipe, seed=1000 * subject)
    test = everyone.where(everyone.subject == subject)
    windows, source = test.windows()
    print(f"subject {subject}: done", flush=True)
    return net.probabilities(windows), test.label[source].astype(np.int64)


def one_thread() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def leave_subjects_out(everyone: Recordings, recipe: Recipe, path: Path) -> None:
    subjects = [int(s) for s in np.unique(everyone.subject)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        folds = list(pool.map(predict_without, [everyone] * len(subjects), subjects, [recipe] * len(subjects)))
    np.savez_compressed(
        path,
        probability=np.concatenate([p for p, _ in folds]),
        label=np.concatenate([y for _, y in folds]).astype(np.int8),
        subject=np.repeat(subjects, [len(y) for _, y in folds]).astype(np.int8),
    )
    for subject, (p, y) in zip(subjects, folds, strict=True):
        print(f"subject {subject:2}: accuracy {np.mean(p.argmax(1) == y):.4f}")


def write_spec(mean: NDArray[np.float32], std: NDArray[np.float32], temperature: float) -> None:
    text = SPEC.read_text()
    for key, value in (("mean", mean.tolist()), ("std", std.tolist()), ("temperature", temperature)):
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {json.dumps(value)}", text)
    SPEC.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leave-one-out", action="store_true")
    recipe = Recipe()
    train = recordings.load(recordings.REFERENCE)
    if parser.parse_args().leave_one_out:
        leave_subjects_out(recordings.join(train, recordings.load(recordings.HELD_OUT)), recipe, LEAVE_ONE_OUT)
        return
    leave_subjects_out(train, recipe, CROSSVAL)
    net = distil(train, recipe, seed=0)
    network.save_weights(WEIGHTS, net.model, net.mean, net.std)
    out_of_fold = calibration.load(CROSSVAL)
    temperature = calibration.fit_temperature(out_of_fold)
    SCORE_TABLE.write_text(json.dumps(calibration.score_table(out_of_fold, temperature)) + "\n")
    write_spec(net.mean, net.std, temperature)


if __name__ == "__main__":
    main()
