"""Collector faults: crash, locked database, full disk, duplicate instance, restored or rebuilt database."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from outstation.fleet import config as fleet_config
from outstation.foundation import clock
from outstation.workbench.testing.patience import wait_until
from outstation.workbench.testing.process import OutstationProcess
from scripts.faults import fault
from scripts.faults.world import DEVICE, Setting, World

_DISK = "48m"


@fault()
def kill_collector(world: World, rng: Random) -> None:
    for _ in range(3):
        time.sleep(rng.uniform(0.1, 0.8))
        world.restart(world.collector)


@fault()
def collector_database_locked(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    with contextlib.closing(sqlite3.connect(_database(world), isolation_level=None, timeout=10)) as db:
        db.execute("BEGIN EXCLUSIVE")
        time.sleep(rng.choice([0.5, 2.0, 6.5]))
        db.execute("ROLLBACK")


def _on_small_disk(world: World) -> None:
    """Put the collector's database on a small disk of its own."""
    disk = world.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(disk)], check=True)
    world.undo.callback(subprocess.run, ["umount", str(disk)], check=True)
    for file in _files(_database(world)):
        shutil.move(file, disk / file.name)
    toml = world.fleet.home / "fleet.toml"
    text = toml.read_text(encoding="utf-8").replace('db = "fleet.db"', f'db = "{disk / "fleet.db"}"')
    toml.write_text(text, encoding="utf-8")
    world.fleet.config = fleet_config.load(world.fleet.home)


@fault(Setting(prepare=(_on_small_disk,), missing=lambda: "mounting a small disk needs root" if os.geteuid() else None))
def collector_disk_full(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.0, 0.5))
    ballast = _database(world).with_name("ballast")
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(rng.uniform(0.5, 3.0))
    finally:
        ballast.unlink()


@fault(patience_s=30.0)
def collector_restored_from_backup(world: World, rng: Random) -> None:
    backup = world.folder / "backup.db"
    _copy(_database(world), backup)
    before = _messages(world)
    wait_until("more messages than in the backup", lambda: _messages(world) > before + 5)
    time.sleep(rng.uniform(0.0, 1.5))
    with _collector_down(world, rng):
        backup.replace(_database(world))


@fault(patience_s=100.0)
def collector_rebuilt(world: World, rng: Random) -> None:
    time.sleep(rng.uniform(0.2, 1.5))
    store = world.fleet.open_store()
    key = store.active_key(DEVICE)
    store.close()
    assert key is not None
    with _collector_down(world, rng):
        store = world.fleet.open_store(write=True)
        store.enrol(DEVICE, key, replace=False, now=clock.now_rfc3339())
        store.close()


@fault()
def two_collectors(world: World, rng: Random) -> None:
    second = OutstationProcess(world.folder / "second.log", "fleet", "collect", "--dir", str(world.fleet.home))
    try:
        second.start()
        wait_until(
            "the second one connected, or gave up", lambda: second.log_contains("connected") or not second.is_running
        )
        time.sleep(rng.uniform(1.0, 3.0))
    finally:
        second.kill()
        second.log.unlink()


@contextlib.contextmanager
def _collector_down(world: World, rng: Random) -> Iterator[None]:
    """Stop the collector, delete its database, and start it after the block; usually wait until it has recovered.

    A lower acknowledgement takes effect once it covers newer messages.
    """
    world.kill(world.collector)
    for file in _files(_database(world)):
        file.unlink()
    yield
    before = _connections(world)
    world.keep(world.collector)
    if rng.random() < 0.9:
        wait_until("the collector is back", lambda: _connections(world) > before)
        time.sleep(rng.uniform(0.5, 1.5))


def _connections(world: World) -> int:
    return world.collector.log.read_text(encoding="utf-8").count(" connected;")


def _database(world: World) -> Path:
    return Path(world.fleet.config.fleet.db)


def _files(database: Path) -> list[Path]:
    """Return the database and SQLite's companion files."""
    return [file for file in (Path(f"{database}{end}") for end in ("", "-wal", "-shm")) if file.exists()]


def _copy(database: Path, copy: Path) -> None:
    """Back up a database in use."""
    with (
        contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def _messages(world: World) -> int:
    return int(world.fleet.query("SELECT count(*) FROM messages WHERE device = ?", DEVICE)[0][0])
