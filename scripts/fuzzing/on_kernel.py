"""Fuzz target for the compiled kernel: hostile numbers give what NumPy gives, within bounds.

`scripts/fuzz kernel` runs it under the address and undefined-behaviour sanitizers, in a process of its own.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from agent.kernel import library
from scripts.fuzzing import target
from scripts.kit import drift_windows, score_sequences

_SEED_BYTES = 4


def windows() -> list[bytes]:
    seeds = [seed.to_bytes(_SEED_BYTES, "little") for seed in range(12)]
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38, 0.5], np.float32).tobytes()
    return [*seeds, *(seed + special * 9 for seed in seeds[:4])]


@target("kernel", "the compiled kernel summarizes drift windows as NumPy does", windows, longest=16_384)
def summarize_both_ways(data: bytes) -> None:
    """Draw windows and scores by the first bytes, and lay the others over their values."""
    rng = np.random.default_rng(int.from_bytes(data[:_SEED_BYTES], "little"))
    case = drift_windows.draw(rng)
    features = case.batch.features.copy()
    numbers = np.frombuffer(data[_SEED_BYTES:], np.uint8)[: features.nbytes // 4 * 4]
    numbers = numbers[: len(numbers) // 4 * 4].view(np.float32)
    features.reshape(-1)[: len(numbers)] = numbers
    case = case._replace(batch=replace(case.batch, features=features))
    assert drift_windows.summarize(case, library.kernel()) == drift_windows.summarize(case, None)
    sequence = score_sequences.draw(rng)
    with np.errstate(invalid="ignore"):  # signaling NaN
        sequence.z.reshape(-1)[: len(numbers)] = numbers[: sequence.z.size]
    assert score_sequences.run(sequence, library.kernel()) == score_sequences.run(sequence, None)
