"""What readings write to the medium, the file system's journal included: at the block device under an ext4."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

from agent.config import Field, Stream
from agent.device.storage.rows import Rows
from agent.device.storage.store import Store
from scripts.benchmarks import Result, benchmark

FIELDS = [f"f{i}" for i in range(8)]
ROWS, TOGETHER = 6000, 10
_SECTOR = 512


@benchmark("flash")
def bytes_written_for_a_row() -> Result:
    """A row a second that is acknowledged within ten, as commits of ten rows; beside a commit for each."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        raise click.ClickException("flash needs root and mkfs.ext4, to mount a file system of its own")
    values = np.random.default_rng(1).normal(size=(len(FIELDS), ROWS)).astype(np.float32)

    def ours(folder: Path) -> None:
        store = Store(folder / "data")
        store.declare({"rows": Stream(fields=[Field(name=name) for name in FIELDS])})
        for at in range(0, ROWS, TOGETHER):
            t = np.arange(at, at + TOGETHER, dtype=np.int64) * 1_000_000
            with store.transaction() as tx:
                tx.append("rows", Rows(t, tuple(c[at : at + TOGETHER].copy() for c in values)), "synced")
        store.close()

    def plain(folder: Path) -> None:
        db = sqlite3.connect(folder / "plain.db", isolation_level=None)
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
        db.execute(f"CREATE TABLE readings (t INTEGER, {', '.join(f'{name} REAL' for name in FIELDS)})")
        for at, row in enumerate(values.T.tolist()):
            db.execute("INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (at, *row))
        db.close()

    each, alone = _written(ours) / ROWS, _written(plain) / ROWS
    note = (
        f"{ROWS:,} rows, {each * 86_400 / 1e6:,.0f} MB a day at one a second; reference: a SQLite commit for each row"
    )
    return Result("flash", each, alone, "bytes/row", 1 / 20, note, less=True)


def _written(work: Callable[[Path], None]) -> int:
    """Bytes that reached the device between the mount and the end of the work, all of it synced."""
    with tempfile.TemporaryDirectory() as made, _mounted(Path(made)) as (device, folder):
        before = _sectors(device)
        work(folder)
        subprocess.run(["sync", "-f", str(folder)], check=True)
        return (_sectors(device) - before) * _SECTOR


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[tuple[str, Path]]:
    image, point = folder / "image", folder / "mounted"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    point.mkdir()
    # Tables that ext4 would write later, on its own, are written now.
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(["mkfs.ext4", "-qF", "-E", lazy, str(image)], check=True)
    told = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    device = told.stdout.strip()
    try:
        subprocess.run(["mount", "-o", "noatime", device, str(point)], check=True)
        try:
            yield device, point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _sectors(device: str) -> int:
    return int(Path("/sys/block", Path(device).name, "stat").read_text(encoding="ascii").split()[6])
