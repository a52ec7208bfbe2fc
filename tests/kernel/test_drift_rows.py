"""Compiled kernel: the same bits as NumPy, which defines every number; and what happens without it."""

from __future__ import annotations

import numpy as np
import pytest

from agent.kernel import library
from agent.kernel.library import Library
from scripts.kit import drift_windows

STACKS = 250  # about 4,000 drift windows


@pytest.fixture(scope="module")
def compiled() -> Library:
    loaded = library.kernel()
    if loaded is None:
        pytest.skip(f"the compiled kernel is missing: {library.describe()}")
    return loaded


def test_drawn_windows_have_the_same_bits_as_by_numpy(compiled: Library) -> None:
    rng = np.random.default_rng(20261128)
    windows = 0
    for number in range(STACKS):
        case = drift_windows.draw(rng)
        windows += case.windows
        assert drift_windows.summarize(case, compiled) == drift_windows.summarize(case, None), f"draw {number}"
    assert windows > 10 * STACKS
