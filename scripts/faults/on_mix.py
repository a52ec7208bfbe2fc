"""Combined faults: a fault that is harmless alone may hit the recovery from another."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

from scripts.faults import FAULTS, fault
from scripts.faults.clock import Clock, no_boot, no_clock
from scripts.faults.disk import Card, no_card, on_card
from scripts.faults.on_clock import on_clock, stamp_some, switch_off, switch_on
from scripts.faults.world import Setting, World

# One fault per kind at a time, since two would undo each other. Faults that inspect the daemon's process while they
# last are excluded, because another fault may kill it.
_KINDS = {
    "daemon": ("kill-daemon", "kill-while-starting"),
    "broker": ("kill-broker",),
    "collector": ("kill-collector", "collector-database-locked"),
    "network": (
        "pubacks-dropped",
        "acknowledgements-dropped",
        "network-flapping",
        "network-down",
        "network-stalled",
        "slow-bytes",
    ),
    "clock": ("clock-steps-all-the-time", "time-service-lies"),
}


@fault(Setting(proxied=True, prepare=(on_clock,), missing=no_clock), patience_s=120.0)
def mix_everything(world: World, rng: Random) -> None:
    kinds = rng.sample(sorted(_KINDS), rng.choice((2, 3)))
    chosen = [FAULTS[rng.choice(_KINDS[kind])] for kind in kinds]
    chances = [Random(rng.random()) for _ in chosen]
    with ThreadPoolExecutor(len(chosen)) as threads:
        running = [
            threads.submit(chosen_fault.inject, world, chance)
            for chosen_fault, chance in zip(chosen, chances, strict=True)
        ]
    for chosen_fault in running:
        chosen_fault.result()


@fault(Setting(prepare=(on_card(), on_clock), missing=lambda: no_card() or no_boot()))
def mix_clock_and_power(world: World, rng: Random) -> None:
    clock = Clock.in_world(world)
    for _ in range(2):
        time.sleep(rng.uniform(0.2, 0.8))
        switch_off(world)
        Card.in_world(world).cut(journal=rng.random() < 0.5)
        clock.show(-rng.uniform(1.0, 3600.0), error_us=None)
        switch_on(world)
        if rng.random() < 0.7:
            stamp_some(world)
    clock.show(0.0)
