"""Fuzzing of decoders with damaged bytes.

A target is a function decorated with `@target(name, says, seeds)` in a module of this package. It passes any bytes to
the decoder, catches only the decoder's own error, and checks what was accepted. Any other exception is a finding.
`seeds` returns valid inputs to start from.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def as_file(content: bytes, suffix: str) -> Iterator[Path]:
    """Write the input to a temporary file for the block."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; for `object_pairs_hook`. Fails if a key is repeated."""
    assert len(dict(pairs)) == len(pairs), f"a key is repeated: {pairs}"
    return dict(pairs)


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
