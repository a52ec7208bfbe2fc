"""Disk faults: power loss, I/O errors, hangs and full disks; most need a card, or strace for failing system calls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from random import Random

from msgspec.structs import replace

from outstation.workbench.testing.patience import wait_until
from scripts.faults import fault
from scripts.faults.disk import Card, database_files, no_card, no_strace, on_card, results, stored_files, tampered
from scripts.faults.world import Setting, World

_SYNC = "fdatasync,fsync"
_WRITE = "pwrite64,write,ftruncate,fallocate"
_CARD = Setting(prepare=(on_card(),), missing=no_card)
_SMALL_CARD = Setting(prepare=(on_card(24),), missing=no_card)
_STRACE = Setting(missing=no_strace)


# --- the process dies in a system call ---


@fault(_STRACE)
def kill_in_commit(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    before = world.restarts
    with tampered(world, _SYNC, f"signal=KILL:when={rng.randint(1, 8)}", files=database_files(world)[1:]):
        wait_until("death in a commit", lambda: world.restarts > before)


@fault(_STRACE)
def kill_in_checkpoint(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.5, 1.5))
    with tampered(world, "pwrite64", f"signal=KILL:when={rng.randint(1, 6)}", files=database_files(world)[:1]):
        # A clean stop ends with a checkpoint.
        world.leave(world.device)
        os.kill(world.device.pid, signal.SIGTERM)
        code = world.device.wait(15.0)
    assert code == -signal.SIGKILL, f"exit code {code}: it died nowhere"
    world.keep(world.device)


# --- power loss ---


def _power_cut(world: World, *, journal: bool) -> None:
    """Stop everything at once, then restore power and boot the machine."""
    world.kill(world.device)
    Card.in_world(world).cut(journal=journal)
    world.keep(world.device)


@fault(_CARD)
def power_cut(world: World, rng: Random) -> None:
    for journal in (False, True):
        time.sleep(rng.uniform(0.3, 1.2))
        _power_cut(world, journal=journal)


@fault(_CARD)
def power_cut_in_recovery(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.3, 1.0))
    _power_cut(world, journal=rng.random() < 0.5)
    wait_until("the daemon has the folder", lambda: _owner(world) == world.device.pid)
    time.sleep(rng.uniform(0.0, 0.1))
    _power_cut(world, journal=rng.random() < 0.5)


def _owner(world: World) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((world.device.data_dir / "lock").read_text())
    return None


@fault(
    replace(_CARD, launcher=("-m", "scripts.faults.launch", "synchronous=NORMAL", "--"), rate=1_000.0),
    patience_s=10.0,
    damages=True,
)
def control_normal_power_cut(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.5, 1.5))
    _power_cut(world, journal=False)


@fault(replace(_CARD, missing=lambda: no_card() or no_strace(), forgetful=True), damages=True)
def lying_flush(world: World, rng: Random) -> None:
    with tampered(world, _SYNC, "retval=0"):
        before = results(world)
        wait_until("something that the card drops was delivered", lambda: results(world) > before + 200)
        time.sleep(rng.uniform(0.0, 1.0))
        world.kill(world.device)
    Card.in_world(world).cut(journal=False)
    world.keep(world.device)


# --- system calls fail ---


def _failing(world: World, rng: Random, calls: str, how: str, files: list[Path]) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with tampered(world, calls, how, files=files):
        time.sleep(rng.uniform(0.3, 1.5))


@fault(_STRACE)
def write_enospc(world: World, rng: Random) -> None:
    _failing(world, rng, _WRITE, "error=ENOSPC", stored_files(world))


@fault(_STRACE)
def write_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _WRITE, "error=EIO", stored_files(world))


@fault(_STRACE)
def fsync_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _SYNC, "error=EIO", database_files(world))


@fault(_STRACE)
def one_fsync_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _SYNC, f"error=EIO:when={rng.randint(1, 6)}", database_files(world))


@fault(_STRACE)
def slow_card(world: World, rng: Random) -> None:
    with tampered(world, _SYNC, f"delay_enter={rng.randint(200, 1500)}ms", files=database_files(world)):
        time.sleep(rng.uniform(1.0, 3.0))


# --- the file system refuses writes ---


@fault(_CARD)
def read_only_card(world: World, rng: Random) -> None:
    card = Card.in_world(world)
    time.sleep(rng.uniform(0.2, 0.8))
    card.fail()
    time.sleep(rng.uniform(0.5, 3.0))
    _power_cut(world, journal=True)


@fault(_SMALL_CARD)
def disk_full(world: World, rng: Random) -> None:
    card, greedy = Card.in_world(world), rng.random() < 0.5
    time.sleep(rng.uniform(0.2, 0.8))
    card.fill()
    until = time.monotonic() + rng.uniform(2.0, 4.0)
    while time.monotonic() < until:
        time.sleep(0.05)
        if greedy:
            card.fill()
    card.free()


@fault(_SMALL_CARD)
def disk_full_restart(world: World, rng: Random) -> None:
    card = Card.in_world(world)
    time.sleep(rng.uniform(0.2, 0.8))
    card.fill()
    time.sleep(rng.uniform(0.2, 0.8))
    world.restart(world.device)
    time.sleep(rng.uniform(1.5, 3.0))
    card.free()


@fault(
    Setting(
        buffer_toml='max_size = "1 MiB"', rate=2_500.0, launcher=("-m", "scripts.faults.launch", "evict-after=1", "--")
    ),
    damages=True,
)
def quota_too_small(world: World, rng: Random) -> None:
    world.broker.kill()
    time.sleep(rng.uniform(3.0, 6.0))
    world.broker.start()
