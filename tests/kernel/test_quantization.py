"""Compiled quantization: the same whole numbers as NumPy for all types, scales and zero points."""

from __future__ import annotations

import numpy as np
import pytest

from agent.kernel import quantization
from agent.kernel.library import Library
from agent.model.inference.runtime import quantize_by_numpy

SCALES = (1e-45, 1e-12, 0.0039215689, 0.05, 0.5, 1.0, 3e8, 3e38)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("scale", SCALES)
def test_all_values_are_quantized_as_by_numpy(compiled: Library, kind: str, scale: float) -> None:
    rng = np.random.default_rng(7)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, -3.4e38]
    dtype, limits = np.dtype(kind), np.iinfo(kind)
    # Halves, which round to even, and all bit patterns.
    with np.errstate(over="ignore"):
        halves = (np.arange(-70_000, 70_000) * 0.5 * scale).astype(np.float32)
        noise = rng.normal(0, 50 * scale, 5000).astype(np.float32)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    values = np.concatenate([halves, bits, np.array(special, np.float32), noise])
    for zero in (limits.min, -1 if limits.min else 1, 0, 17, limits.max):
        got = quantization.quantize(compiled, values, scale, zero, dtype)
        np.testing.assert_array_equal(got, quantize_by_numpy(values, scale, zero, dtype))


def test_wider_types_are_left_to_numpy(compiled: Library) -> None:
    assert quantization.quantize(compiled, np.zeros(3, np.float32), 1.0, 0, np.dtype(np.int32)) is None
