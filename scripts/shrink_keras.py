#!/usr/bin/env python3
"""Quantize and distil your own Keras model, and compare the results on held-out data.

    python scripts/shrink_keras.py model.keras data.npz -o small

DATA is an `.npz` of `x` (n, …), as the model takes it, and `y` (n,): classes, or numbers of a regression. With `x_test`
and `y_test` those are held out; otherwise every fifth row is. Rows that are neighbours in time are alike: then give
`x_test` of other recordings.

Variants, each a `.tflite` file in the folder of `-o`:
- float32: as trained; float16: half the bytes, converted back for computing
- dynamic: int8 weights, activations in floats
- int8: weights and activations; inputs and outputs are int8, too. The form that devices compute fastest
- distilled-int8: a student with `--width` of the units and filters, trained on the model's softened answers
  (Hinton et al. 2015), then quantized as int8

It needs Python 3.11 to 3.13 and `pip install tensorflow-cpu==2.21.0`. Then `outstation model pack --from` takes the
chosen file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

Floats = NDArray[np.float32]
_CALIBRATION_ROWS = 300
_TIMED_ROWS = 200
_HOLD_OUT_EVERY = 5
_Z = 1.96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="Keras model, .keras or .h5")
    parser.add_argument("data", type=Path, metavar="DATA", help=".npz of x and y")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the models and comparison.json")
    parser.add_argument("--width", type=float, default=0.5, help="units and filters of the student, as a share")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of the student; 0: no student")
    parser.add_argument("--temperature", type=float, default=3.0, help="softens the answers that the student learns")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # A folder beside this script has the name of a package that TensorFlow imports.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "tensorflow"
        problem = "is missing" if is_missing else f"does not load ({error})"
        print(f"shrink_keras: TensorFlow {problem}: pip install tensorflow-cpu==2.21.0", file=sys.stderr)
        return 2
    tf.keras.utils.set_random_seed(options.seed)
    try:
        model = tf.keras.models.load_model(options.model, compile=False)
        x, y, x_test, y_test = read_data(options.data)
    except (OSError, ValueError, KeyError) as problem:
        print(f"shrink_keras: {problem}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    is_classifier = np.issubdtype(y.dtype, np.integer)
    variants = {kind: convert(tf, model, x, kind) for kind in ("float32", "float16", "dynamic", "int8")}
    if options.epochs > 0:
        student = distil(tf, model, x, options, is_classifier=is_classifier)
        variants["distilled-int8"] = convert(tf, student, x, "int8")
    rows = []
    for name, content in variants.items():
        (options.out / f"{name}.tflite").write_bytes(content)
        rows.append(measure(tf, name, content, x_test, y_test, is_classifier=is_classifier))
    compare(rows, y_test, is_classifier=is_classifier)
    shown = [{key: value for key, value in row.items() if key != "answers"} for row in rows]
    (options.out / "comparison.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    print(to_markdown(shown, is_classifier=is_classifier))
    return 0


def read_data(path: Path) -> tuple[Floats, NDArray[Any], Floats, NDArray[Any]]:
    """Return training and held-out rows with their labels. Raises ValueError, KeyError, OSError."""
    with np.load(path, allow_pickle=False) as arrays:
        x, y = np.asarray(arrays["x"], np.float32), np.asarray(arrays["y"])
        if "x_test" in arrays:
            test = np.asarray(arrays["x_test"], np.float32), np.asarray(arrays["y_test"])
        else:
            if len(x) != len(y):
                raise ValueError(f"{path}: x and y need as many rows, they have {len(x)} and {len(y)}")
            held_out = np.arange(len(x)) % _HOLD_OUT_EVERY == 0
            test = x[held_out], y[held_out]
            x, y = x[~held_out], y[~held_out]
        for rows, labels in ((x, y), test):
            if len(rows) != len(labels) or not len(rows):
                raise ValueError(f"{path}: x and y need as many rows, at least one of each set")
    return x, y, *test


def convert(tf: Any, model: Any, x: Floats, kind: str) -> bytes:
    """Convert a Keras model; int8 activations get the ranges that training rows have."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        picked = x[np.linspace(0, len(x) - 1, min(_CALIBRATION_ROWS, len(x)), dtype=np.int64)]

        def representative() -> Iterator[list[Floats]]:
            for row in picked:
                yield [row[None]]

        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    # Keras reports what it saves on stdout, where the table goes.
    with contextlib.redirect_stdout(sys.stderr):
        return bytes(converter.convert())


def distil(tf: Any, teacher: Any, x: Floats, options: argparse.Namespace, *, is_classifier: bool) -> Any:
    """Train a narrower copy of the model on the model's own answers."""
    # A model that was loaded has no `output` before it is called, but `outputs`.
    outputs = {tensor._keras_history.operation.name for tensor in teacher.outputs}

    def narrow(layer: Any) -> Any:
        config = layer.get_config()
        for key in ("units", "filters"):
            if key in config and layer.name not in outputs:
                config[key] = max(1, math.ceil(config[key] * options.width))
        return layer.__class__.from_config(config)

    student = tf.keras.models.clone_model(teacher, clone_function=narrow)
    copy_adapted_layers(teacher, student)
    answers = np.asarray(teacher.predict(x, verbose=0), np.float32)
    loss: Any = "mse"
    if is_classifier:
        answers = soften(answers, options.temperature)
        loss = SoftenedLoss(tf, options.temperature) if answers.shape[-1] > 1 else "binary_crossentropy"
    student.compile(optimizer=tf.keras.optimizers.Adam(1e-3), loss=loss)
    student.fit(x, answers, epochs=options.epochs, batch_size=64, verbose=0)
    return student


def copy_adapted_layers(teacher: Any, student: Any) -> None:
    """Give a copy of a model what layers such as Normalization learned from data before the training."""
    layers = (model._flatten_layers(include_self=False) for model in (teacher, student))
    for source, copy in zip(*layers, strict=True):
        if hasattr(source, "finalize_state") and source.weights:
            copy.set_weights(source.get_weights())
            copy.finalize_state()


def soften(probabilities: Floats, temperature: float) -> Floats:
    """Return probabilities (n, K) at a temperature: p ∝ p^(1/T)."""
    if probabilities.shape[-1] == 1:
        return probabilities
    powered = np.power(np.clip(probabilities, 1e-7, 1.0), 1.0 / temperature)
    return np.asarray(powered / powered.sum(axis=-1, keepdims=True), np.float32)


class SoftenedLoss:
    """Cross-entropy of softened answers, for students whose last layer is a softmax."""

    def __init__(self, tf: Any, temperature: float) -> None:
        self._tf, self._temperature = tf, temperature

    def __call__(self, truth: Any, answers: Any) -> Any:
        tf = self._tf
        powered = tf.pow(tf.clip_by_value(answers, 1e-7, 1.0), 1.0 / self._temperature)
        softened = powered / tf.reduce_sum(powered, axis=-1, keepdims=True)
        return -tf.reduce_sum(truth * tf.math.log(softened), axis=-1)


def measure(tf: Any, name: str, content: bytes, x: Floats, y: NDArray[Any], *, is_classifier: bool) -> dict[str, Any]:
    """Run a `.tflite` model over the held-out rows, one at a time as devices may; return its figures."""
    interpreter = tf.lite.Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    [into], [out] = interpreter.get_input_details(), interpreter.get_output_details()
    rows, answers, seconds = quantize(x, into), [], []
    for row in rows:
        interpreter.set_tensor(into["index"], row[None])
        start_s = time.perf_counter()
        interpreter.invoke()
        seconds.append(time.perf_counter() - start_s)
        answers.append(interpreter.get_tensor(out["index"])[0])
    values = dequantize(np.stack(answers), out).reshape(len(x), -1)
    predicted: NDArray[Any] = values[:, 0]
    if is_classifier:
        predicted = values.argmax(axis=1) if values.shape[1] > 1 else values[:, 0] > 0.5
    right = (predicted == y) if is_classifier else np.abs(predicted - y)
    return {
        "name": name,
        "bytes": len(content),
        "accuracy" if is_classifier else "mae": float(np.mean(right)),
        "us_per_row": float(np.median(seconds[:_TIMED_ROWS]) * 1e6),
        "answers": predicted,
    }


def quantize(values: Floats, tensor: dict[str, Any]) -> NDArray[Any]:
    if np.dtype(tensor["dtype"]).kind == "f":
        return values
    (scale, zero), limits = tensor["quantization"], np.iinfo(tensor["dtype"])
    return np.asarray(np.clip(np.rint(values / np.float32(scale)) + zero, limits.min, limits.max), tensor["dtype"])


def dequantize(numbers: NDArray[Any], tensor: dict[str, Any]) -> Floats:
    if np.dtype(tensor["dtype"]).kind == "f":
        return numbers.astype(np.float32)
    scale, zero = tensor["quantization"]
    return np.asarray((numbers.astype(np.float32) - zero) * np.float32(scale), np.float32)


def compare(rows: list[dict[str, Any]], y: NDArray[Any], *, is_classifier: bool) -> None:
    """Add the paired difference to float32, with its 95 % interval, and the share of equal answers."""
    base = rows[0]["answers"]
    for row in rows:
        ours = row["answers"]
        if is_classifier:
            difference = (ours == y).astype(np.float64) - (base == y)
            row["agreement"] = float(np.mean(ours == base))
        else:
            difference = np.abs(ours - y) - np.abs(base - y)
        spread = _Z * float(difference.std()) / math.sqrt(len(difference))
        mean = float(difference.mean())
        row["difference"], row["low"], row["high"] = mean, mean - spread, mean + spread


def to_markdown(rows: list[dict[str, Any]], *, is_classifier: bool) -> str:
    metric = "accuracy" if is_classifier else "mae"
    lines = [
        f"| model | bytes | {metric} | less float32 (95 %) | same answer | µs a row |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        same = f"{row['agreement']:.3f}" if is_classifier else "–"
        difference = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        figures = f"{row['bytes']:,} | {row[metric]:.4f} | {difference} | {same} | {row['us_per_row']:.1f}"
        lines.append(f"| {row['name']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
