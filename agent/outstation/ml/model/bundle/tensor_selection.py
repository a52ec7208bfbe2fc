"""Tensor selection: which tensors of a model a manifest describes, and in what order."""

from __future__ import annotations

import msgspec


class TensorSelection(msgspec.Struct, frozen=True):
    """Tensors of a model by name or index, in the order of their values; None is the only one, or the one left."""

    inputs: tuple[str | int | None, ...] = (None,)
    outputs: tuple[str | int | None, ...] = (None,)


ONE_TENSOR = TensorSelection()
