"""Daemon faults: crash, hang and starvation."""

from __future__ import annotations

import os
import signal
import time
from random import Random

from agent.testing.process import run_outstation, wait_until
from scripts.faults import fault
from scripts.faults.world import World

_NOTHING = "nothing but a new `started` event in the audit log"


def _dies_twice(world: World, rng: Random, flaw: str, most: int, least: int = 1) -> None:
    """Let the flaw end the daemon twice, at call number `least` to `most`; the supervisor restarts it."""
    before = world.restarts
    _flawed(world, flaw, rng.randint(least, most))
    world.restart(world.device)
    _flawed(world, flaw, rng.randint(least, most))
    wait_until("the second death", lambda: world.restarts >= before + 2)
    world.device.set_launcher(("-m", "agent"))
    world.restart(world.device)


def _flawed(world: World, flaw: str, occasion: int) -> None:
    """Apply the flaw from the next start on."""
    world.device.set_launcher(("-m", "scripts.faults.launch", f"{flaw}={occasion}", "--"))


@fault("kill-daemon", means="The daemon is killed (SIGKILL) at a random moment.", sees=_NOTHING)
def kill_daemon(world: World, rng: Random) -> None:
    for _ in range(2):
        time.sleep(rng.uniform(0.1, 1.0))
        world.restart(world.device)


@fault(
    "kill-while-starting",
    means="The daemon is killed repeatedly while it starts: a crash during crash recovery.",
    sees=_NOTHING,
)
def kill_while_starting(world: World, rng: Random) -> None:
    for _ in range(5):
        world.restart(world.device)
        time.sleep(rng.uniform(0.05, 0.6))
    world.restart(world.device)


@fault(
    "die-before-commit",
    means="The daemon dies with a complete but uncommitted transaction.",
    sees=_NOTHING,
)
def die_before_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-before-commit", 25)


@fault(
    "die-after-commit",
    means="The daemon dies after a commit, before it reports the commit.",
    sees=_NOTHING,
)
def die_after_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-after-commit", 25)


@fault(
    "die-in-invoke",
    means="The daemon dies while the model runs.",
    sees=_NOTHING,
)
def die_in_invoke(world: World, rng: Random) -> None:
    # A model whose first run after each start ends the daemon is quarantined, correctly.
    _dies_twice(world, rng, "die-in-invoke", 10, least=2)


@fault(
    "die-after-puback",
    means="The daemon dies between the broker's PUBACK and the collector's acknowledgement.",
    sees=_NOTHING,
)
def die_after_puback(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-after-puback", 12)


@fault(
    "stopped-process",
    means="The daemon is stopped (SIGSTOP) for a while and then continues.",
    sees="a late health message",
)
def stopped_process(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(world.device.pid, signal.SIGSTOP)
    time.sleep(rng.uniform(1.0, 4.0))
    os.kill(world.device.pid, signal.SIGCONT)


@fault(
    "second-daemon",
    means="A second daemon and a manual batch start on the same data folder.",
    sees="the second one exits and names the process of the first",
)
def second_daemon(world: World, rng: Random) -> None:
    for command in ("run", "batch"):
        refused = run_outstation(command, "-c", str(world.device.config))
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
