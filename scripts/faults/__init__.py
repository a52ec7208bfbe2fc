"""Fault injection into a real device, broker and collector on this machine.

A fault is a function decorated with `@fault(name, …)` in a module of this package. It gets the `World` and a seeded
`random.Random`, injects the fault, and undoes what the system is not meant to recover by itself. The promises that must
hold afterwards are the same for all faults; `oracle` checks them.
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
    """Declaration of a fault: `means` is the event, `sees` the effect for the operator; both are one line of the docs.

    `setting` is the required world. `missing` returns the reason why this machine cannot run the fault, or None.
    `damages` allows permanent loss of rows on the medium, if a signed message declares them. A `control` breaks a
    promise deliberately and passes if the oracle detects the loss.
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
    """Return all faults by name, in the order of their modules."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("on_"):
            importlib.import_module(f"{__name__}.{module.name}")
    # Some modules may already be imported. Within a module the order of definition stays.
    return dict(sorted(FAULTS.items(), key=lambda one: one[1].inject.__module__))
