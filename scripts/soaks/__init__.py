"""Soak tests: long runs of the real device and collector in simulated time, in this process.

A soak is a function decorated with `@soak(name, hours=…)` in a module of this package. It takes a folder, a seed, the
number of simulated hours and a function that prints a line, and returns a `Result`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """Result of a soak: `problems` are sentences, `figures` the measured values."""

    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems


Run = Callable[[Path, int, float, Callable[[str], None]], Result]


@dataclass(frozen=True)
class Soak:
    name: str
    hours: float
    run: Run


SOAKS: dict[str, Soak] = {}


def soak(name: str, *, hours: float) -> Callable[[Run], Run]:
    """Register a soak under `name`; `hours` is its default duration."""

    def register(run: Run) -> Run:
        SOAKS[name] = Soak(name, hours, run)
        return run

    return register
