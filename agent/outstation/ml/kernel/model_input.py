"""Compiled preparation of a model's input: columns to rows, rows to scaled and quantized windows, in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.kernel.library import Library, address

_KINDS = {"int8": 0, "uint8": 1, "int16": 2, "float32": 3}
_FLOAT_SCALE = 1.0, 0
_COLUMN_KINDS = {"<f4": 0, "<f8": 1, "<u2": 2}


class Scaling:
    """Scaling of a window's values: its means and standard deviations, laid out for the library."""

    def __init__(self, columns: int, rows: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """`mean` and `std` of each of the columns; none are 0 and 1."""
        self.columns, self.values = columns, columns * rows
        self._arrays = [
            np.tile(np.asarray(given or [unscaled] * columns, np.float32), rows)
            for given, unscaled in ((mean, 0.0), (std, 1.0))
        ]
        if {part.shape for part in self._arrays} != {(self.values,)}:
            raise ValueError("mean and standard deviation are not of the model's columns")
        self.addresses = tuple(map(address, self._arrays))


def supports(kind: np.dtype[Any], zero: int) -> bool:
    """Return True if the library computes numbers of this type with this zero point."""
    if kind.name == "float32":
        return True
    return kind.name in _KINDS and np.iinfo(kind).min <= zero <= np.iinfo(kind).max


def quantize(library: Library, values: Float32s, scale: float, zero: int, kind: np.dtype[Any]) -> NDArray[Any] | None:
    """Quantize `values` in one pass: round(x / scale) + zero, clipped to the type; NaN as 0. None for other types."""
    if kind.kind == "f" or not supports(kind, zero) or values.dtype != np.float32:
        return None
    values = np.ascontiguousarray(values)
    out = np.empty(values.shape, kind)
    numbers = _quantization(scale, zero, kind)
    library.quantize(values.size, _KINDS[kind.name], address(values), address(numbers), address(out))
    return out


def stack_columns(library: Library, columns: Sequence[NDArray[Any]], out: Float32s) -> bool:
    """Write columns (n,) into `out` (n, F) as float32; return False if one is of a type that NumPy has to convert."""
    kinds = [_COLUMN_KINDS.get(column.dtype.str) for column in columns]
    if None in kinds:
        return False
    if any(column.shape != out.shape[:1] or not column.flags.c_contiguous for column in columns):
        raise ValueError("columns differ in length, or are no arrays of their own")
    if out.shape[1:] != (len(columns),) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError("rows have another shape than their columns")
    addresses = np.array([address(column) for column in columns], np.int64)
    types = np.array(kinds, np.int64)
    library.stack_columns(len(out), len(columns), address(addresses), address(types), address(out))
    return True


def build_windows(
    library: Library,
    rows: Float32s,
    starts: Ints,
    scaling: Scaling,
    quantization: tuple[float, int],
    out: NDArray[Any],
) -> Ints:
    """Write windows of `rows` (n, C), scaled and quantized by (scale, zero), into `out` (w, rows * C).

    Return how many values (w,) of each are missing. The type and the zero point are ones that the library `supports`.
    """
    rows, starts = _check_windows(rows, starts, scaling, out)
    numbers, missing = _quantization(*quantization, out.dtype), np.empty(len(starts), np.int64)
    library.build_windows(
        *(len(starts), scaling.values, scaling.columns, _KINDS[out.dtype.name], address(rows), address(starts)),
        *(*scaling.addresses, address(numbers), address(out), address(missing)),
    )
    return missing


def mean_errors(
    library: Library,
    rows: Float32s,
    starts: Ints,
    scaling: Scaling,
    quantization: tuple[float, int],
    outputs: NDArray[Any],
) -> Float64s:
    """Return the mean squared differences (w,) between windows of `rows`, scaled, and `outputs` (w, rows * C)."""
    rows, starts = _check_windows(rows, starts, scaling, outputs)
    scale, zero = _FLOAT_SCALE if outputs.dtype.kind == "f" else quantization
    numbers, errors, scratch = np.array([scale, zero], np.float32), np.empty(len(starts)), np.empty(scaling.values)
    library.mean_errors(
        *(len(starts), scaling.values, scaling.columns, _KINDS[outputs.dtype.name], address(rows), address(starts)),
        *(*scaling.addresses, address(numbers), address(outputs), address(scratch), address(errors)),
    )
    return errors


def _check_windows(rows: Float32s, starts: Ints, scaling: Scaling, values: NDArray[Any]) -> tuple[Float32s, Ints]:
    """Return rows and starts for the library. Raises ValueError or IndexError if they do not fit each other."""
    rows, starts = np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(starts, np.int64)
    if rows.shape[1:] != (scaling.columns,) or values.shape != (len(starts), scaling.values):
        raise ValueError("rows and windows do not have the columns of their scaling")
    if not values.flags.c_contiguous or values.dtype.name not in _KINDS:
        raise ValueError(f"windows of type {values.dtype.name} are no compact numbers of the library")
    if len(starts) and not 0 <= starts.min() <= starts.max() <= len(rows) - scaling.values // scaling.columns:
        raise IndexError("a window does not lie within the rows")
    return rows, starts


def _quantization(scale: float, zero: int, kind: np.dtype[Any]) -> Float32s:
    if kind.kind == "f":
        return np.array([1, 0, 0, 0, 0], np.float32)
    limits = np.iinfo(kind)
    return np.array([scale, zero, limits.min, limits.max, zero], np.float32)
