"""What `convert.py` of solar and machine have in common: float Keras weights to int8, and the command line.

Full int8: weights, activations, input and output. Training is not reproducible across CPUs, conversion is, which is why
the float weights are committed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray


def converted(model: tf.keras.Model, seen: NDArray[np.float32], *, as_float: bool) -> bytes:
    """`seen` (n, …): scaled inputs that tell the ranges."""

    def representative() -> Iterator[list[NDArray[np.float32]]]:
        for one in seen:
            yield [one[None]]

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if not as_float:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = tf.int8
        converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # Keras lists every variable it exports
        return bytes(converter.convert())


def run(about: str | None, default: Path, convert: Callable[[bool], bytes]) -> None:
    """Write what `convert` gives, of floats or not, to the file that is asked for."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--float", action="store_true", help="not quantized, to compare with")
    given = parser.parse_args()
    model = convert(given.float)
    given.output.write_bytes(model)
    print(f"{given.output.name}: {len(model):,} bytes")
