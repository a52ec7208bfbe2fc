"""Tensors of a model, and what an inspection of the model found."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec


class Tensor(msgspec.Struct, frozen=True):
    """Input or output. `shape` is of one inference; `batch` 0 is any; `limits` are a quantized tensor's range."""

    name: str
    shape: tuple[int, ...]
    batch: int
    dtype: str
    limits: tuple[float, float] | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def quantization_step(self) -> float:
        """Difference between neighbouring values of a quantized tensor; 0 for floats."""
        return (self.limits[1] - self.limits[0]) / (256 if self.dtype.endswith("int8") else 65536) if self.limits else 0

    def __str__(self) -> str:
        batch = "any batch" if self.batch == 0 else f"a batch of {self.batch}"
        values = f", values {self.limits[0]:.4g} to {self.limits[1]:.4g}" if self.limits else ""
        return f"{self.name!r} {self.dtype} {list(self.shape)}, {batch}{values}"


class OutputStats(msgspec.Struct, frozen=True):
    """Output for random input: lowest and highest value, bounds of the sum and the length of one inference."""

    low: float
    high: float
    sums: tuple[float, float]
    norms: tuple[float, float]


class ModelInspection(msgspec.Struct, frozen=True):
    inputs: list[Tensor]
    outputs: list[Tensor]
    output_stats: Annotated[list[OutputStats], msgspec.Meta(min_length=1)]
