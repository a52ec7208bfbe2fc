"""Compiled quantization of a model's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.arrays import Float32s
from agent.kernel.library import Library, address

_KINDS = {"int8": 0, "uint8": 1, "int16": 2}


def quantize(library: Library, values: Float32s, scale: float, zero: int, kind: np.dtype[Any]) -> NDArray[Any] | None:
    """Quantize `values` in one pass: round(x / scale) + zero, clipped to the type; NaN as 0. None for other types."""
    number = _KINDS.get(kind.name)
    limits = np.iinfo(kind)
    if number is None or values.dtype != np.float32 or not limits.min <= zero <= limits.max:
        return None
    values = np.ascontiguousarray(values)
    numbers = np.array([scale, zero, limits.min, limits.max, zero], np.float32)
    out = np.empty(values.shape, kind)
    library.quantize(values.size, number, address(values), address(numbers), address(out))
    return out
