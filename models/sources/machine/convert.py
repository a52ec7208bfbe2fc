"""Float weights to the int8 model, byte for byte the same each time with the pinned TensorFlow.

Ranges are from the training machines only.

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
EVERY = 2  # nd window


def convert(as_float: bool) -> bytes:
    model = network.build()
    mean, std = network.load_weights(WEIGHTS, model)
    seen = network.scale(recordings.windows(recordings.REFERENCE), mean, std)[::EVERY]
    return conversion.converted(model, seen, as_float=as_float)


if __name__ == "__main__":
    conversion.run(__doc__, MODEL, convert)
