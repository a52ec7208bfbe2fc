"""Float weights to a .tflite, byte for byte the same each time with the pinned TensorFlow.

What ships is full int8: weights, activations, input and output; ranges from the training subjects only. Training is
not reproducible across CPUs, conversion is, which is why the float weights are committed.

    python convert.py [-o model.tflite]
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
# Operations, and the type of input and output.
INTEGER = {
    "int8": (tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.int8),
    "int16x8": (tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8, tf.int16),
}


def convert(weights: Path) -> bytes:
    """The model that ships."""
    return converted(weights, "int8")


def converted(weights: Path, kind: str, width: float = 1.0) -> bytes:
    """`kind`: float32; float16 (weights only); dynamic (int8 weights, ranges when it runs); int8; int16x8."""
    model = network.build(width=width, softmax=True)
    mean, std = network.load_weights(weights, model)
    network.settle(weights, model)
    windows, _ = recordings.load(recordings.REFERENCE).windows()
    seen = network.scale(windows, mean, std)

    def representative() -> Iterator[list[NDArray[np.float32]]]:
        for window in seen:
            yield [window[None]]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind in INTEGER:
        operations, tensors = INTEGER[kind]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [operations]
        converter.inference_input_type = tensors
        converter.inference_output_type = tensors
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable it exports
        return bytes(converter.convert())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=MODEL)
    output = parser.parse_args().output
    model = convert(WEIGHTS)
    output.write_bytes(model)
    print(f"{output.name}: {len(model):,} bytes")


if __name__ == "__main__":
    main()
