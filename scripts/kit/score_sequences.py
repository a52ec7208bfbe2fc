"""Sequences of drift scores, drawn from a generator: what compiled sequential tests must run over as NumPy does."""

from __future__ import annotations

from typing import NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np

from outstation.foundation import arrays
from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.detectors.cusum import Cusum
from outstation.ml.drift.detectors.mewma import Mewma
from outstation.ml.drift.detectors.season import HALF_DAY_US, SlowTrend
from outstation.ml.kernel import library
from outstation.ml.kernel.library import Library

_TESTS = (1, 2, 5, 17, 174)


class ScoreSequence(NamedTuple):
    """Scores `z` (W, T) of windows at `t` (W,). The first `before` lead to the state of the others."""

    z: Float64s
    effects: Float64s
    limit: Float64s
    t: Ints
    before: int


def draw(rng: np.random.Generator) -> ScoreSequence:
    windows, tests = int(rng.integers(2, 40)), int(rng.choice(_TESTS))
    z = rng.normal(rng.choice([0, 0.5]), rng.choice([0.5, 2]), (windows, tests))
    if rng.random() < 0.5:
        z = np.round(z)
    for value in (np.nan, np.inf, -np.inf, -0.0, 1e-310, 1e300):
        if rng.random() < 0.4:
            z[rng.random(z.shape) < rng.choice([0.05, 0.5])] = value
    t = HALF_DAY_US * 40 + np.cumsum(rng.integers(0, HALF_DAY_US, windows))
    return ScoreSequence(
        z, rng.normal(size=z.shape), rng.choice(np.array([1.0, 5.0]), tests), t, int(rng.integers(1, windows))
    )


def run(case: ScoreSequence, compiled: Library | None) -> bytes:
    """Run all tests over the sequence, by the library or by NumPy; of the first half of the scores means, too."""
    z, effects, t, limit = case.z, case.effects, case.t, case.limit
    slack, half = np.linspace(0.1, 1, z.shape[1]), slice(0, (z.shape[1] + 1) // 2)
    answers: list[bytes] = []
    with patch.object(library, "kernel", lambda: compiled), np.errstate(all="ignore"):
        cusum, mewma, trend = Cusum.zeros(z.shape[1]), Mewma.zeros(half.stop), SlowTrend()
        for part in (slice(0, case.before), slice(case.before, len(z))):
            sums = cusum.run_windows(z[part], effects[part], slack=slack, limit=limit, t=t[part])
            means = mewma.run_windows(z[part, half], effects[part, half], t[part])
            answers += [sums.values.tobytes(), sums.exceeds_limit.tobytes(), means.statistics.tobytes()]
            cusum, mewma = sums.state_after(len(z[part])), means.state_after(len(z[part]))
            trend = trend.add(z[part, half], t[part])
            answers += [msgspec.msgpack.encode(arrays.to_bytes(state)) for state in (cusum, mewma, trend)]
    return b"".join(answers)
