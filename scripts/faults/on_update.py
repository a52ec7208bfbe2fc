"""Update faults during a bundle replacement: daemon crash, power loss, repository or disk failure.

Each round rolls a new version out and lets it finish; `updating` defines the expected outcome.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from random import Random

import psutil

from outstation.device.rollout.fetch.fetcher import WORKER_COMMAND
from outstation.ml.model.sandbox import worker
from outstation.workbench.testing.patience import wait_until
from scripts.faults import Injection, fault
from scripts.faults.clock import Clock, no_clock
from scripts.faults.disk import Card, no_card, on_card
from scripts.faults.on_clock import on_clock
from scripts.faults.updating import Updating, updating
from scripts.faults.world import Setting, World

_UPDATES = Setting(prepare=(updating,))
_CARD = Setting(prepare=(on_card(256), updating), missing=no_card)
# An interrupted download resumes after half a minute at most.
_PATIENCE_S = 150.0
_SLOW = 20_000.0
_HISTORY, _TRANSITIONS = "outstation.device.bundles.history", "outstation.device.rollout.transitions"
# Crash points of the daemon: moment and call, as of `die-at-step` in `launch`.
_STEPS = {
    "fetched": ("before", "outstation.device.rollout.supply:BundleSupply.on_fetched"),
    "in-probe": ("in", "outstation.ml.model.sandbox.probe:probe"),
    "before-copy": ("before", f"{_HISTORY}:store_copy"),
    "copied": ("after", f"{_HISTORY}:store_copy"),
    "activating": ("after", f"{_TRANSITIONS}:begin_canary"),
    "activated": ("committed", f"{_TRANSITIONS}:begin_canary"),
    "promoting": ("after", f"{_TRANSITIONS}:promote_canary"),
    "promoted": ("committed", f"{_TRANSITIONS}:promote_canary"),
}


def _update(setting: Setting = _UPDATES, name: str = "") -> Callable[[Injection], Injection]:
    """Register a fault whose round ends with its rollout; the bundle is tried on live readings."""

    def register(inject: Injection) -> Injection:
        @functools.wraps(inject)
        def whole(world: World, rng: Random) -> None:
            inject(world, rng)
            Updating.in_world(world).finish(_PATIENCE_S)

        return fault(setting, name=name)(whole)

    return register


def _rolling(world: World) -> Updating:
    """Begin the next rollout."""
    update = Updating.in_world(world)
    update.roll()
    return update


def _die_at(step: str) -> Injection:
    """Let the daemon die at the step of the next rollout, without a restart."""
    when, target = _STEPS[step]

    def inject(world: World, _rng: Random) -> None:
        mark = world.folder / "died"
        # With the flag the daemon lives: it probes and copies its initial bundles too.
        mark.touch()
        world.device.set_launcher(("-m", "scripts.faults.launch", f"die-at-step={when},{target},{mark}", "--"))
        starts = world.device.start_count()
        world.restart(world.device)
        wait_until("the daemon runs", lambda: world.device.start_count() > starts, _PATIENCE_S)
        world.leave(world.device)
        mark.unlink()
        _rolling(world)
        wait_until(f"the daemon dies: {step}", lambda: not world.device.is_running, _PATIENCE_S)
        assert mark.exists(), "the daemon ended by itself"
        world.device.set_launcher(("-m", "outstation"))

    return inject


def _kill_in(phase: str) -> Injection:
    def inject(world: World, rng: Random) -> None:
        _rolling(world).reach(phase)
        time.sleep(rng.uniform(0.0, 1.0))
        world.kill(world.device)

    return inject


def _restarted(end: Injection, *, power: bool) -> Injection:
    """Return a fault that starts the daemon again after `end`, with `power` after a power cut."""

    def inject(world: World, rng: Random) -> None:
        end(world, rng)
        if power:
            Card.in_world(world).cut(journal=rng.random() < 0.5)
        world.keep(world.device)

    return inject


_ENDS = {step: _die_at(step) for step in _STEPS} | {f"in-{phase}": _kill_in(phase) for phase in ("shadow", "canary")}
for _moment, _end in _ENDS.items():
    _update(name=f"update-killed-{_moment}")(_restarted(_end, power=False))
    _update(_CARD, name=f"update-power-cut-{_moment}")(_restarted(_end, power=True))


# --- the download ---


def _in_mid_download(world: World) -> Updating:
    """Wait until a part of the bundle has arrived, with the rest throttled."""
    update = Updating.in_world(world)
    update.line.bytes_per_s, before = _SLOW, update.line.sent_bytes
    update.roll()
    wait_until("a part of the bundle came", lambda: update.line.sent_bytes > before, _PATIENCE_S)
    return update


@_update()
def update_killed_in_download(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    time.sleep(rng.uniform(0.0, 0.3))
    world.restart(world.device)
    update.line.bytes_per_s = None


@_update(_CARD)
def update_power_cut_in_download(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    world.kill(world.device)
    Card.in_world(world).cut(journal=rng.random() < 0.5)
    update.line.bytes_per_s = None
    world.keep(world.device)


@_update()
def update_repository_killed(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    update.web.offline = True
    time.sleep(rng.uniform(1.0, 3.0))
    update.line.bytes_per_s = None
    update.web.offline = False


@_update()
def update_line_cut(world: World, _rng: Random) -> None:
    update = Updating.in_world(world)
    update.line.planned_cuts, before = update.line.cut_count + 2, update.line.cut_count
    update.roll()
    wait_until("the line broke twice", lambda: update.line.cut_count == before + 2, _PATIENCE_S)


@_update()
def update_fetch_killed(world: World, _rng: Random) -> None:
    update = _in_mid_download(world)
    _kill_child(world, WORKER_COMMAND[-1])
    update.line.bytes_per_s = None


@_update(_CARD)
def update_disk_full(world: World, rng: Random) -> None:
    update, card = _in_mid_download(world), Card.in_world(world)
    card.fill()
    update.line.bytes_per_s = None
    time.sleep(rng.uniform(1.0, 3.0))
    card.free()


@_update(Setting(prepare=(on_clock, updating), missing=no_clock))
def update_clock_jumps(world: World, rng: Random) -> None:
    update, clock = _in_mid_download(world), Clock.in_world(world)
    clock.show(-3600.0)
    time.sleep(rng.uniform(0.5, 2.0))
    update.line.bytes_per_s = None
    clock.show(0.0)


# --- the bundle on trial ---


@_update()
def update_model_killed(world: World, _rng: Random) -> None:
    update = _rolling(world)
    update.may_abort()
    update.reach("shadow")
    _kill_child(world, worker.__name__)


def _kill_child(world: World, module: str) -> None:
    """Kill the daemon's child process that runs this module."""

    def matching_children() -> list[psutil.Process]:
        children = psutil.Process(world.device.pid).children(recursive=True)
        return [process for process in children if any(module in word for word in process.cmdline())]

    wait_until(f"a child runs {module}", matching_children, _PATIENCE_S)
    os.kill(matching_children()[0].pid, signal.SIGKILL)
