"""Makes the tiny models beside this file; the result is committed, so run this only to add one.

    .venv-models/bin/python tests/models/make.py [NAME …]     (scripts/build_models makes .venv-models)

Weights are written down, not trained: the classifier names the nearest of three centres, the autoencoder keeps the
slow half of a window, the regression is a weighted sum. What the models answer can be checked by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]

HERE = Path(__file__).parent
CENTRES = np.array([[2, 0, 0, -1], [0, 2, -1, 0], [-1, -1, 2, 2]], np.float32)
WEIGHTS = np.array([[0.5], [-1.0], [0.25], [2.0]], np.float32)
ROWS, FIELDS = 8, 2


def classifier() -> Any:
    """(4,) → probabilities (3,): softmax of x·c - |c|²/2."""
    x = tf.keras.Input((4,), name="x")
    out = tf.keras.layers.Dense(3, activation="softmax", name="classes")(x)
    model = tf.keras.Model(x, out)
    model.set_weights([CENTRES.T, -np.square(CENTRES).sum(1) / 2])
    return model


def regression() -> Any:
    """(4,) → (1,): x·w."""
    x = tf.keras.Input((4,), name="x")
    model = tf.keras.Model(x, tf.keras.layers.Dense(1, name="sum")(x))
    model.set_weights([WEIGHTS, np.zeros(1, np.float32)])
    return model


def autoencoder() -> Any:
    """(8, 2) → (8, 2): each pair of rows is replaced by its mean, so that what jumps from row to row is lost."""
    x = tf.keras.Input((ROWS, FIELDS), name="x")
    flat = tf.keras.layers.Reshape((ROWS * FIELDS,), name="flat")(x)
    code = tf.keras.layers.Dense(ROWS * FIELDS // 2, use_bias=False, name="code")(flat)
    back = tf.keras.layers.Dense(ROWS * FIELDS, use_bias=False, name="back")(code)
    model = tf.keras.Model(x, tf.keras.layers.Reshape((ROWS, FIELDS), name="out")(back))
    encode = np.zeros((ROWS * FIELDS, ROWS * FIELDS // 2), np.float32)
    for row in range(ROWS):
        for field in range(FIELDS):
            encode[row * FIELDS + field, row // 2 * FIELDS + field] = 0.5
    model.set_weights([encode, 2 * encode.T])
    return model


def two_inputs() -> Any:
    a, b = tf.keras.Input((2,), name="a"), tf.keras.Input((2,), name="b")
    return tf.keras.Model([a, b], tf.keras.layers.Add(name="sum")([a, b]))


def joined() -> Any:
    """Rows (8, 2) and weather (3, 1) → three states, wear, and two flags.

    The states are those of `classifier` for the mean row and the mean weather; wear is the weather's last value less
    its first; a flag is the sigmoid of a column's mean.
    """
    rows, weather = tf.keras.Input((ROWS, FIELDS), name="rows"), tf.keras.Input((3, 1), name="weather")
    mean = tf.keras.layers.GlobalAveragePooling1D(name="mean")(rows)
    air = tf.keras.layers.GlobalAveragePooling1D(name="air")(weather)
    both = tf.keras.layers.Concatenate(name="both")([mean, air])
    state = tf.keras.layers.Dense(3, activation="softmax", name="state")(both)
    wear = tf.keras.layers.Dense(1, use_bias=False, name="wear")(tf.keras.layers.Flatten(name="flat")(weather))
    flags = tf.keras.layers.Dense(2, activation="sigmoid", use_bias=False, name="flags")(mean)
    model = tf.keras.Model([rows, weather], {"state": state, "wear": wear, "flags": flags})
    model.get_layer("state").set_weights([CENTRES.T[:3], -np.square(CENTRES).sum(1) / 2])
    model.get_layer("wear").set_weights([np.array([[-1], [0], [1]], np.float32)])
    model.get_layer("flags").set_weights([np.eye(2, dtype=np.float32)])
    return model


def two_outputs() -> Any:
    x = tf.keras.Input((2,), name="x")
    return tf.keras.Model(x, [tf.keras.layers.ReLU(name="up")(x), tf.keras.layers.ReLU(max_value=1, name="low")(x)])


class Stateful(tf.Module):  # type: ignore[misc]
    """Adds each input to all earlier ones."""

    def __init__(self) -> None:
        super().__init__(name="stateful")
        self.total = tf.Variable(tf.zeros((1, 4)), name="total")

    @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32, name="x")])  # type: ignore[untyped-decorator]
    def call(self, x: Any) -> Any:
        return self.total.assign_add(x)


def function(call: Callable[[Any], Any], batch: int | None) -> Any:
    """A converter of a plain function of (batch, 4)."""
    traced = tf.function(call, input_signature=[tf.TensorSpec((batch, 4), tf.float32, name="x")])
    return tf.lite.TFLiteConverter.from_concrete_functions([traced.get_concrete_function()])


def quantized(model: Any, shapes: tuple[Any, ...], kind: Any) -> bytes:
    """Quantize a model of one input of `shapes`, or of several."""
    inputs = shapes if isinstance(shapes[0], tuple) else (shapes,)

    def representative() -> Iterator[Any]:
        random = np.random.default_rng(1)
        for _ in range(200):
            values = [np.clip(random.normal(0, 1.5, (1, *shape)), -4, 4).astype(np.float32) for shape in inputs]
            # The converter orders several inputs by itself.
            yield (
                values
                if len(values) == 1
                else {tensor.name: value for tensor, value in zip(model.inputs, values, strict=True)}
            )

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = representative
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = kind
    return bytes(converter.convert())


def floating(model: Any) -> bytes:
    return bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def endless(x: Any) -> Any:
    """Halves what it was given until that is 1."""
    return tf.while_loop(lambda i: tf.reduce_all(i < 1.0), lambda i: (i * 0.5,), [x])[0]


def greedy(x: Any) -> Any:
    """The sum of 2^26 copies: 1 GiB on the way."""
    return tf.reduce_sum(tf.tile(x, [1, 1 << 26]), axis=1, keepdims=True)


def stateful() -> bytes:
    module = Stateful()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.call.get_concrete_function()], module)
    converter.experimental_enable_resource_variables = True
    return bytes(converter.convert())


def flex() -> bytes:
    converter = function(lambda x: tf.math.cumprod(x, axis=1), None)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS, tf.lite.OpsSet.SELECT_TF_OPS]
    return bytes(converter.convert())


def main() -> None:
    made = {
        "classify_int8": quantized(classifier(), (4,), tf.int8),
        "classify_uint8": quantized(classifier(), (4,), tf.uint8),
        "classify_float32": floating(classifier()),
        "regress_int8": quantized(regression(), (4,), tf.int8),
        "anomaly_int8": quantized(autoencoder(), (ROWS, FIELDS), tf.int8),
        "two_inputs": floating(two_inputs()),
        "two_outputs": floating(two_outputs()),
        "joined_float32": floating(joined()),
        "joined_int8": quantized(joined(), ((ROWS, FIELDS), (3, 1)), tf.int8),
        "fixed_batch": bytes(function(lambda x: tf.nn.relu(x @ CENTRES.T), 1).convert()),
        "mixes_rows": bytes(function(lambda x: x - tf.reduce_mean(x, axis=0, keepdims=True), None).convert()),
        "loses_rows": bytes(function(lambda x: tf.reduce_sum(x, axis=0, keepdims=True), None).convert()),
        "endless": bytes(function(endless, 1).convert()),
        "greedy": bytes(function(greedy, 1).convert()),
        # This one converts and loads, and then answers one row with none.
        "no_rows": bytes(function(tf.math.lgamma, None).convert()),
        "stateful": stateful(),
        "flex": flex(),
    }
    for name, content in made.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        (HERE / f"{name}.tflite").write_bytes(content)
        print(f"{name}.tflite {len(content):,} bytes")


if __name__ == "__main__":
    main()
