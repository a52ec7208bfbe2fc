"""Float weights to the int8 model, byte for byte the same each time with the pinned TensorFlow.

Full int8: weights, activations, input and output; ranges from the training time only. Training is not reproducible
across CPUs, conversion is, which is why the float weights are committed.

    python convert.py [-o model.tflite] [--float]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import network
import numpy as np
import recordings
import tensorflow as tf
from numpy.typing import NDArray

WEIGHTS = recordings.HERE / "weights.npz"
MODEL = recordings.HERE / "model.tflite"
EVERY = 7  # th row: all times of day and all seasons


def convert(weights: Path, *, as_float: bool = False) -> bytes:
    model = network.build()
    mean, std = network.load_weights(weights, model)
    network.in_watts(model)
    seen = network.scale(recordings.load(recordings.REFERENCE).features(), mean, std)[::EVERY]

    def representative() -> Iterator[list[NDArray[np.float32]]]:
        for row in seen:
            yield [row[None]]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if not as_float:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.int8
        converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable it exports
        return bytes(converter.convert())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=MODEL)
    parser.add_argument("--float", action="store_true", help="not quantized, to compare with")
    given = parser.parse_args()
    model = convert(WEIGHTS, as_float=given.float)
    given.output.write_bytes(model)
    print(f"{given.output.name}: {len(model):,} bytes")


if __name__ == "__main__":
    main()
