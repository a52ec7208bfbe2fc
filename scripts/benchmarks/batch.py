"""Batches from stored readings to committed results, beside the interpreter alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from agent import clock
from agent.cli import wiring
from agent.device import batch
from agent.device.incoming.sources import playlist
from agent.device.storage.rows import Rows
from agent.model import features
from agent.scenario import SCENARIOS
from agent.wire import keys
from scripts.benchmarks import Result, benchmark, rates

CONFIG = """
[device]
id = "bench"
fleet = "bench"
data_dir = "data"
[streams.watch]
fields = [{ name = "ax" }, { name = "ay" }, { name = "az" }, { name = "wx" }, { name = "wy" }, { name = "wz" }]
[tasks.exercise]
stream = "watch"
bundle = "exercise"
"""
WINDOWS = 4096
CHUNK = 8192


@benchmark("batch")
def stored_readings_to_results() -> Result:
    """Take, cut, quantize, invoke, judge, sign and commit; against invoke over a ready array."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outstation.toml"
        file.write_text(CONFIG, encoding="utf-8")
        _, conf = wiring.load(str(file))
        keys.generate(Path(folder) / wiring.KEY_FILE)
        store = wiring.open_store(conf)
        task = wiring.load_task(file, conf, store, "exercise")
        author = wiring.author(file, conf, store)
        spec = task.bundle.manifest.input
        rows = np.resize(playlist.load(SCENARIOS["exercise"].file).rows, (WINDOWS * task.window_rows, len(spec.fields)))
        ready = features.windows(rows, np.arange(WINDOWS, dtype=np.int64) * task.window_rows, spec)

        def fill() -> None:
            stored = store.last_row("watch")
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                t = (np.arange(len(part), dtype=np.int64) + stored + start) * 20_000
                with store.transaction() as tx:
                    tx.append("watch", Rows(t, tuple(np.ascontiguousarray(c) for c in part.T)), "synced")

        def ours() -> int:
            done = 0
            while (step := batch.run(task, store, author, clock.read())) is not None:
                done += step.windows
            return done

        try:
            note = "exercise model, drift and signature included; reference: the interpreter alone, same batch size"
            pace = rates(ours, lambda: len(task.model.invoke(ready)), prepare=fill)
            return Result("batch", *pace, "windows/s", 0.75, note)
        finally:
            store.close()
