"""Durable storage of rows: the store's chunks against one SQLite row per reading, with equal durability."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np

from agent.config import FieldConfig, StreamConfig
from agent.device.recovery.open import open_store
from agent.device.store.rows import Rows
from scripts.benchmarks import Result, benchmark, rates

COMMITS = 50
ROWS = 1000
FIELDS = ["ax", "ay", "az", "wx", "wy", "wz"]


@benchmark("buffer")
def buffer() -> Result:
    """Measure both sides with a commit every 1000 rows, to a WAL database with synchronous=FULL in one folder.

    CPU time is measured, since the wait for the disk depends on the disk alone.
    """
    values = np.random.default_rng(1).normal(size=(len(FIELDS), ROWS)).astype(np.float32)
    times = np.arange(ROWS, dtype=np.int64) * 10_000
    tuples = list(zip(times.tolist(), *values.tolist(), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "ours")
        store.declare_streams({"watch": StreamConfig(fields=[FieldConfig(name=name) for name in FIELDS])})
        plain = sqlite3.connect(Path(folder) / "reference.db", isolation_level=None)
        plain.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA secure_delete=OFF")
        plain.execute(f"CREATE TABLE readings (t INTEGER, {', '.join(f'{name} REAL' for name in FIELDS)})")

        def ours() -> int:
            for _ in range(COMMITS):
                with store.transaction() as tx:
                    tx.append("watch", Rows(times, tuple(values)), "synced")
            return COMMITS * ROWS

        def reference() -> int:
            for _ in range(COMMITS):
                plain.execute("BEGIN")
                plain.executemany("INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?)", tuples)
                plain.execute("COMMIT")
            return COMMITS * ROWS

        try:
            note = f"{ROWS} rows of {len(FIELDS)} floats per commit, synchronous=FULL; reference: sqlite3 executemany"
            return Result("buffer", *rates(ours, reference, time.process_time), "rows/CPU s", 2.0, note)
        finally:
            store.close()
            plain.close()
