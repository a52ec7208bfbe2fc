"""Float weights to the int8 model, byte for byte the same each time with the pinned TensorFlow.

Ranges are from the training time only.

    python convert.py [-o model.tflite] [--float]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import conversion
import network
import recordings

WEIGHTS = recordings.HERE / "weights.npz"
MODEL = recordings.HERE / "model.tflite"
EVERY = 7  # th row: all times of day and all seasons


def convert(as_float: bool) -> bytes:
    model = network.build()
    mean, std = network.load_weights(WEIGHTS, model)
    network.in_watts(model)
    seen = network.scale(recordings.load(recordings.REFERENCE).features(), mean, std)[::EVERY]
    return conversion.converted(model, seen, as_float=as_float)


if __name__ == "__main__":
    conversion.run(__doc__, MODEL, convert)
