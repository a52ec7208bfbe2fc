"""Cost of a batch with a large backlog, compared with a small one."""

from __future__ import annotations

import os

import numpy as np

from agent import clock
from agent.device.pipeline import batch
from agent.testing.fleet import FIELDS
from scripts.benchmarks import Result, benchmark, device_task, rates

FEW, MANY = 200_000, 10_000_000
_BATCHES = 3


@benchmark("backlog")
def batch_with_large_backlog() -> Result:
    """Measure whole batches of the exercise model, from the store to committed results, by wall clock."""
    rows = np.random.default_rng(0).normal(0, 1, (FEW, len(FIELDS))).astype(np.float32)
    with (
        device_task.device_with_task(FIELDS, "exercise") as few,
        device_task.device_with_task(FIELDS, "exercise") as many,
    ):
        for _ in range(MANY // FEW):
            many.fill(rows)
        # Otherwise the kernel would flush the backlog to disk during the measurement.
        os.sync()

        def prepare() -> None:
            few.work_off()
            few.fill(rows)

        pace = rates(lambda: _some(many), lambda: _some(few), rounds=5, prepare=prepare)
    ours, reference = (1e3 / each for each in pace)
    note = f"{MANY:,} rows waiting; reference: the same with {FEW:,}"
    return Result("backlog", ours, reference, "ms/batch", 1.2, note, less=True)


def _some(device: device_task.Bed) -> int:
    for _ in range(_BATCHES):
        assert batch.run(device.task, device.store, device.author, clock.read()) is not None
    return _BATCHES
