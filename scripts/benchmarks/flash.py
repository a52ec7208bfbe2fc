"""Flash wear: bytes that readings write to the block device under an ext4, journal included.

Readings pass through the intake's group commit, so that its own writes are counted too.
"""

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
from msgspec.structs import replace

from agent import clock
from agent.config import FieldConfig, StreamConfig
from agent.device.intake.group_commit import GroupCommit
from agent.device.recovery.open import open_store
from agent.device.store.rows import RawColumns, validate_columns
from scripts.benchmarks import Result, benchmark

FIELDS = [f"f{i}" for i in range(8)]
ROWS, TOGETHER = 6000, 10
_SECTOR = 512


@benchmark("flash")
def written_bytes_per_row() -> Result:
    """Measure one row per second, acknowledged within ten seconds (commits of ten rows), against a commit per row."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        raise click.ClickException("flash needs root and mkfs.ext4 to mount a file system")
    values = np.random.default_rng(1).normal(size=(len(FIELDS), ROWS)).astype(np.float32)

    def ours(folder: Path) -> None:
        store, start = open_store(folder / "data"), clock.read()
        stream = StreamConfig(fields=[FieldConfig(name=name) for name in FIELDS])
        store.declare_streams({"rows": stream})
        group = GroupCommit(store, {"rows": stream})
        for at in range(0, ROWS, TOGETHER):
            now = replace(start, wall_us=start.wall_us + at * 1_000_000, boot_s=start.boot_s + at)
            t = now.wall_us / 1e6 - TOGETHER + np.arange(TOGETHER)
            part = dict(zip(FIELDS, values[:, at : at + TOGETHER], strict=True))
            checked = validate_columns(RawColumns(TOGETHER, t, part), stream, now.wall_us, None)
            group.add_rows("producer", "rows", checked, list(range(at + 1, at + TOGETHER + 1)), now)
            group.commit(now)
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
        f"{ROWS:,} rows, {each * 86_400 / 1e6:,.0f} MB a day at one row per second; "
        "reference: a SQLite commit for each row"
    )
    return Result("flash", each, alone, "bytes/row", 1 / 20, note, less=True)


def _written(work: Callable[[Path], None]) -> int:
    """Return the bytes that reached the device between mount and the final sync."""
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
    # The block size of a card's file system; a small file system would get 1 KiB. Lazily initialized tables are written
    # now.
    lazy = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(["mkfs.ext4", "-qF", "-b", "4096", "-E", lazy, str(image)], check=True)
    completed = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    device = completed.stdout.strip()
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
