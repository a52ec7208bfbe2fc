"""Soak tests: long runs of the real device and collector in simulated time, in this process.

A soak is a function of a module of this package, listed in `__main__`. It takes a folder, a seed, the number of
simulated hours and a function that prints a line, and returns a `Result`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """Result of a soak: `problems` are sentences, `figures` the measured values."""

    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems
