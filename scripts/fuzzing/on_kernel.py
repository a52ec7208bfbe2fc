"""Fuzz target for the compiled kernel: hostile numbers give what NumPy gives, within bounds.

`scripts/fuzz kernel` runs it under the address and undefined-behaviour sanitizers, in a process of its own.
"""

from __future__ import annotations

import zlib

import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float32s
from outstation.ml.kernel import checksum, library, model_input
from outstation.ml.model.bundle.manifest import ModelInput, WindowSpec
from outstation.ml.model.inference import features
from outstation.ml.model.inference.quantization import Kind, Quantization, quantize_by_numpy
from scripts.fuzzing import target
from scripts.kit import drift_windows, score_sequences

_SEED_BYTES = 4
_KINDS: tuple[Kind, ...] = ("int8", "uint8", "int16", "float32")


def windows() -> list[bytes]:
    seeds = [seed.to_bytes(_SEED_BYTES, "little") for seed in range(12)]
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, 0.5], np.float32).tobytes()
    return [*seeds, *(seed + special * 9 for seed in seeds[:4])]


@target("kernel", "the compiled kernel computes drift windows and model input as NumPy does", windows, longest=16_384)
def compute_both_ways(data: bytes) -> None:
    """Draw windows and scores by the first bytes, and lay the others over their values."""
    rng = np.random.default_rng(int.from_bytes(data[:_SEED_BYTES], "little"))
    case = drift_windows.draw(rng)
    features = case.batch.features.copy()
    content = np.frombuffer(data[_SEED_BYTES:], np.uint8)[: features.nbytes // 4 * 4]
    numbers: Float32s = content[: len(content) // 4 * 4].view(np.float32)
    features.reshape(-1)[: len(numbers)] = numbers
    case = case._replace(batch=replace(case.batch, features=features))
    assert drift_windows.summarize(case, library.kernel()) == drift_windows.summarize(case, None)
    sequence = score_sequences.draw(rng)
    with np.errstate(invalid="ignore"):  # signaling NaN
        sequence.z.reshape(-1)[: len(numbers)] = numbers[: sequence.z.size]
    assert score_sequences.run(sequence, library.kernel()) == score_sequences.run(sequence, None)
    blob, value = rng.bytes(int(rng.integers(50_000))) + data, int(rng.integers(2**32))
    assert checksum.crc32(blob, value) == zlib.crc32(blob, value)
    _compare_model_input(rng, numbers)


def _compare_model_input(rng: np.random.Generator, numbers: Float32s) -> None:
    """Build windows of drawn shapes, scales and starts, with `numbers` over the first values, and their errors."""
    rows, columns = (int(n) for n in rng.integers(1, 40, 2))
    values = rng.normal(0, 5, (rows + int(rng.integers(200)), columns)).astype(np.float32)
    values.reshape(-1)[: len(numbers)] = numbers[: values.size]
    starts = rng.integers(0, len(values) - rows + 1, int(rng.integers(30)))
    mean, std = (rng.uniform(1e-3, 30, columns).tolist() if rng.random() < 0.5 else [] for _ in range(2))
    spec = ModelInput([f"f{i}" for i in range(columns)], window=WindowSpec(rows, 1), mean=mean, std=std)
    kind = _KINDS[rng.integers(len(_KINDS))]
    quantization = Quantization(kind, float(10 ** rng.uniform(-6, 6)), int(rng.integers(0, 100)))
    scaling, pair = model_input.Scaling(columns, rows, mean, std), (quantization.scale, quantization.zero)
    compiled = library.kernel()
    assert compiled is not None
    with np.errstate(all="ignore"):
        expected = features.build_windows(values, starts, spec).reshape(len(starts), rows * columns)
        quantized = expected if kind == "float32" else quantize_by_numpy(expected, quantization)
        np.testing.assert_array_equal(quantization.quantize(expected), quantized)
        built = np.empty_like(quantized)
        missing = model_input.build_windows(compiled, values, starts, scaling, pair, built)
        np.testing.assert_array_equal(built, quantized)
        share = (missing / scaling.values).astype(np.float32)
        np.testing.assert_array_equal(share, features.compute_missing_share(values, starts, spec))
        errors = model_input.mean_errors(compiled, values, starts, scaling, pair, built)
        difference = quantization.dequantize(built).astype(np.float64) - expected
        np.testing.assert_array_equal(errors, np.square(difference).mean(axis=1))
