"""The daemon dies, hangs or starves."""

from __future__ import annotations

import os
import signal
import time
from random import Random

from scripts.faults import fault
from scripts.faults.world import Setting, World
from tests.system import eventually, outstation

_NOTHING = "nothing but a new `started` event in the audit log"


def _flawed(*flaws: str) -> Setting:
    return Setting(launcher=("-m", "scripts.faults.launch", *flaws, "--"))


def _dies_twice(world: World, rng: Random) -> None:
    """With the flaw it dies by itself and systemd starts it again; then the flaw is gone."""
    flawed = world.setting.launcher
    world.device.launch(flawed)
    world.restart(world.device)
    before = world.restarts
    eventually("the second death", lambda: world.restarts >= before + 2)
    world.device.launch(("-m", "agent"))
    world.restart(world.device)


@fault("kill-daemon", means="The daemon is killed (SIGKILL) at a random moment.", sees=_NOTHING)
def kill_daemon(world: World, rng: Random) -> None:
    for _ in range(2):
        time.sleep(rng.uniform(0.1, 1.0))
        world.restart(world.device)


@fault(
    "kill-while-starting",
    means="The daemon is killed again and again while it starts: a crash in the recovery from a crash.",
    sees=_NOTHING,
)
def kill_while_starting(world: World, rng: Random) -> None:
    for _ in range(5):
        world.restart(world.device)
        time.sleep(rng.uniform(0.05, 0.6))
    world.restart(world.device)


@fault(
    "die-before-commit",
    means="The daemon dies with a whole transaction written and not committed.",
    sees=_NOTHING,
    setting=_flawed("die-before-commit=25"),
)
def die_before_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng)


@fault(
    "die-after-commit",
    means="The daemon dies after a commit, before anybody is told of it.",
    sees=_NOTHING,
    setting=_flawed("die-after-commit=25"),
)
def die_after_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng)


@fault(
    "die-in-invoke",
    means="The daemon dies while the model runs.",
    sees=_NOTHING,
    setting=_flawed("die-in-invoke=10"),
)
def die_in_invoke(world: World, rng: Random) -> None:
    _dies_twice(world, rng)


@fault(
    "die-after-puback",
    means="The daemon dies between the broker's PUBACK and the collector's acknowledgement.",
    sees=_NOTHING,
    setting=_flawed("die-after-puback=12"),
)
def die_after_puback(world: World, rng: Random) -> None:
    _dies_twice(world, rng)


@fault(
    "stopped-process", means="The daemon is stopped (SIGSTOP) for a while, then goes on.", sees="a late health message"
)
def stopped_process(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(world.device.pid, signal.SIGSTOP)
    time.sleep(rng.uniform(1.0, 4.0))
    os.kill(world.device.pid, signal.SIGCONT)


@fault(
    "second-daemon",
    means="A second daemon, and a batch by hand, are started on the same data folder.",
    sees="the second one ends with a sentence that names the first one's process",
)
def second_daemon(world: World, rng: Random) -> None:
    for command in ("run", "batch"):
        refused = outstation(command, "-c", str(world.device.config))
        assert refused.returncode != 0, refused
        assert str(world.device.pid) in refused.stderr, refused.stderr


@fault(
    "graceful-restart", means="The daemon is stopped with SIGTERM and started again.", sees="`stopped`, then `online`"
)
def graceful_restart(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.6))
    world.leave(world.device)
    code = world.device.stop()
    assert code == 0, f"exit code {code}"
    world.keep(world.device)
