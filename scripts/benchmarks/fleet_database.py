"""Fleet database: an audit of everything, an audit from its checkpoint on, and the drift of 1,000 devices."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agent import clock
from agent.fleet.audit.audit import audit, audit_from_checkpoint
from agent.fleet.audit.checkpoint import CheckpointFolder
from agent.fleet.database.ingest import Arrival
from agent.fleet.database.store import FleetStore
from agent.fleet.drift.survey import summarize_drift
from agent.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from scripts import benchmarks
from scripts.benchmarks import Result, benchmark

_DEVICES = 1_000
# `scripts/bench fleet-database --rows 1000000` is the size of a large fleet.
_MESSAGES = 50_000
_RUN_EVERY = 10
_STEP_US = 40_000_000
_FIRST_US = 1_795_000_000_000_000
_NOW = "2026-11-27T00:00:00.000000Z"


@benchmark("fleet-database")
def fleet_database() -> list[Result]:
    """Measure with one process a processor. The limits are those of a million messages, in proportion."""
    count, processes = benchmarks.rows or _MESSAGES, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        store = FleetStore(Path(folder) / "fleet.db")
        for index in range(_DEVICES):
            sender = MessageSender(f"pi-{index:04}", new_key(index + 1))
            store.enrol(sender.device, sender.key.public, replace=False, now=_NOW)
            arrivals = [Arrival(sender.verify(sent)) for sent in _messages(sender, max(1, count // _DEVICES))]
            store.ingest(arrivals, [], _NOW)
        key = new_key(10_000)
        checkpoints = CheckpointFolder(Path(folder) / "audit", FLEET, [key.public])
        began = time.perf_counter()
        assert audit(store, processes=processes).passed
        full = time.perf_counter() - began
        audit_from_checkpoint(store, checkpoints, key, processes=processes)
        began = time.perf_counter()
        report, checkpoint = audit_from_checkpoint(store, checkpoints, key, processes=processes)
        again = time.perf_counter() - began
        assert report.passed
        assert checkpoint is not None
        began = time.perf_counter()
        summary = summarize_drift(store, now_us=_FIRST_US + 10**14, processes=processes)
        drift = time.perf_counter() - began
        assert len(summary.groups[0].devices) == _DEVICES
        store.close()
    peaks = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    note = (
        f"{report.messages:,} messages of {_DEVICES:,} devices, {processes} processes; "
        f"at most {peaks[0]} MiB, its workers {peaks[1]} MiB each"
    )
    return [
        Result.within("audit", full, 211e-6 * report.messages, "s", note),
        Result.within("audit from a checkpoint", again, 211e-6 * report.messages, "s", note),
        Result.within("fleet drift", drift, 1.0, "s", f"{_DEVICES:,} devices, {summary.groups[0].windows:,} windows"),
    ]


def _messages(sender: MessageSender, count: int) -> Iterator[SignedMessage]:
    rng = np.random.default_rng(sender.device.encode()[-1])
    for index in range(count):
        if index % _RUN_EVERY == 0:
            yield _quiet_run(sender, index // _RUN_EVERY, rng)
        else:
            yield sender.results()


def _quiet_run(sender: MessageSender, number: int, rng: np.random.Generator) -> SignedMessage:
    """Return a run of three quiet drift windows with six fields."""
    row, begin = 6000 * number, _FIRST_US + 3 * _STEP_US * number
    sums = {"cusum": {"mean": [1.0, 2.0], "spread": [0.5, 0.2], "limit": 9.0}}
    features = {
        f"f{field}": {
            "counts": rng.multinomial(5910, [1 / 32] * 32).tolist(), "below": 50, "above": 40, "missing": 0,
            "state": "ok", "mean": float(rng.normal()), "m2": 7.0, **sums,
        }
        for field in range(6)
    }  # fmt: skip
    columns = {
        "first": [[row + 1, 2000, 3]],
        "last": [[row + 2000, 2000, 3]],
        "from": [[begin, _STEP_US, 3]],
        "to": {"first": begin + _STEP_US - 1, "step": _STEP_US, "offsets": [0, 0, 0]},
        "n": [[2000, 0, 3]],
        "nearest": [0.1, 0.25, 0],
    }
    times = {"from": clock.to_rfc3339(begin), "to": clock.to_rfc3339(begin + 3 * _STEP_US - 1)}
    window = {"index": 3 * number + 1, "rows": [row + 1, row + 6000], "n": 6000, **times}
    return sender.drift(window=window, windows=columns, features=features)
