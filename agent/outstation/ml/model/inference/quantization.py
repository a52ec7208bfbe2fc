"""Quantization: how a tensor's numbers stand for real ones, value = (number - zero point) * scale."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s
from outstation.ml.kernel import library, model_input

# Values quantized at once by NumPy: they fit the cache of a small processor, and keep its calls few.
_BLOCK = 1 << 15
Kind = Literal[
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
]


class Quantization(msgspec.Struct, frozen=True):
    """Type of a tensor's numbers, by its name in NumPy, with `scale` and zero point of whole numbers."""

    kind: Kind
    scale: float = 1.0
    zero: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.kind)

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value; no limits for floats."""
        if self.is_float:
            return -math.inf, math.inf
        limits = np.iinfo(self.dtype)
        return (limits.min - self.zero) * self.scale, (limits.max - self.zero) * self.scale

    @property
    def input_range(self) -> tuple[float, float]:
        """Lowest and highest value of an input; for floats the range of most values."""
        return (-3.0, 3.0) if self.is_float else self.range

    def quantize(self, values: Float32s) -> NDArray[Any]:
        """Return the numbers of `values`, clipped to the type; NaN counts as 0 in whole numbers."""
        if self.is_float:
            return values.astype(self.dtype, copy=False)
        compiled = library.kernel()
        if compiled is not None:
            quantized = model_input.quantize(compiled, values, self.scale, self.zero, self.dtype)
            if quantized is not None:
                return quantized
        return quantize_by_numpy(values, self)

    def dequantize(self, numbers: NDArray[Any]) -> Float32s:
        if self.is_float:
            return numbers.astype(np.float32, copy=False)
        values: Float32s = numbers.astype(np.float32)
        values -= self.zero
        values *= np.float32(self.scale)
        return values


def quantize_by_numpy(values: Float32s, quantization: Quantization) -> NDArray[Any]:
    """Quantize `values`; the compiled kernel gives the same."""
    flat, numbers = values.reshape(-1), np.empty(values.size, quantization.dtype)
    for start in range(0, values.size, _BLOCK):
        numbers[start : start + _BLOCK] = _quantize_block(flat[start : start + _BLOCK], quantization)
    return numbers.reshape(values.shape)


def _quantize_block(values: Float32s, quantization: Quantization) -> NDArray[Any]:
    kind, zero = quantization.dtype, quantization.zero
    limits = np.iinfo(kind)
    # A 32-bit limit is not a float32: it would round up, beyond the type's range.
    exact = np.float32 if kind.itemsize <= 2 else np.float64
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled = values / exact(quantization.scale)
        np.rint(scaled, out=scaled)
        scaled += zero
        np.clip(scaled, limits.min, limits.max, out=scaled)
        # A sum is the cheapest test for NaN.
        if math.isnan(scaled.sum()):
            scaled[np.isnan(scaled)] = min(max(zero, limits.min), limits.max)
        quantized: NDArray[Any] = scaled.astype(kind)
    return quantized
