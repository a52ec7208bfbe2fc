"""Daemon faults: crash, hang, starvation and failing allocations."""

from __future__ import annotations

import os
import resource
import signal
import time
from random import Random

from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import run_outstation
from scripts.faults import fault
from scripts.faults.disk import memory_cgroup, no_cgroup
from scripts.faults.world import Setting, World


def _dies_twice(world: World, rng: Random, flaw: str, most: int, least: int = 1) -> None:
    """Let the flaw end the daemon twice, at call number `least` to `most`; the supervisor restarts it."""
    before = world.restarts
    _flawed(world, flaw, rng.randint(least, most))
    world.restart(world.device)
    _flawed(world, flaw, rng.randint(least, most))
    wait_until("the second death", lambda: world.restarts >= before + 2)
    world.device.set_launcher(("-m", "outstation"))
    world.restart(world.device)


def _flawed(world: World, flaw: str, occasion: int) -> None:
    """Apply the flaw from the next start on."""
    world.device.set_launcher(("-m", "scripts.faults.launch", f"{flaw}={occasion}", "--"))


@fault()
def kill_daemon(world: World, rng: Random) -> None:
    for _ in range(2):
        time.sleep(rng.uniform(0.1, 1.0))
        world.restart(world.device)


@fault()
def kill_while_starting(world: World, rng: Random) -> None:
    for _ in range(5):
        world.restart(world.device)
        time.sleep(rng.uniform(0.05, 0.6))
    world.restart(world.device)


@fault()
def die_before_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-before-commit", 25)


@fault()
def die_after_commit(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-after-commit", 25)


@fault()
def die_in_invoke(world: World, rng: Random) -> None:
    # A model whose first run after each start ends the daemon is quarantined, correctly.
    _dies_twice(world, rng, "die-in-invoke", 10, least=2)


@fault()
def die_after_puback(world: World, rng: Random) -> None:
    _dies_twice(world, rng, "die-after-puback", 12)


@fault()
def stopped_process(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(world.device.pid, signal.SIGSTOP)
    time.sleep(rng.uniform(1.0, 4.0))
    os.kill(world.device.pid, signal.SIGCONT)


@fault()
def deleted_socket(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    path = world.device.data_dir / "intake.sock"
    path.unlink()
    wait_until("the socket is made again", path.exists, 10)


@fault()
def moved_data_folder(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.5))
    data = world.device.data_dir
    away = data.with_name("away")
    data.rename(away)
    before = world.restarts
    # The supervisor starts it again and again, and no start begins an empty store.
    wait_until("two starts in vain", lambda: world.restarts >= before + 2, 60)
    assert not data.exists()
    away.rename(data)


@fault()
def second_daemon(world: World, rng: Random) -> None:
    for command in ("run", "batch"):
        refused = run_outstation(command, "-c", str(world.device.config))
        assert refused.returncode != 0, refused
        assert str(world.device.pid) in refused.stderr, refused.stderr


@fault()
def graceful_restart(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.1, 0.6))
    world.leave(world.device)
    code = world.device.stop()
    assert code == 0, f"exit code {code}"
    world.keep(world.device)


@fault(Setting(missing=no_cgroup))
def memory_limit(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    before, most = world.restarts, round(rng.uniform(0.1, 3.0) * 2**20)
    with memory_cgroup(world) as limit:
        until = time.monotonic() + 20.0
        while world.restarts == before and time.monotonic() < until:
            limit(most)
            most //= 2
            time.sleep(0.5)
    assert world.restarts > before, "nobody was killed"


@fault()
def allocation_refused(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 0.8))
    pid = world.device.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (round(rng.uniform(0.0, 1.0) * 2**20), before[1]))
    time.sleep(rng.uniform(0.5, 2.0))
    if world.device.is_running and world.device.pid == pid:
        resource.prlimit(pid, resource.RLIMIT_AS, before)
