"""Disk faults: power loss, I/O errors, hangs and full disks; most need a card, or strace for failing system calls."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from random import Random

from msgspec.structs import replace

from agent.testing.process import wait_until
from scripts.faults import fault
from scripts.faults.disk import Card, database_files, no_card, no_strace, on_card, results, stored_files, tampered
from scripts.faults.world import Setting, World

_NOTHING = "nothing but a new `started` event in the audit log"
_AGAIN = "a line with SQLite's error, and a new `started` event in the audit log"
_SYNC = "fdatasync,fsync"
_WRITE = "pwrite64,write,ftruncate,fallocate"
_CARD = Setting(prepare=on_card())


def _no_lying_card() -> str | None:
    return no_card() or no_strace()


# --- the process dies in a system call ---


@fault(
    "kill-in-commit",
    means="The daemon dies (SIGKILL) at the n-th flush of the write-ahead log, during a commit.",
    sees=_NOTHING,
    missing=no_strace,
)
def kill_in_commit(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    before = world.restarts
    with tampered(world, _SYNC, f"signal=KILL:when={rng.randint(1, 8)}", files=database_files(world)[1:]):
        wait_until("death in a commit", lambda: world.restarts > before)


@fault(
    "kill-in-checkpoint",
    means="The daemon dies (SIGKILL) at the n-th write while it copies the write-ahead log into the database.",
    sees=_NOTHING,
    missing=no_strace,
)
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


@fault(
    "power-cut",
    means="The power fails at a random moment, with and without ext4's journal: unsynced bytes are lost.",
    sees=_NOTHING,
    setting=_CARD,
    missing=no_card,
)
def power_cut(world: World, rng: Random) -> None:
    for journal in (False, True):
        time.sleep(rng.uniform(0.3, 1.2))
        _power_cut(world, journal=journal)


@fault(
    "power-cut-in-recovery",
    means="The power fails, and again within 100 ms after the restarted daemon locks the data folder.",
    sees=_NOTHING,
    setting=_CARD,
    missing=no_card,
)
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
    "control-normal-power-cut",
    means="Negative control: the store commits with synchronous=NORMAL, and the power fails.",
    sees="acknowledged rows are lost",
    setting=Setting(
        prepare=on_card(), launcher=("-m", "scripts.faults.launch", "synchronous=NORMAL", "--"), rate=1_000.0
    ),
    missing=no_card,
    control=True,
    patience_s=10.0,
)
def control_normal_power_cut(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.5, 1.5))
    _power_cut(world, journal=False)


@fault(
    "lying-flush",
    means=(
        "A card confirms flushes without doing them, and the power fails. The collector keeps what it had received; "
        "its messages reveal what the store lost."
    ),
    sees="a critical storage alert, and a `new log` event that lists what the old log lacks",
    setting=replace(_CARD, forgetful=True),
    missing=_no_lying_card,
    damages=True,
)
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


@fault(
    "write-ENOSPC",
    means="For about a second every write to the data folder fails for lack of space.",
    sees="producers get `not stored`; a line in the journal",
    missing=no_strace,
)
def write_enospc(world: World, rng: Random) -> None:
    _failing(world, rng, _WRITE, "error=ENOSPC", stored_files(world))


@fault("write-EIO", means="For about a second every write to the store fails.", sees=_AGAIN, missing=no_strace)
def write_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _WRITE, "error=EIO", stored_files(world))


@fault("fsync-EIO", means="For about a second every flush of the store fails.", sees=_AGAIN, missing=no_strace)
def fsync_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _SYNC, "error=EIO", database_files(world))


@fault(
    "one-fsync-EIO",
    means="One flush of the store fails and the next ones succeed, as on Linux.",
    sees=_AGAIN,
    missing=no_strace,
)
def one_fsync_eio(world: World, rng: Random) -> None:
    _failing(world, rng, _SYNC, f"error=EIO:when={rng.randint(1, 6)}", database_files(world))


@fault(
    "slow-card",
    means="For a few seconds every flush takes 200 to 1500 ms.",
    sees="nothing; producers wait longer for their acknowledgements",
    missing=no_strace,
)
def slow_card(world: World, rng: Random) -> None:
    with tampered(world, _SYNC, f"delay_enter={rng.randint(200, 1500)}ms", files=database_files(world)):
        time.sleep(rng.uniform(1.0, 3.0))


# --- the file system refuses writes ---


@fault(
    "read-only-card",
    means="ext4 detects an error and makes the card read-only; the machine is restarted seconds later.",
    sees="the daemon restarts in a loop and reports that it cannot write the data folder",
    setting=_CARD,
    missing=no_card,
)
def read_only_card(world: World, rng: Random) -> None:
    card = Card.in_world(world)
    time.sleep(rng.uniform(0.2, 0.8))
    card.fail()
    time.sleep(rng.uniform(0.5, 3.0))
    _power_cut(world, journal=True)


@fault(
    "disk-full",
    means="Another program fills the disk, in half of the cases as fast as space is freed, and then stops.",
    sees="producers get `not stored`; a line in the journal",
    setting=Setting(prepare=on_card(24)),
    missing=no_card,
)
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


@fault(
    "disk-full-restart",
    means="Another program fills the disk, and the daemon is killed and restarted while it is full.",
    sees="producers get `not stored`; a line in the journal",
    setting=Setting(prepare=on_card(24)),
    missing=no_card,
)
def disk_full_restart(world: World, rng: Random) -> None:
    card = Card.in_world(world)
    time.sleep(rng.uniform(0.2, 0.8))
    card.fill()
    time.sleep(rng.uniform(0.2, 0.8))
    world.restart(world.device)
    time.sleep(rng.uniform(1.5, 3.0))
    card.free()


@fault(
    "quota-too-small",
    means="The quota is 1 MiB, and the broker is away until it has been full for a while.",
    sees="a storage alert, and `evicted` events in the audit log that list what was deleted",
    setting=Setting(
        buffer_toml='max_size = "1 MiB"',
        rate=2_500.0,
        launcher=("-m", "scripts.faults.launch", "evict-after=1", "--"),
    ),
    damages=True,
)
def quota_too_small(world: World, rng: Random) -> None:
    world.broker.kill()
    time.sleep(rng.uniform(3.0, 6.0))
    world.broker.start()
