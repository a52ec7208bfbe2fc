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


def build(*, width: float = 1.0, softmax: bool = False) -> keras.Model:
    """Logits, or probabilities; each layer has `width` times its filters."""
    inputs = keras.Input((ROWS, len(FIELDS)), name="window")
    x = keras.ops.expand_dims(inputs, 2)
    for n, (filters, rows, stride) in enumerate(CHANNELS, 1):
        filters = round(width * filters)
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


def settle(path: Path, model: keras.Model) -> None:
    """Give what batch normalisation multiplies by, once it is folded, the same bits on every CPU.

    TensorFlow takes the reciprocal root from the CPU's own approximation, which differs between makers in the last bit.
    `path` may hold the products as `norm…/factor`; else they are rounded from exact ones. Gamma, and where that is not
    enough the variance, is moved until this CPU's product is that.
    """
    with np.load(path, allow_pickle=False) as z:
        kept = {name: z[name] for name in z.files if name.endswith("/factor")}
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            gamma, variance = layer.gamma.numpy(), layer.moving_variance.numpy()
            exact = gamma / np.sqrt(variance.astype(np.float64) + layer.epsilon)
            factor = kept.get(f"{layer.name}/factor", exact.astype(np.float32))
            gamma, variance = _reaching(factor, variance, np.float32(layer.epsilon))
            layer.gamma.assign(gamma)
            layer.moving_variance.assign(variance)


def _reaching(
    factor: NDArray[np.float32], variance: NDArray[np.float32], epsilon: np.float32
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gamma and variance (n,) whose product on this CPU is `factor` (n,)."""
    gamma, settled, left = np.ones_like(factor), variance.copy(), np.ones(len(factor), bool)
    for step in range(64):
        moved = variance * np.float32(1 + step / 8)
        root = np.asarray(keras.ops.rsqrt(moved + epsilon))
        for last in (0, 1, -1, 2, -2):
            tried = _next((factor / root).astype(np.float32), last)
            hit = left & (root * tried == factor)
            gamma[hit], settled[hit] = tried[hit], moved[hit]
            left &= ~hit
        if not left.any():
            return gamma, settled
    raise SystemExit(f"{left.sum()} channels cannot be given their factor on this CPU; report it with the CPU's name")


def _next(values: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
    """The float32 values that many representable ones further from zero."""
    return (values.view(np.int32) + np.int32(steps)).view(np.float32)


def load_weights(path: Path, model: keras.Model) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fill `model` from `path`; returns the scaling (mean, std) its input needs, (6,) each."""
    with np.load(path, allow_pickle=False) as z:
        for variable in model.weights:
            variable.assign(z[variable.path])
        return z["mean"], z["std"]
