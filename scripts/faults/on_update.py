"""Update faults during a bundle replacement: daemon crash, power loss, repository or disk failure.

Each round rolls a new version out and lets it finish; `updating` defines the expected outcome.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from random import Random

import msgspec
import psutil

from agent.testing.process import wait_until
from scripts.faults import Injection, fault
from scripts.faults.clock import Clock, no_clock
from scripts.faults.disk import Card, no_card, on_card
from scripts.faults.on_clock import on_clock
from scripts.faults.updating import Updating, updating
from scripts.faults.world import Setting, World

_SAYS = (
    "`downloading`, `shadow`, `canary` and `active` in the audit log, as without the fault, and a new `started` event"
)
_AGAIN = "`downloads` in health and `outstation status`, with the reason and time of the next attempt"
_UPDATES = Setting(prepare=updating())
# An interrupted download resumes after half a minute at most.
_PATIENCE_S = 150.0
_SLOW = 20_000.0


class _Step(msgspec.Struct, frozen=True):
    """Crash point of the daemon; `when` and `target` are those of `die-at-step` in `launch`."""

    name: str
    when: str
    target: str
    means: str


_STEPS = (
    _Step(
        "fetched",
        "before",
        "agent.device.rollout.supply:BundleSupply.on_fetched",
        "a bundle was downloaded and not yet verified",
    ),
    _Step("in-probe", "in", "agent.model.sandbox.probe:probe", "a child process tests the bundle"),
    _Step(
        "before-copy",
        "before",
        "agent.device.bundles.history:store_copy",
        "the bundle passed its tests and was not yet copied",
    ),
    _Step(
        "copied", "after", "agent.device.bundles.history:store_copy", "the bundle was copied and nothing was committed"
    ),
    _Step(
        "activating",
        "after",
        "agent.device.rollout.transitions:begin_canary",
        "the bundle's first commit is not yet done",
    ),
    _Step(
        "activated",
        "committed",
        "agent.device.rollout.transitions:begin_canary",
        "the activation was committed and the bundle never ran",
    ),
    _Step(
        "promoting",
        "after",
        "agent.device.rollout.transitions:promote_canary",
        "the promotion is not yet committed",
    ),
    _Step(
        "promoted",
        "committed",
        "agent.device.rollout.transitions:promote_canary",
        "the promotion was committed",
    ),
)
_PHASES = {"shadow": "the bundle is the shadow of the active one", "canary": "the bundle is the canary"}


def _update(
    name: str, means: str, sees: str, setting: Setting = _UPDATES, missing: Callable[[], str | None] = lambda: None
) -> Callable[[Injection], Injection]:
    """Register a fault whose round ends with its rollout; the bundle is tried on live readings."""

    def register(inject: Injection) -> Injection:
        def whole(world: World, rng: Random) -> None:
            inject(world, rng)
            Updating.in_world(world).finish(_PATIENCE_S)

        fault(name, means=means, sees=sees, setting=setting, missing=missing)(whole)
        return inject

    return register


def _rolling(world: World) -> Updating:
    """Begin the next rollout."""
    update = Updating.in_world(world)
    update.roll()
    return update


def _dies(world: World, step: _Step) -> None:
    """Let the daemon die at the step of the next rollout, without a restart."""
    mark = world.folder / "died"
    # With the flag the daemon lives: it probes and copies its initial bundles too.
    mark.touch()
    world.device.set_launcher(("-m", "scripts.faults.launch", f"die-at-step={step.when},{step.target},{mark}", "--"))
    starts = world.device.start_count()
    world.restart(world.device)
    wait_until("the daemon runs", lambda: world.device.start_count() > starts, _PATIENCE_S)
    world.leave(world.device)
    mark.unlink()
    _rolling(world)
    wait_until(f"the daemon dies when {step.means}", lambda: not world.device.is_running, _PATIENCE_S)
    assert mark.exists(), "the daemon ended by itself"
    world.device.set_launcher(("-m", "agent"))


def _at_step(step: _Step, *, power: bool) -> Injection:
    def inject(world: World, rng: Random) -> None:
        _dies(world, step)
        if power:
            Card.in_world(world).cut(journal=rng.random() < 0.5)
        world.keep(world.device)

    return inject


def _in_phase(phase: str, *, power: bool) -> Injection:
    def inject(world: World, rng: Random) -> None:
        _rolling(world).reach(phase)
        time.sleep(rng.uniform(0.0, 1.0))
        world.kill(world.device)
        if power:
            Card.in_world(world).cut(journal=rng.random() < 0.5)
        world.keep(world.device)

    return inject


def _on_card_and_updating(world: World) -> Callable[[], None]:
    undo = on_card(256)(world)
    updating()(world)
    return undo


_CARD = Setting(prepare=_on_card_and_updating)
for _step in _STEPS:
    _update(f"update-killed-{_step.name}", f"The daemon dies when {_step.means}.", _SAYS)(_at_step(_step, power=False))
    _update(f"update-power-cut-{_step.name}", f"The power fails when {_step.means}.", _SAYS, _CARD, no_card)(
        _at_step(_step, power=True)
    )
for _phase, _what in _PHASES.items():
    _update(f"update-killed-in-{_phase}", f"The daemon is killed while {_what}.", _SAYS)(_in_phase(_phase, power=False))
    _update(f"update-power-cut-in-{_phase}", f"The power fails while {_what}.", _SAYS, _CARD, no_card)(
        _in_phase(_phase, power=True)
    )


# --- the download ---


def _in_mid_download(world: World) -> Updating:
    """Wait until a part of the bundle has arrived, with the rest throttled."""
    update = Updating.in_world(world)
    update.line.bytes_per_s, before = _SLOW, update.line.sent_bytes
    update.roll()
    wait_until("a part of the bundle came", lambda: update.line.sent_bytes > before, _PATIENCE_S)
    return update


@_update(
    "update-killed-in-download",
    means="The daemon is killed during a download.",
    sees=_SAYS,
)
def killed_in_download(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    time.sleep(rng.uniform(0.0, 0.3))
    world.restart(world.device)
    update.line.bytes_per_s = None


@_update(
    "update-power-cut-in-download",
    means="The power fails during a download.",
    sees=_SAYS,
    setting=_CARD,
    missing=no_card,
)
def power_cut_in_download(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    world.kill(world.device)
    Card.in_world(world).cut(journal=rng.random() < 0.5)
    update.line.bytes_per_s = None
    world.keep(world.device)


@_update(
    "update-repository-killed",
    means="The repository's server dies during a download and is away for a while.",
    sees=_AGAIN,
)
def repository_killed(world: World, rng: Random) -> None:
    update = _in_mid_download(world)
    update.web.offline = True
    time.sleep(rng.uniform(1.0, 3.0))
    update.line.bytes_per_s = None
    update.web.offline = False


@_update(
    "update-line-cut",
    means="Two consecutive downloads break off at a random place.",
    sees=_AGAIN,
)
def line_cut(world: World, _rng: Random) -> None:
    update = Updating.in_world(world)
    update.line.planned_cuts, before = update.line.cut_count + 2, update.line.cut_count
    update.roll()
    wait_until("the line broke twice", lambda: update.line.cut_count == before + 2, _PATIENCE_S)


@_update(
    "update-fetch-killed",
    means="The fetch worker is killed (SIGKILL) during a download.",
    sees=_AGAIN,
)
def fetch_killed(world: World, _rng: Random) -> None:
    update = _in_mid_download(world)
    _kill_child(world, "updates.fetch")
    update.line.bytes_per_s = None


@_update(
    "update-disk-full",
    means="The disk is full during a download, and has space again shortly after.",
    sees=f"a critical storage alert; {_AGAIN}",
    setting=_CARD,
    missing=no_card,
)
def disk_full(world: World, rng: Random) -> None:
    update, card = _in_mid_download(world), Card.in_world(world)
    card.fill()
    update.line.bytes_per_s = None
    time.sleep(rng.uniform(1.0, 3.0))
    card.free()


def _on_clock_and_updating(world: World) -> Callable[[], None]:
    on_clock()(world)
    updating()(world)
    return lambda: None


@_update(
    "update-clock-jumps",
    means="During a download the synchronized clock jumps back by an hour, and is corrected shortly after.",
    sees="a `clock` event in the audit log for each step; the roll-out continues",
    setting=Setting(prepare=_on_clock_and_updating),
    missing=no_clock,
)
def clock_jumps(world: World, rng: Random) -> None:
    update, clock = _in_mid_download(world), Clock.in_world(world)
    clock.show(-3600.0)
    time.sleep(rng.uniform(0.5, 2.0))
    update.line.bytes_per_s = None
    clock.show(0.0)


# --- the bundle on trial ---


@_update(
    "update-model-killed",
    means="The process of a shadow bundle is killed (SIGKILL), as for lack of memory.",
    sees="nothing if it was idle; otherwise `rolled_back`, an alert, and an aborted roll-out",
)
def model_killed(world: World, _rng: Random) -> None:
    update = _rolling(world)
    update.may_abort()
    update.reach("shadow")
    _kill_child(world, "model.apart_child")


def _kill_child(world: World, module: str) -> None:
    """Kill the daemon's child process that runs this module."""

    def matching_children() -> list[psutil.Process]:
        children = psutil.Process(world.device.pid).children(recursive=True)
        return [process for process in children if any(module in word for word in process.cmdline())]

    wait_until(f"a child runs {module}", matching_children, _PATIENCE_S)
    os.kill(matching_children()[0].pid, signal.SIGKILL)
