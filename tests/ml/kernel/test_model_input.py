"""Compiled model input: the same numbers as NumPy for all types, scales, zero points and readings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from outstation.ml.kernel import model_input
from outstation.ml.kernel.library import Library
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.ml.model.inference import features
from outstation.ml.model.inference.quantization import Kind, Quantization, quantize_by_numpy

SCALES = (1e-45, 1e-12, 0.0039215689, 0.05, 0.5, 1.0, 3e8, 3e38)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16"])
@pytest.mark.parametrize("scale", SCALES)
def test_all_values_are_quantized_as_by_numpy(compiled: Library, kind: Kind, scale: float) -> None:
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
        got = model_input.quantize(compiled, values, scale, zero, dtype)
        np.testing.assert_array_equal(got, quantize_by_numpy(values, Quantization(kind, scale, zero)))


def test_wider_types_are_left_to_numpy(compiled: Library) -> None:
    assert model_input.quantize(compiled, np.zeros(3, np.float32), 1.0, 0, np.dtype(np.int32)) is None


def wild(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    """Return values of all magnitudes: denormal, tied, huge, infinite, and NaN with any payload."""
    bits = rng.integers(0, 2**64, shape, dtype=np.uint64)
    values = bits.view(np.float64) if dtype == "f8" else bits.astype(np.uint32).view(np.float32)
    near = (rng.integers(-300, 300, shape) * 0.5).astype(values.dtype)
    special = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38, 1.7e308], np.float64)
    with np.errstate(over="ignore"):
        picked = special[rng.integers(0, len(special), shape)].astype(values.dtype)
    draw = rng.random(shape)
    return np.where(draw < 0.1, picked, np.where(draw < 0.3, values, near))


def calm(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    return rng.normal(0, 3, shape).astype(dtype)


@pytest.mark.parametrize("draw", [wild, calm])
@pytest.mark.parametrize(("rows", "fields"), [(1, 1), (7, 3), (300, 16), (65, 130), (5000, 6)])
def test_columns_of_all_types_are_stacked_as_by_numpy(
    compiled: Library, draw: Callable[..., np.ndarray], rows: int, fields: int
) -> None:
    rng = np.random.default_rng(rows)
    columns = [
        rng.integers(0, 2**16, rows, dtype=np.uint16) if i % 5 == 4 else draw(rng, (rows,), "f8" if i % 3 else "f4")
        for i in range(fields)
    ]
    # As in a stored chunk: columns follow each other, at any byte.
    stored = b"x" + b"".join(column.tobytes() for column in columns)
    ends = np.cumsum([1, *(column.nbytes for column in columns)])[:-1].tolist()
    loose = [np.frombuffer(stored, c.dtype, rows, end) for c, end in zip(columns, ends, strict=True)]
    out, expected = np.empty((rows, fields), np.float32), np.empty((rows, fields), np.float32)
    assert model_input.stack_columns(compiled, loose, out)
    with np.errstate(over="ignore", invalid="ignore"):
        np.stack(columns, axis=1, out=expected, casting="same_kind")
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_columns_that_numpy_has_to_convert_are_left_to_it(compiled: Library) -> None:
    out = np.empty((3, 1), np.float32)
    assert not model_input.stack_columns(compiled, [np.arange(3)], out)
    with pytest.raises(ValueError, match="differ in length"):
        model_input.stack_columns(compiled, [np.zeros(2, np.float32)], out)


@pytest.mark.parametrize("draw", [wild, calm])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "float32"])
@pytest.mark.parametrize(("rows", "step", "columns"), [(1, 1, 16), (100, 100, 6), (49, 20, 10), (3, 1, 1), (5, 5, 128)])
def test_windows_and_errors_are_computed_as_by_numpy(
    compiled: Library, draw: Callable[..., np.ndarray], kind: Kind, rows: int, step: int, columns: int
) -> None:
    rng = np.random.default_rng(rows)
    for is_scaled in (True, False):
        values = draw(rng, (rows * 40, columns))
        starts = np.arange(0, len(values) - rows, step)
        spec = ModelInput(
            [f"f{i}" for i in range(columns)],
            window=WindowSpec(rows, step),
            mean=rng.normal(0, 5, columns).tolist() if is_scaled else [],
            std=rng.uniform(1e-3, 30, columns).tolist() if is_scaled else [],
        )
        scaling = model_input.Scaling(columns, rows, spec.mean, spec.std)
        quantization = Quantization(kind, 0.037, -3 if kind == "int8" else 17)
        pair = quantization.scale, quantization.zero
        with np.errstate(invalid="ignore", over="ignore"):
            expected = features.build_windows(values, starts, spec).reshape(len(starts), -1)
        numbers = quantization.quantize(expected)
        got = np.empty_like(numbers)
        missing = model_input.build_windows(compiled, values, starts, scaling, pair, got)
        assert got.tobytes() == numbers.tobytes()
        share = (missing / scaling.values).astype(np.float32)
        np.testing.assert_array_equal(share, features.compute_missing_share(values, starts, spec))
        outputs = draw(rng, got.shape) if kind == "float32" else rng.integers(-100, 100, got.shape).astype(kind)
        errors = model_input.mean_errors(compiled, values, starts, scaling, pair, outputs)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = quantization.dequantize(outputs).astype(np.float64) - expected
            np.testing.assert_array_equal(errors, np.square(difference).mean(axis=1))


def test_windows_outside_the_rows_are_refused(compiled: Library) -> None:
    scaling, out = model_input.Scaling(2, 3, [], []), np.empty((1, 6), np.int8)
    for start in (-1, 8, 2**40):
        with pytest.raises(IndexError, match="within the rows"):
            model_input.build_windows(
                compiled, np.zeros((10, 2), np.float32), np.array([start]), scaling, (1.0, 0), out
            )
    for shape in ((2, 6), (1, 5), (6,)):
        with pytest.raises(ValueError, match="columns of their scaling"):
            model_input.build_windows(
                compiled, np.zeros((10, 2), np.float32), np.array([0]), scaling, (1.0, 0), np.empty(shape, np.int8)
            )
    with pytest.raises(ValueError, match="not of the model's columns"):
        model_input.Scaling(2, 3, [1.0], [])
