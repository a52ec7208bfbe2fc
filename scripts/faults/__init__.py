"""Fault injection into a real device, broker and collector on this machine.

A fault is a function decorated with `@fault(…)` in a module `on_….py` of this package. It gets the `World` and a seeded
`random.Random`, injects the fault, and undoes what the system is not meant to recover by itself. The table in
docs/internals/faults.md describes each fault under the function's name. `oracle` checks the same promises after each.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec

from scripts.faults.world import Setting, World

Injection = Callable[[World, Random], None]
TABLE = Path(__file__).parents[2] / "docs" / "internals" / "faults.md"
_ROW = re.compile(r"^\| `([a-z0-9-]+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


class Fault(msgspec.Struct, frozen=True):
    """A fault and the `setting` it requires.

    `damages` allows permanent loss of rows on the medium, if a signed message declares them.
    """

    name: str
    inject: Injection
    setting: Setting = msgspec.field(default_factory=Setting)
    damages: bool = False
    patience_s: float = 60.0

    @property
    def control(self) -> bool:
        """True if the fault breaks a promise deliberately; it passes if the oracle detects the loss."""
        return self.name.startswith("control-")


FAULTS: dict[str, Fault] = {}


def fault(
    setting: Setting | None = None, *, name: str = "", damages: bool = False, patience_s: float = 60.0
) -> Callable[[Injection], Injection]:
    """Register a fault under `name`, which defaults to the name of the function."""

    def register(inject: Injection) -> Injection:
        declared = Fault(name or inject.__name__.replace("_", "-"), inject, setting or Setting(), damages, patience_s)
        assert FAULTS.setdefault(declared.name, declared) is declared, f"two faults are called {declared.name}"
        return inject

    return register


def read_table() -> dict[str, tuple[str, str]]:
    """Return the event and the effect for the operator of each fault, in the order of docs/internals/faults.md."""
    return {name: (event, effect) for name, event, effect in _ROW.findall(TABLE.read_text(encoding="utf-8"))}


def load() -> dict[str, Fault]:
    """Return all faults by name, in the order of the table."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("on_"):
            importlib.import_module(f"{__name__}.{module.name}")
    table = read_table()
    assert table.keys() == FAULTS.keys(), (
        f"in docs/internals/faults.md or in the code only: {sorted(table.keys() ^ FAULTS)}"
    )
    return {name: FAULTS[name] for name in table}
