"""Processor time per row of 16 floats and memory, of our drift monitor and of other detectors.

Our runs and theirs alternate, so that a busy machine slows all. The measure is the processor time of the whole process,
the median over several rounds. Learning the reference is excluded.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from scripts.benchmarks.drift_peers import memory, ours, synthetic
from scripts.benchmarks.drift_peers.peers import Peer
from scripts.benchmarks.drift_peers.synthetic import ROWS

ROUNDS = 7
YARDSTICK = "ten bins, NumPy"
FAST = "one prediction per row, 500 rows at a time, more than ten times a second"


class Case(msgspec.Struct, frozen=True):
    """A model that answers every `model_rows` rows, monitored in batches of `rows` rows for `us_per_row` at most."""

    called: str
    model_rows: int
    rows: int
    us_per_row: float
    window: int = ROWS  # rows


# Batches of a device that works off a backlog, and of live readings: rows that come fast, 500 at a time, are judged
# four drift windows at a time, and others one by one.
CASES = (
    Case("one prediction per row", 1, 4000, 0.8),
    Case("one prediction per 100 rows", 100, 51_000, 0.3),
    Case("one prediction per row, batches of 500 rows", 1, ROWS, 2.0),
    Case("one prediction per 100 rows, batches of 500 rows", 100, ROWS, 2.0),
    Case(FAST, 1, 4 * ROWS, 1.4),
    Case("one prediction per 100 rows, 500 rows at a time, more than ten times a second", 100, 4 * ROWS, 1.4),
    Case("one prediction per 100 rows, windows of 2,000 rows, one per batch", 100, 2000, 2.0, window=2000),
)


class Cost(msgspec.Struct, frozen=True):
    us_per_row: float
    import_mb: float | None = None
    work_mb: float | None = None


def judged(case: Case) -> Callable[[], float]:
    """Return a function that monitors the same rows repeatedly and returns the seconds per row."""
    kind = synthetic.KINDS[0]
    watch = ours.MonitorRun.from_kind(kind, case.model_rows, case.window)
    learned, _ = watch.step(watch.judge.start(), synthetic.quiet(kind, 1, synthetic.LEARN * case.window // ROWS))
    assert learned.site_reference is not None
    rows = synthetic.quiet(kind, 0, 102)
    tables = [rows[at : at + case.rows] for at in range(0, len(rows) - case.window + 1, case.rows)]
    batches = [(table, np.ascontiguousarray(table[:, : synthetic.FIELDS])) for table in tables]
    count = sum(map(len, tables))

    def once() -> float:
        state, begin = learned, time.process_time()
        for batch in batches:
            state, _ = watch.step(state, *batch)
        return (time.process_time() - begin) / count

    return once


def yardstick() -> Callable[[], float]:
    """Time ten-bin histograms of each field in NumPy alone: about 0.4 µs per row on an idle reference machine."""
    rows = synthetic.quiet(synthetic.KINDS[0], 0, 100)[:, : synthetic.FIELDS]
    edges = np.quantile(rows, np.arange(1, 10) / 10, axis=0).T

    def once() -> float:
        begin = time.process_time()
        for at in range(0, len(rows), ROWS):
            for field, column in enumerate(rows[at : at + ROWS].T):
                np.bincount(np.searchsorted(edges[field], column), minlength=10)
        return (time.process_time() - begin) / len(rows)

    return once


def in_turns(sides: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median µs per row of each, in alternating runs."""
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, once in sides.items():
            seen[name].append(1e6 * once())
    return {name: statistics.median(all_of) for name, all_of in seen.items()}


def memories(folder: Path) -> dict[str, dict[str, float]]:
    memory_by_kind = {}
    for case in (case for case in CASES if case.window == ROWS):
        file = folder / f"memory{case.model_rows}.npz"
        if not file.exists():
            memory.write(file, case.model_rows)
        memory_by_kind[case.called] = memory.measured(file, case.model_rows, case.rows)
    return memory_by_kind


def costs(others: Sequence[Peer], rounds: int = ROUNDS) -> dict[str, Cost]:
    """Return the cost of each detector by its display name."""
    with tempfile.TemporaryDirectory() as folder:
        memory_of = memories(Path(folder))
    sides = {case.called: judged(case) for case in CASES}
    sides[YARDSTICK] = yardstick()
    for peer in others:
        memory_of[peer.kit.called] = peer.memory
        sides[peer.kit.called] = peer.seconds_per_row
    return {name: Cost(us, **memory_of.get(name, {})) for name, us in in_turns(sides, rounds).items()}
