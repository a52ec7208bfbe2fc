"""Benchmarks: measure our code against a reference implementation on this machine.

A benchmark is a function decorated with `@benchmark(name)` in a module of this package. It returns a `Result`, several,
or a `Report`. Both sides do the same work with the same durability. Their runs alternate, so that a busy machine
slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

Clock = Callable[[], float]


class Rates(msgspec.Struct, frozen=True):
    """Units per second of two sides by `clock` ("CPU" or "wall"), and their ratio by the other clock, if measured."""

    ours: float
    reference: float
    clock: str
    other_ratio: float | None = None

    def __iter__(self) -> Iterator[float]:
        return iter((self.ours, self.reference))

    def to_costs(self, scale: float) -> Rates:
        """Return the time per unit of both sides in 1/`scale` seconds, such as 1e6 for µs."""
        other = None if self.other_ratio is None else 1 / self.other_ratio
        return Rates(scale / self.ours, scale / self.reference, self.clock, other)


class Result(msgspec.Struct, frozen=True):
    """Measurement of one quantity: `ours` and `reference` in `unit`, compared by the ratio `ours / reference`.

    By default more is better, and `target` is the smallest acceptable ratio. With `less`, less is better, and `target`
    is the largest acceptable ratio. Without a comparable implementation, `reference` is the limit and `target` is 1;
    then the ratio depends on the machine. `clock` ("CPU", "wall" or "") says how time was measured, and `other_ratio`
    is the ratio by the other clock.
    """

    name: str
    ours: float
    reference: float
    unit: str
    target: float
    note: str
    less: bool = False
    limit: bool = False
    clock: str = ""
    other_ratio: float | None = None

    @classmethod
    def within(cls, name: str, ours: float, limit: float, unit: str, note: str, clock: str = "") -> Result:
        """Return a result that must not exceed `limit`, without a reference implementation."""
        return cls(name, ours, limit, unit, 1.0, note, less=True, limit=True, clock=clock)

    @classmethod
    def timed(cls, name: str, pace: Rates, unit: str, target: float, note: str, *, less: bool = False) -> Result:
        """Return a result of `rates`, with its ratios by both clocks."""
        return cls(name, pace.ours, pace.reference, unit, target, note, less, False, pace.clock, pace.other_ratio)

    @property
    def ratio(self) -> float:
        return self.ours / self.reference

    @property
    def met(self) -> bool:
        return self.ratio <= self.target if self.less else self.ratio >= self.target


class Section(msgspec.Struct, frozen=True):
    """Section that a benchmark writes: file below the checkout, title, text, and other files by their path.

    `bullets` by the path of another page replace the list item there that begins with the same words in bold.
    """

    page: str
    title: str
    text: str
    files: dict[str, str] = {}
    bullets: dict[str, str] = {}


class Report(msgspec.Struct, frozen=True):
    """Results of one benchmark, the `text` that replaces them on screen, and a section of a page."""

    results: Sequence[Result]
    text: str
    section: Section | None = None


Measured = Callable[[], Result | Sequence[Result] | Report]
BENCHMARKS: dict[str, Measured] = {}
# Benchmarks short and stable enough to detect a regression within seconds.
QUICK: set[str] = set()
# Number of rows requested with `--rows`, or None for the benchmark's default.
rows: int | None = None
# Folder given with `--folder`, in which long benchmarks keep finished parts and made data, and continue from these.
folder: Path | None = None


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
    clock: Clock = time.perf_counter,
    rounds: int = 7,
    prepare: Callable[[], None] = lambda: None,
    cpu: Clock | None = None,
) -> Rates:
    """Return the median units per second of both functions, by `clock`, in alternating calls.

    Each function returns the number of units that one call processed. `prepare` runs before each call of `ours` and is
    not timed. The other clock is the wall's beside one of processor time; beside the wall's it is `cpu`, which counts
    the processor time of every process that works for either side.
    """
    by_cpu = clock is not time.perf_counter
    clocks = (clock, time.perf_counter if by_cpu else cpu or clock)
    prepare()
    ours()
    reference()
    seen: tuple[list[list[float]], list[list[float]]] = ([], [])
    for _ in range(rounds):
        prepare()
        for side, work in enumerate((ours, reference)):
            starts = [read() for read in clocks]
            done = work()
            ends = [read() for read in clocks]
            seen[side].append([done / (end - start) for start, end in zip(starts, ends, strict=True)])
    (mine, mine_other), (theirs, theirs_other) = ([statistics.median(by) for by in zip(*s, strict=True)] for s in seen)
    other = mine_other / theirs_other if by_cpu or cpu else None
    return Rates(mine, theirs, "CPU" if by_cpu else "wall", other)
