"""The store on disk: durable commits, bytes per row, and bytes written to flash."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from msgspec.structs import replace

from outstation.device.config.streams import FieldConfig, StreamConfig
from outstation.device.intake.group_commit import GroupCommit
from outstation.device.recovery.open import open_store
from outstation.device.store.rows import RawColumns, Rows, validate_columns
from outstation.device.store.store import DATABASE
from outstation.foundation import clock
from scripts.benchmarks import Result, benchmark, rates

FIELDS = [f"f{i}" for i in range(8)]
ROWS, TOGETHER = 6000, 10
_SECTOR = 512
_COMMITS, _CHUNK = 50, 1000
_AXES = ["ax", "ay", "az", "wx", "wy", "wz"]
# Size of eight float32 values and a time delta.
_PAYLOAD = 36


def _stream(fields: Sequence[str]) -> StreamConfig:
    return StreamConfig(fields=[FieldConfig(name=name) for name in fields])


@benchmark("buffer")
def buffer() -> Result:
    """Measure both sides with a commit every 1000 rows, to a WAL database with synchronous=FULL in one folder.

    CPU time is measured, since the wait for the disk depends on the disk alone.
    """
    values = np.random.default_rng(1).normal(size=(len(_AXES), _CHUNK)).astype(np.float32)
    times = np.arange(_CHUNK, dtype=np.int64) * 10_000
    tuples = list(zip(times.tolist(), *values.tolist(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "ours")
        store.declare_streams({"watch": _stream(_AXES)})
        plain = sqlite3.connect(Path(folder) / "reference.db", isolation_level=None)
        plain.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=OFF")
        plain.execute(f"CREATE TABLE readings (t INTEGER, {', '.join(f'{name} REAL' for name in _AXES)})")

        def ours() -> int:
            for _ in range(_COMMITS):
                with store.transaction() as tx:
                    tx.append("watch", Rows(times, tuple(values)), "synced")
            return _COMMITS * _CHUNK

        def reference() -> int:
            for _ in range(_COMMITS):
                plain.execute("BEGIN")
                plain.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?)", tuples)
                plain.execute("COMMIT")
            return _COMMITS * _CHUNK

        try:
            note = f"{_CHUNK} rows of {len(_AXES)} floats per commit, synchronous=FULL; reference: sqlite3 executemany"
            return Result.timed("buffer", rates(ours, reference, time.process_time), "rows/CPU s", 2.0, note)
        finally:
            store.close()
            plain.close()


@benchmark("storage", quick=True)
def bytes_on_disk() -> Result:
    """Measure a million rows in chunks of a thousand, after a checkpoint."""
    values = tuple(np.random.default_rng(2).normal(size=(len(FIELDS), _CHUNK)).astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))
        store.declare_streams({"rows": _stream(FIELDS)})
        before = store.used_bytes()
        for chunk in range(1000):
            times = (np.arange(_CHUNK, dtype=np.int64) + chunk * _CHUNK) * 10_000
            with store.transaction() as tx:
                tx.append("rows", Rows(times, values), "synced")
        each = (store.used_bytes() - before) / 1_000_000
        store.close()
    return Result("storage", each, _PAYLOAD, "bytes/row", 1.2, "8 floats and their time, 1000 rows a chunk", less=True)


@benchmark("flash")
def written_bytes_per_row() -> Result:
    """Measure the bytes written to a block device under ext4, journal included, against a commit per row.

    Rows pass through the intake's group commit, in commits of ten rows. Both sides begin with an empty folder. The
    journal of small commits is folded into the database when it is full; a daemon also folds it with its messages.
    """
    each, alone = _compare(grown=False)
    note = f"{ROWS:,} rows in commits of {TOGETHER}, the journal folded when full; reference: a SQLite commit a row"
    return Result("flash", each, alone, "bytes/row", 0.055, note, less=True)


@benchmark("flash-grown")
def written_bytes_per_row_later() -> Result:
    """Measure the same when both write-ahead logs have their full size, as after some time of running."""
    each, alone = _compare(grown=True)
    note = "as flash, but both write-ahead logs had their full size before"
    return Result("flash, WAL grown", each, alone, "bytes/row", 0.07, note, less=True)


def _compare(*, grown: bool) -> tuple[float, float]:
    """Return the bytes a row of the store, and of a commit per row."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        raise click.ClickException("flash needs root and mkfs.ext4 to mount a file system")
    values = np.random.default_rng(1).normal(size=(len(FIELDS), ROWS)).astype(np.float32)

    def ours(folder: Path) -> Iterator[None]:
        if not grown:
            yield
        store, start = open_store(folder / "data"), clock.read()
        stream = _stream(FIELDS)
        store.declare_streams({"rows": stream})
        group = GroupCommit(store, {"rows": stream})
        rows = Rows(np.arange(ROWS, dtype=np.int64), tuple(values))
        while grown and (folder / "data" / f"{DATABASE}-wal").stat().st_size < store.quota.wal_bytes // 4:
            with store.transaction() as tx:
                tx.append("rows", rows, "synced")
        if grown:
            store._db.execute("PRAGMA wal_checkpoint(RESTART)")
            yield
        for at in range(0, ROWS, TOGETHER):
            now = replace(start, wall_us=start.wall_us + at * 1_000_000, boot_s=start.boot_s + at)
            t = now.wall_us / 1e6 - TOGETHER + np.arange(TOGETHER)
            part = dict(zip(FIELDS, values[:, at : at + TOGETHER], strict=True))
            checked = validate_columns(RawColumns(TOGETHER, t, part), stream, now.wall_us, None)
            group.add_rows("producer", "rows", checked, list(range(at + 1, at + TOGETHER + 1)), now)
            group.commit(now)
        store.close()

    def plain(folder: Path) -> Iterator[None]:
        if not grown:
            yield
        db = sqlite3.connect(folder / "plain.db", isolation_level=None)
        db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
        db.execute(f"CREATE TABLE readings (t INTEGER, {', '.join(f'{name} REAL' for name in FIELDS)})")
        sql, rows = "INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values.T.tolist()
        if grown:
            db.execute("BEGIN")
            db.executemany(sql, ((at, *rows[at % ROWS]) for at in range(10 * ROWS)))
            db.execute("COMMIT")
            yield
        for at, row in enumerate(rows):
            db.execute(sql, (at, *row))
        db.close()

    return _written(ours) / ROWS, _written(plain) / ROWS


def _written(work: Callable[[Path], Iterator[None]]) -> int:
    """Return the bytes that reached the device from when `work` is prepared to the final sync."""
    with tempfile.TemporaryDirectory() as made, _mounted(Path(made)) as (device, folder):
        steps = work(folder)
        next(steps)
        subprocess.run(["sync", "-f", str(folder)], check=True)
        before = _sectors(device)
        next(steps, None)
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
