"""Fuzzing of decoders with damaged bytes.

A target is a function decorated with `@target(name, says, seeds)` in a module of this package. It passes any bytes to
the decoder, catches only the decoder's own error, and checks what was accepted. Any other exception is a finding.
`seeds` returns valid inputs to start from.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

Run = Callable[[bytes], None]
Seeds = Callable[[], list[bytes]]


@dataclass(frozen=True, slots=True)
class Target:
    """A fuzz target: `says` is its one-line description, `longest` the maximum input length in bytes.

    For a `costly` target, each input starts processes.
    """

    name: str
    says: str
    seeds: Seeds
    run: Run
    longest: int
    costly: bool = False


TARGETS: dict[str, Target] = {}


def target(name: str, says: str, seeds: Seeds, longest: int = 4096, *, costly: bool = False) -> Callable[[Run], Run]:
    """Register a target under `name`."""

    def register(function: Run) -> Run:
        TARGETS[name] = Target(name, says, seeds, function, longest, costly)
        return function

    return register


def load() -> dict[str, Target]:
    """Return all targets by name."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("on_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(TARGETS.items()))
