"""Networks that might follow the shipped one in a trial of roll-outs: one that should, and two that should not.

    python candidates.py            # convert the committed float weights: candidates/*.tflite
    python candidates.py --train    # train the ill ones first, a few minutes on one core

All are as small as `train_small.py` makes them. distilled is that one. shuffled learned the labels of other
recordings, so it knows nothing. touchy saw no turned, louder or noisy windows: it is right where the sensor is as in
the recordings, and not where it is out of order.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import network
import numpy as np
import recordings
from augment import Augmentation
from convert import converted
from recordings import HERE
from train import Net, Recipe, fit, one_thread
from train_small import DISTILLED, PASSES, SMALL_WIDTH, accuracy

FOLDER = HERE / "candidates"
WEIGHTS = {"distilled": DISTILLED, "shuffled": FOLDER / "shuffled.npz", "touchy": FOLDER / "touchy.npz"}
_SEED = 7
# It learns nothing however long it looks.
_SHUFFLED_PASSES = 15
_AS_RECORDED = Augmentation(tempo=0.0, mirror=0.5, turn=0.0, far_turns=0.0, accel_gain=0.0, gyro_gain=0.0, noise=0.0)


def shuffled() -> Net:
    train = recordings.load(recordings.REFERENCE)
    others = np.random.default_rng(_SEED).permutation(train.label)
    return fit(replace(train, label=others), Recipe(), _SEED, passes=_SHUFFLED_PASSES, width=SMALL_WIDTH)


def touchy() -> Net:
    train = recordings.load(recordings.REFERENCE)
    return fit(train, Recipe(), _SEED, passes=PASSES, width=SMALL_WIDTH, augmentation=_AS_RECORDED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    given = parser.parse_args()
    one_thread()
    FOLDER.mkdir(exist_ok=True)
    given.output.mkdir(exist_ok=True)
    if given.train:
        for make in (shuffled, touchy):
            net = make()
            network.save_weights(WEIGHTS[make.__name__], net.model, net.mean, net.std)
            print(f"{make.__name__}: accuracy {accuracy(net):.3f} on held-out subjects, as float", flush=True)
    for name, weights in WEIGHTS.items():
        model = converted(weights, "int8", SMALL_WIDTH)
        (given.output / f"{name}.tflite").write_bytes(model)
        print(f"{name}.tflite: {len(model):,} bytes")


if __name__ == "__main__":
    main()
