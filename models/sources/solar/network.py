"""The network: three dense layers from six features of one row to watts; less than none is none.

Layers are named by hand: automatic names count up within a process and end up in the converted file.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray
from recordings import FEATURES

UNITS = (32, 32, 16)
LIMIT = 4.0  # standard deviations: an int8 input needs a range, and beyond this one it saturates
# What the output layer's numbers are multiples of, in W, so that training sees values near one.
POWER_W = 1000.0


def scale(features: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """Physical units to what the network sees; the clip is what int8 saturation does on the device."""
    return np.clip((features - mean) / std, -LIMIT, LIMIT).astype(np.float32)


def build() -> keras.Model:
    """Input (batch, 6) scaled by `scale`, output (batch, 1) in kW."""
    inputs = keras.Input((len(FEATURES),), name="features")
    x = inputs
    for n, units in enumerate(UNITS, 1):
        x = layers.Dense(units, "relu", name=f"dense{n}")(x)
    x = layers.Dense(1, "relu", name="power")(x)
    return keras.Model(inputs, x, name="solar")


def save_weights(path: Path, model: keras.Model, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
    np.savez_compressed(path, mean=mean, std=std, **{v.path: v.numpy() for v in model.weights})


def load_weights(path: Path, model: keras.Model) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fill `model` from `path`; returns the scaling (mean, std) its input needs, (6,) each."""
    with np.load(path, allow_pickle=False) as z:
        for variable in model.weights:
            variable.assign(z[variable.path])
        return z["mean"], z["std"]


def in_watts(model: keras.Model) -> None:
    """The last layer's kW become W."""
    last = model.get_layer("power")
    last.set_weights([w * POWER_W for w in last.get_weights()])
