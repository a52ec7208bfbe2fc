"""How often a bundle that is good enough is called bad, where a device looks again with each message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from agent.device.beside import LATER, SOON, thinned
from agent.rivals.intervals import Block
from agent.rivals.tally import Tally
from scripts.covering import made
from scripts.covering.made import ESTIMATES, STRAIN, TRUTHS, WINDOWS, Floats

MESSAGES = 100
# What a bundle is better by than the limit it is held to.
MARGINS = (0.0, 0.03, 0.05)
LOOKED_AT = ("agreement", "labelled gain", "expected gain")
_BATCHES = SOON + (MESSAGES - SOON) * LATER

STRAINS: dict[str, Callable[[np.random.Generator], Floats]] = {
    **{
        f"bursts {length} batches long": partial(
            made.bursts, length=length * WINDOWS, share=STRAIN, windows=_BATCHES * WINDOWS
        )
        for length in (2, 5, 20)
    },
    "drift of 0.01 a batch": partial(made.drift, step=0.01, windows=_BATCHES * WINDOWS),
}


def lowest_high(random: np.random.Generator, strain: Floats) -> dict[str, float]:
    """The lowest upper end that any look at MESSAGES messages finds, by estimate: below a limit, it is bad."""
    found = dict.fromkeys(LOOKED_AT, np.inf)
    for blocks in _looks(made.batches(random, strain)):
        for name in LOOKED_AT:
            if (estimate := ESTIMATES[name](blocks)) is not None:
                found[name] = min(found[name], estimate.high)
    return found


def measured(name: str, seed: int, repeats: int) -> dict[str, list[float]]:
    """By estimate: the share of repetitions that called it bad at any look, for each of MARGINS."""
    randoms = [np.random.default_rng([seed, i]) for i in range(repeats)]
    lowest = [lowest_high(random, STRAINS[name](random)) for random in randoms]
    return {
        estimate: [
            sum(one[estimate] < TRUTHS[estimate](STRAIN) - margin for one in lowest) / repeats for margin in MARGINS
        ]
        for estimate in LOOKED_AT
    }


def _looks(batches: list[Tally]) -> Iterator[list[Block]]:
    """What a device keeps after each of its messages: at first one a batch, later one each LATER."""
    kept: list[Tally] = []
    ends = [*range(1, SOON + 1), *range(SOON + LATER, len(batches) + 1, LATER)]
    for begin, end in zip([0, *ends], ends, strict=False):
        kept = thinned([*kept, sum(batches[begin:end], Tally())])
        yield [Block(one) for one in kept]
