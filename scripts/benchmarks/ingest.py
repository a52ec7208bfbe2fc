"""Readings through the Python client into the daemon's store, against plain SQLite."""

from __future__ import annotations

import contextlib
import itertools
import json
import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from outstation.protocol.client import Client
from scripts.benchmarks import Result, benchmark, rates
from scripts.benchmarks.device_task import device_process
from scripts.kit.process_stats import cpu_s

FIELDS = [f"f{i}" for i in range(8)]
ROWS, LINE = 1_000_000, 1000
JSON_ROWS = 200_000
BEGIN_S = 1_764_022_680.0
_COLUMNS = "frames of 1000 rows, acknowledged within 100 ms; reference: packed chunks, a commit for each"
_LINES = "a line per row, acknowledged within 100 ms; reference: json.loads and executemany"


@benchmark("ingest")
def through_client_and_socket() -> list[Result]:
    """Measure durable intake: processor time of the client and the daemon together, and by the wall."""
    columns = np.random.default_rng(1).normal(size=(len(FIELDS), LINE)).astype(np.float32)
    t = np.arange(LINE, dtype=np.float64) / LINE
    rows = [dict(zip(FIELDS, map(float, row), strict=True)) for row in columns.T]
    text = [json.dumps({"stream": "rows", "t": BEGIN_S, **row}) for row in rows]
    with device_process(FIELDS, "rows") as device, _plain(device.home / "reference.db") as plain:
        # Each round ends with a group commit that waits for more rows, by default one second; nobody works meanwhile.
        device.append_config('[buffer]\ncommit_every = "100 ms"\n')
        device.start_and_wait()
        with Client(device.data_dir / "intake.sock") as client:
            clock = itertools.count(BEGIN_S)

            def columnar() -> int:
                for second, _ in zip(clock, range(ROWS // LINE), strict=False):
                    client.send_columns("rows", {"t": second + t, **dict(zip(FIELDS, columns, strict=True))})
                return client.flush().accepted

            def by_line() -> int:
                for second, _ in zip(clock, range(JSON_ROWS // LINE), strict=False):
                    for row in rows:
                        client.send("rows", t=second, **row)
                return client.flush().accepted

            def cpu() -> float:
                return time.process_time() + cpu_s(device.pid)

            chunks = rates(columnar, lambda: _insert_chunks(plain, columns, t), cpu, rounds=5)
            lines = rates(by_line, lambda: _insert_json(plain, text), rounds=5, cpu=cpu)
    return [
        Result.timed("ingest", chunks, "rows/CPU s", 0.6, _COLUMNS),
        Result.timed("ingest, JSON", lines, "rows/s", 1.0, _LINES),
    ]


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[sqlite3.Connection]:
    """Write to SQLite as a hand-written program would, with the store's durability."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as plain:
        plain.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL")
        plain.execute("CREATE TABLE chunks (crc INTEGER, data BLOB)")
        plain.execute(f"CREATE TABLE readings ({', '.join(f'{name} REAL' for name in FIELDS)})")
        yield plain


def _insert_chunks(plain: sqlite3.Connection, columns: np.ndarray[Any, Any], t: np.ndarray[Any, Any]) -> int:
    for _ in range(ROWS // LINE):
        blob = (t * 1e6).astype(np.int64).tobytes() + columns.tobytes()
        plain.execute("BEGIN")
        plain.execute("INSERT INTO chunks VALUES (?, ?)", (zlib.crc32(blob), blob))
        plain.execute("COMMIT")
    return ROWS


def _insert_json(plain: sqlite3.Connection, text: list[str]) -> int:
    for _ in range(JSON_ROWS // LINE):
        parsed = [json.loads(line) for line in text]
        plain.execute("BEGIN")
        plain.executemany(
            "INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [tuple(row[name] for name in FIELDS) for row in parsed],
        )
        plain.execute("COMMIT")
    return JSON_ROWS
