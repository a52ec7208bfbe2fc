"""Compiled kernel: the same bits as NumPy, which defines every number; and what happens without it."""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Float32s
from outstation.ml.drift.baseline import resolution
from outstation.ml.kernel import drift_rows
from outstation.ml.kernel.drift_rows import RowLimits
from outstation.ml.kernel.library import Library
from scripts.kit import drift_windows

STACKS = 250  # about 4,000 drift windows


def test_drawn_windows_have_the_same_bits_as_by_numpy(compiled: Library) -> None:
    rng = np.random.default_rng(20261128)
    windows = 0
    for number in range(STACKS):
        case = drift_windows.draw(rng)
        windows += case.windows
        assert drift_windows.summarize(case, compiled) == drift_windows.summarize(case, None), f"draw {number}"
    assert windows > 10 * STACKS


def test_steps_that_float32_rounds_to_a_power_of_two_are_as_large_as_in_float64(compiled: Library) -> None:
    rng, n = np.random.default_rng(20261129), 60_000
    zero = np.zeros(1)
    limits = RowLimits(np.zeros((1, 33), np.float32), zero, zero, zero, [[]], np.zeros(1, bool), zero)
    rounded = 0
    for values in (_around_powers(rng, n), _multiples_of_steps(rng, n)):
        nothing_before = np.empty((0, 1)), np.full(1, np.nan), np.zeros(1, np.int64)
        counted = drift_rows.count(compiled, limits, values[None, :, None], *nothing_before, None)
        steps = np.diff(values.astype(np.float64))
        assert counted is not None
        expected = resolution.count_sizes(steps[None, :, None], steps[None, :, None] == 0)
        assert counted.sizes.tolist() == expected.tolist()
        rounded += int((np.frexp(np.diff(values))[1] != np.frexp(steps)[1]).sum())
    assert rounded > 100


def _around_powers(rng: np.random.Generator, n: int) -> Float32s:
    """Return values (n,) of which every second differs from the one before by a power of two, or by a little less."""
    values = rng.normal(size=n) * np.exp2(rng.integers(-70, 70, n))
    values[1::2] = values[::2] + rng.choice([-1, 1], n // 2) * np.exp2(rng.integers(-60, 60, n // 2))
    bits = values.astype(np.float32).view(np.int32) + rng.integers(-2, 3, n, np.int32)
    return np.asarray(bits.view(np.float32))


def _multiples_of_steps(rng: np.random.Generator, n: int) -> Float32s:
    return (rng.integers(-2000, 2000, n) * np.exp2(rng.integers(-45, 10, n))).astype(np.float32)
