"""The network: strided 1-D convolutions over time, written as 2-D convolutions one column wide.

Input (batch, 100, 6) float32, scaled by `scale`; output (batch, 7) logits, or probabilities with `softmax=True`.
Layers are named by hand: automatic names count up within a process and end up in the converted file.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray
from recordings import FIELDS, LABELS, ROWS

CHANNELS = ((32, 7, 2), (48, 5, 1), (64, 5, 2), (96, 3, 2), (96, 3, 1))  # filters, rows of the kernel, stride
LIMIT = 6.0  # standard deviations: an int8 input needs a range, and beyond this one it saturates


def scale(windows: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """Physical units to what the network sees; the clip is what int8 saturation does on the device."""
    return np.clip((windows - mean) / std, -LIMIT, LIMIT).astype(np.float32)


def build(*, softmax: bool = False) -> keras.Model:
    inputs = keras.Input((ROWS, len(FIELDS)), name="window")
    x = keras.ops.expand_dims(inputs, 2)
    for n, (filters, rows, stride) in enumerate(CHANNELS, 1):
        conv = layers.Conv2D(filters, (rows, 1), (stride, 1), padding="same", use_bias=False, name=f"conv{n}")
        x = conv(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm{n}")(x)
        x = layers.ReLU(name=f"relu{n}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(len(LABELS), name="logits")(x)
    if softmax:
        x = layers.Softmax(name="probability")(x)
    return keras.Model(inputs, x, name="exercise")


def save_weights(path: Path, model: keras.Model, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
    np.savez_compressed(path, mean=mean, std=std, **{v.path: v.numpy() for v in model.weights})


def load_weights(path: Path, model: keras.Model) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fill `model` from `path`; returns the scaling (mean, std) its input needs, (6,) each."""
    with np.load(path, allow_pickle=False) as z:
        for variable in model.weights:
            variable.assign(z[variable.path])
        return z["mean"], z["std"]
