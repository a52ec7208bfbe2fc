"""Statlog (Shuttle) data set, UCI: nine sensors of a space shuttle's radiators, each row labelled normal or not.

The file ships in the wheel of river, in the peers' environment. It has 45,586 normal and 3,511 other rows, published in
random order. Quiet windows hold normal rows; a change replaces a share of rows by other ones.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation.ml.drift import DriftMonitor, DriftState, DriftWindowResult, MonitorSettings, Reference
from outstation.ml.drift.baseline.learning import build_reference
from outstation.ml.drift.detectors.detector import JOINT, OUTPUT, SCORE
from scripts.benchmarks.drift_peers.counting import Row, raised

SEEDS = 12
ROWS = 500  # of a window
TRAINED, LEARN, QUIET, WATCHED = 20, 40, 30, 20  # windows
MOST_TURNS = 10
NAMES = tuple(f"f{i}" for i in range(1, 10))
SUBJECTS = {name: i for i, name in enumerate((*NAMES, OUTPUT, SCORE, JOINT))}
SHARES = {"2 % others": 0.02, "10 % others": 0.1}

Floats = NDArray[np.float32]


class Readings(msgspec.Struct, frozen=True):
    normal: Floats  # (n, 9)
    others: Floats


def load(environment: Path) -> Readings | None:
    """Return the data, or None if river is not installed in this environment."""
    files = list(environment.glob("lib/python*/site-packages/river/datasets/shuttle.csv.gz"))
    if not files:
        return None
    with gzip.open(files[0], "rt", encoding="ascii") as text:
        table = np.loadtxt(text, delimiter=",", skiprows=1, dtype=np.float32)
    return Readings(table[table[:, -1] == 0, :-1], table[table[:, -1] == 1, :-1])


def rows(readings: Readings, seeds: int = SEEDS) -> list[Row]:
    """Return results for drift and faults separately: normal rows contain single readings 1000 times the usual."""
    result_rows = {kind: Row(f"ours, {kind} alerts") for kind in ("drift", "fault")}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        judge, learned = _learned(readings.normal, rng)
        quiet = rng.permutation(readings.normal)[: QUIET * ROWS]
        trials = {
            change: _mixed(quiet[: WATCHED * ROWS], readings.others, share, rng) for change, share in SHARES.items()
        }
        for kind, row in result_rows.items():
            row.add_quiet(raised(_step(judge, learned, quiet)[1], SUBJECTS, kind))
            for change, mixed in trials.items():
                row.add(change, raised(_step(judge, learned, mixed)[1], SUBJECTS, kind), range(len(SUBJECTS) + 1))
    return list(result_rows.values())


def _learned(normal: Floats, rng: np.random.Generator) -> tuple[DriftMonitor, DriftState]:
    """Learn a site reference. Windows with a fault are skipped, so the number of windows varies."""
    judge = DriftMonitor(
        MonitorSettings(
            _reference(rng.permutation(normal)[: TRAINED * ROWS]), labels=(), window=ROWS, learn_windows=LEARN
        )
    )
    state = judge.start()
    for _ in range(MOST_TURNS):
        state, _ = _step(judge, state, rng.permutation(normal)[: LEARN * ROWS])
        if state.site_reference is not None:
            return judge, state
    raise AssertionError(f"it learned nothing from {MOST_TURNS * LEARN} windows")


def _mixed(normal: Floats, others: Floats, share: float, rng: np.random.Generator) -> Floats:
    at = np.flatnonzero(np.arange(len(normal)) % ROWS < share * ROWS)
    mixed = normal.copy()
    mixed[at] = rng.choice(others, len(at))
    return mixed


def _reference(rows: Floats) -> Reference:
    none = np.zeros(len(rows), np.int64)
    return build_reference(rows, np.arange(len(rows)), 1, none, None, ROWS, fields=NAMES)


def _step(judge: DriftMonitor, state: DriftState, rows: Floats) -> tuple[DriftState, list[DriftWindowResult]]:
    first, count = max(0, state.last_counted_row) + 1, len(rows)
    return judge.process_batch(
        state, rows, np.arange(count), 1, np.zeros(count, np.int64), None,
        rows=(first, first + count - 1), t=np.arange(first, first + count) * 1_000_000,
    )  # fmt: skip
