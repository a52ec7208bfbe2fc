"""False rejection rate of a good bundle under repeated looks, one per message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate

import numpy as np

from agent.comparison.paired_intervals import ComparisonBlock
from agent.comparison.tally import ComparisonStats
from agent.device.rollout.shadow import batches_per_message, merge_neighbours
from scripts.interval_coverage import synthetic
from scripts.interval_coverage.synthetic import ESTIMATES, STRAIN, TRUTHS, WINDOWS, Floats

MESSAGES = 100
# Minimum number of batches before a device judges, from the rules.
BATCHES = (20, 60, 240)
# Margins by which the bundle is better than its limit.
MARGINS = (0.0, 0.03, 0.05)
LOOKED_AT = ("agreement", "labelled gain", "expected gain")

# Of so many windows.
STRAINS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    **{
        f"bursts {length} batches long": partial(
            lambda random, windows, length: synthetic.bursts(random, length * WINDOWS, STRAIN, windows), length=length
        )
        for length in (2, 5, 20)
    },
    "drift of 0.01 a batch": lambda random, windows: synthetic.drift(random, 0.01, windows),
}


def lowest_high(random: np.random.Generator, name: str, batches: int) -> dict[str, tuple[float, float]]:
    """Return the upper bound at the first look, and the lowest over MESSAGES looks; below a limit it rejects."""
    ends = list(accumulate(batches_per_message(i, batches) for i in range(MESSAGES)))
    answered = synthetic.batches(random, STRAINS[name](random, ends[-1] * WINDOWS))
    bounds: dict[str, list[float]] = {estimate: [] for estimate in LOOKED_AT}
    for blocks in _looks(answered, ends, batches):
        for estimate in LOOKED_AT:
            if (seen := ESTIMATES[estimate](blocks)) is not None:
                bounds[estimate].append(seen.high)
    return {estimate: (highs[0], min(highs)) for estimate, highs in bounds.items()}


def measured(name: str, seed: int, repeats: int, batches: int) -> dict[str, list[list[float]]]:
    """Return, per estimate, the rejection rates at the first and at any look, for each of MARGINS."""
    lowest = [lowest_high(np.random.default_rng([seed, i]), name, batches) for i in range(repeats)]
    return {
        estimate: [
            [
                sum(bounds[estimate][look] < TRUTHS[estimate](STRAIN) - margin for bounds in lowest) / repeats
                for margin in MARGINS
            ]
            for look in (0, 1)
        ]
        for estimate in LOOKED_AT
    }


def _looks(answered: list[ComparisonStats], ends: list[int], batches: int) -> Iterator[list[ComparisonBlock]]:
    """Return the state of a device after each of its messages, from the minimum number of batches on."""
    retained: list[ComparisonStats] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        retained = merge_neighbours([*retained, sum(answered[begin:end], ComparisonStats())])
        if end >= batches:
            yield [ComparisonBlock(stats) for stats in retained]
