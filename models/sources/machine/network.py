"""The network: MLPerf Tiny's ad01, an autoencoder of dense layers around eight values, on 160 inputs for its 640.

Layers are named by hand: automatic names count up within a process and end up in the converted file.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray
from recordings import BANDS, FRAMES

INPUTS = FRAMES * BANDS
UNITS = (128, 128, 128, 128, 8, 128, 128, 128, 128)
LIMIT = 6.0  # standard deviations: an int8 input needs a range, and beyond this one it saturates


def scale(windows: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.float32]:
    """dB to what the network sees; the clip is what int8 saturation does on the device."""
    return np.clip((windows - np.tile(mean, FRAMES)) / np.tile(std, FRAMES), -LIMIT, LIMIT).astype(np.float32)


def build() -> keras.Model:
    """What is converted: input and output (batch, 160), scaled by `scale`."""
    inputs = keras.Input((INPUTS,), name="window")
    x = inputs
    for n, units in enumerate(UNITS, 1):
        x = layers.Dense(units, "relu", name=f"dense{n}")(x)
    return keras.Model(inputs, layers.Dense(INPUTS, name="again")(x), name="machine")


def build_to_train() -> keras.Model:
    """The same with batch normalization behind each layer."""
    inputs = keras.Input((INPUTS,), name="window")
    x = inputs
    for n, units in enumerate(UNITS, 1):
        x = layers.Dense(units, use_bias=False, name=f"dense{n}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm{n}")(x)
        x = layers.ReLU(name=f"relu{n}")(x)
    return keras.Model(inputs, layers.Dense(INPUTS, name="again")(x), name="machine")


def save_weights(path: Path, trained: keras.Model, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
    """Of `build`'s layers, with what was normalized folded into them.

    Here and not by the converter, which takes reciprocal roots from the CPU: they differ in the last bit.
    """
    kept: dict[str, NDArray[np.float32]] = {"mean": mean, "std": std}
    for n in range(1, len(UNITS) + 1):
        norm = trained.get_layer(f"norm{n}")
        gamma, beta, middle, variance = (w.astype(np.float64) for w in norm.get_weights())
        factor = gamma / np.sqrt(variance + norm.epsilon)
        kernel = trained.get_layer(f"dense{n}").get_weights()[0]
        kept[f"dense{n}/kernel"] = (kernel * factor).astype(np.float32)
        kept[f"dense{n}/bias"] = (beta - middle * factor).astype(np.float32)
    kept["again/kernel"], kept["again/bias"] = trained.get_layer("again").get_weights()
    np.savez_compressed(path, **kept)


def load_weights(path: Path, model: keras.Model) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fill `build`'s model from `path`; returns the scaling (mean, std) its input needs, (32,) each."""
    with np.load(path, allow_pickle=False) as z:
        for variable in model.weights:
            variable.assign(z[variable.path])
        return z["mean"], z["std"]
