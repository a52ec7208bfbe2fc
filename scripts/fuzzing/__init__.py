"""Decoders under damaged bytes.

A target is a function decorated with `@target(name, says, seeds)` in a module of this package. It takes any bytes, lets
the decoder at them, catches the decoder's own error and no other, and checks what was taken. Whatever else it raises is
a finding. `seeds` gives sound input to start from.
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
    """`says` is one line for people; `longest` is how long an input may grow, in bytes.

    `costly`, each input starts processes of its own.
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
    """All targets, by name."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("on_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(TARGETS.items()))
