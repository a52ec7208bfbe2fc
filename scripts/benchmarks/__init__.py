"""Benchmarks: measure our code against a reference implementation on this machine.

A benchmark is a function decorated with `@benchmark(name)` in a module of this package. It returns a `Result`, several,
or a `Report`. Both sides do the same work with the same durability. Their runs alternate, so that a busy machine
slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import msgspec


class Result(msgspec.Struct, frozen=True):
    """Measurement of one quantity: `ours` and `reference` in `unit`, compared by the ratio `ours / reference`.

    By default more is better, and `target` is the smallest acceptable ratio. With `less`, less is better, and `target`
    is the largest acceptable ratio. Without a comparable implementation, `reference` is the limit and `target` is 1;
    then the ratio depends on the machine.
    """

    name: str
    ours: float
    reference: float
    unit: str
    target: float
    note: str
    less: bool = False
    limit: bool = False

    @classmethod
    def within(cls, name: str, ours: float, limit: float, unit: str, note: str) -> Result:
        """Return a result that must not exceed `limit`, without a reference implementation."""
        return cls(name, ours, limit, unit, 1.0, note, less=True, limit=True)

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.ratio <= self.target if self.less else self.ratio >= self.target


class Report(msgspec.Struct, frozen=True):
    """Results of one benchmark, and the `text` that replaces them on screen.

    `section` is a section of BENCHMARKS.md: its title and text.
    """

    results: Sequence[Result]
    text: str
    section: tuple[str, str] | None = None


Measured = Callable[[], Result | Sequence[Result] | Report]
BENCHMARKS: dict[str, Measured] = {}
# Benchmarks short and stable enough to detect a regression within seconds.
QUICK: set[str] = set()
# Number of rows requested with `--rows`, or None for the benchmark's default.
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
    """Return the median units per second of both functions, by `clock`, in alternating calls.

    Each function returns the number of units that one call processed. `prepare` runs before each call of `ours` and is
    not timed.
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
