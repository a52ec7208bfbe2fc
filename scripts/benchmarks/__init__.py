"""Measurements of the code against what it stands beside, on this machine, now.

A benchmark is a function decorated with `@benchmark(name)` in a module of this package that returns a `Result`, or a
`Report` of several. Both sides do the same work with the same promises, in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec


class Result(msgspec.Struct, frozen=True):
    """`ours` and `reference` in `unit`; their ratio is `ours / reference`, always.

    More is better, and `target` is the least ratio that is good; with `less`, less is better, and it is the most.
    Where there is nothing that does the same, `reference` is the `limit` itself and `target` 1: another machine has
    another ratio.
    """

    name: str
    ours: float
    reference: float
    unit: str
    target: float
    note: str
    less: bool = False
    limit: bool = False

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.ratio <= self.target if self.less else self.ratio >= self.target


class Report(msgspec.Struct, frozen=True):
    """Several results of one benchmark, and the `text` that people are shown in their place."""

    results: tuple[Result, ...]
    text: str


Measured = Callable[[], Result | Report]
BENCHMARKS: dict[str, Measured] = {}
# Those that are short and steady enough to tell within seconds whether a ratio has fallen.
QUICK: set[str] = set()
# As many rows as were asked for, where a benchmark may have more or fewer; None: its own number.
rows: int | None = None


def benchmark(name: str, *, quick: bool = False) -> Callable[[Measured], Measured]:
    """Register a benchmark under `name`."""

    def register(function: Measured) -> Measured:
        BENCHMARKS[name] = function
        if quick:
            QUICK.add(name)
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
