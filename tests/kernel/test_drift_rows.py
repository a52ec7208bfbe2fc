"""Compiled kernel: the same bits as NumPy, which defines every number; and what happens without it."""

from __future__ import annotations

import numpy as np

from agent.kernel.library import Library
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
