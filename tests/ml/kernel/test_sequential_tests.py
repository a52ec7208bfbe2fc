"""Compiled sequential tests: the same bits as by NumPy over scores of all kinds."""

from __future__ import annotations

import numpy as np

from outstation.ml.kernel.library import Library
from scripts.kit import score_sequences

SEQUENCES = 120


def test_drawn_sequences_have_the_same_bits_as_by_numpy(compiled: Library) -> None:
    rng = np.random.default_rng(20261129)
    for number in range(SEQUENCES):
        case = score_sequences.draw(rng)
        assert score_sequences.run(case, compiled) == score_sequences.run(case, None), f"draw {number}"
