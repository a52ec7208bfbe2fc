"""Faults, each by name, done to a real device, broker and collector on this machine.

A fault is a function decorated with `@fault(name, …)` in a module of this package. It gets the `World` and a seeded
`random.Random`, does its damage, and heals what a person would not have to heal by hand. What must hold afterwards is
the same for all of them and lives in `oracle`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from random import Random

import msgspec

from scripts.faults.world import Setting, World

Injection = Callable[[World, Random], None]


class Fault(msgspec.Struct, frozen=True):
    """`means` says what happens, `sees` what the operator sees of it; one line each, they are the documentation.

    `setting` is the world it needs. `missing` gives the reason why it cannot be done on this machine, or None.
    `damages`: rows may be gone for good (the medium lost them), but then a signed message must say which.
    A `control` breaks a promise on purpose and passes when the loss is found.
    """

    name: str
    inject: Injection
    means: str
    sees: str
    setting: Setting = msgspec.field(default_factory=Setting)
    missing: Callable[[], str | None] = lambda: None
    damages: bool = False
    control: bool = False
    patience_s: float = 60.0


FAULTS: dict[str, Fault] = {}


def fault(
    name: str,
    *,
    means: str,
    sees: str,
    setting: Setting | None = None,
    missing: Callable[[], str | None] = lambda: None,
    damages: bool = False,
    control: bool = False,
    patience_s: float = 60.0,
) -> Callable[[Injection], Injection]:
    """Register a fault under `name`."""

    def register(inject: Injection) -> Injection:
        declared = Fault(name, inject, means, sees, setting or Setting(), missing, damages, control, patience_s)
        assert FAULTS.setdefault(name, declared) is declared, f"two faults are called {name}"
        return inject

    return register


def load() -> dict[str, Fault]:
    """All faults by name, in the order of their modules."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("on_"):
            importlib.import_module(f"{__name__}.{module.name}")
    # Some may have been imported before, by name. Within a module they stay as they are written.
    return dict(sorted(FAULTS.items(), key=lambda one: one[1].inject.__module__))
