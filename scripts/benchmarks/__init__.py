"""Measurements of the code against what it stands beside, on this machine, now.

A benchmark is a function decorated with `@benchmark(name)` in a module of this package that returns a `Result`. Both
sides do the same work with the same promises, in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Result:
    """`ours` and `reference` in `unit`, more is better; `target` is the least `ours / reference` that is good."""

    name: str
    ours: float
    reference: float
    unit: str
    target: float
    note: str

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.ratio >= self.target


BENCHMARKS: dict[str, Callable[[], Result]] = {}


def benchmark(name: str) -> Callable[[Callable[[], Result]], Callable[[], Result]]:
    """Register a benchmark under `name`."""

    def register(function: Callable[[], Result]) -> Callable[[], Result]:
        BENCHMARKS[name] = function
        return function

    return register


def rates(
    ours: Callable[[], int],
    reference: Callable[[], int],
    clock: Callable[[], float] = time.perf_counter,
    rounds: int = 7,
    prepare: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Median units per second of `clock` of both, called in turns; each returns how many units one call did.

    `prepare` comes before each call of `ours`, and is not counted.
    """
    prepare()
    ours()
    reference()
    seen: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        prepare()
        for side, work in enumerate((ours, reference)):
            start = clock()
            done = work()
            seen[side].append(done / (clock() - start))
    return statistics.median(seen[0]), statistics.median(seen[1])
