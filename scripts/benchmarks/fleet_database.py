"""Fleet database: an audit of everything, an audit from its checkpoint on, and the drift of 1,000 devices."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import TypeVar

import numpy as np

from outstation.fleet.audit.audit import audit_from_checkpoint
from outstation.fleet.audit.checkpoint import CheckpointFolder
from outstation.fleet.database.ingest import Arrival
from outstation.fleet.database.store import FleetStore
from outstation.fleet.drift.survey import summarize_drift
from outstation.foundation import clock
from outstation.workbench.testing.messages import FLEET, MessageSender, SignedMessage, new_key
from scripts import benchmarks
from scripts.benchmarks import Report, Result, Section, benchmark, catalogue, page

T = TypeVar("T")
_write_lock: Lock  # of the database, in each process that fills it

_DEVICES = 1_000
# `scripts/bench fleet-database --rows 1000000` is the size of a large fleet.
_MESSAGES = 50_000
_LIMIT_S = 211e-6  # per message: the time before there were several processes
_SECTION_HEAD = """\
`scripts/bench fleet-database`: an audit of everything, one from its signed checkpoint on, and the drift of all devices.
Every message is signed, and verified as a collector does. `--rows 1000000 --folder FOLDER` makes a million of them, and
continues where an earlier run ended."""
_RUN_EVERY = 10
_STEP_US = 40_000_000
_FIRST_US = 1_795_000_000_000_000
_NOW = "2026-11-27T00:00:00.000000Z"


@benchmark("fleet-database")
def fleet_database() -> Report:
    """Measure with one process a processor. The limits are those of a million messages, in proportion."""
    count, processes = benchmarks.rows or _MESSAGES, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (benchmarks.folder or Path(temporary)) / f"fleet-{count}"
        _make_fleet(folder, max(1, count // _DEVICES), processes)
        store, key = FleetStore(folder / "fleet.db"), new_key(10_000)
        checkpoints = CheckpointFolder(Path(temporary) / "audit", FLEET, [key.public])
        full, full_cpu, (report, _) = _time(lambda: audit_from_checkpoint(store, checkpoints, key, processes=processes))
        again, again_cpu, (later, checkpoint) = _time(
            lambda: audit_from_checkpoint(store, checkpoints, key, processes=processes)
        )
        assert report.passed
        assert later.passed
        assert checkpoint is not None
        drift, drift_cpu, summary = _time(
            lambda: summarize_drift(store, now_us=_FIRST_US + 10**14, processes=processes)
        )
        assert len(summary.groups[0].devices) == _DEVICES
        store.close()
    peaks = [resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    size = f"{report.messages:,} messages of {_DEVICES:,} devices"
    memory = f"at most {peaks[0]} MiB, its workers {peaks[1]} MiB each"
    drift_note = f"{_DEVICES:,} devices, {summary.groups[0].windows:,} windows, {processes} processes"
    results = [
        Result.within(
            "audit", full, _LIMIT_S * report.messages, "s", _note(f"{size}, {processes} processes; {memory}", full_cpu)
        ),
        Result.within("audit from a checkpoint", again, _LIMIT_S * report.messages, "s", _note(size, again_cpu)),
        Result.within("fleet drift", drift, 1.0, "s", _note(drift_note, drift_cpu)),
    ]
    lines = [f"| {result.name} | {result.ours:.2f} s | {result.note} |" for result in results]
    head = ["| command | time by the clock | of what |", "|---|---:|---|"]
    measured = f"Measured {page.describe_run()}. On busy processors, compare processor times."
    table = "\n".join([*head, *lines, "", measured])
    return Report(results, table, Section(catalogue.OTHER, "A large fleet database", f"{_SECTION_HEAD}\n\n{table}"))


def _note(size: str, cpu_s: float) -> str:
    return f"{size}; {cpu_s:.1f} s of processor time"


def _time(work: Callable[[], T]) -> tuple[float, float, T]:
    """Return the seconds by the clock and of the processors that `work` takes, with its result."""
    began, before = time.perf_counter(), _processor_s()
    result = work()
    return time.perf_counter() - began, _processor_s() - before, result


def _processor_s() -> float:
    return sum(os.times()[:4])


def _make_fleet(folder: Path, messages: int, processes: int) -> None:
    """Fill the database of the folder with the messages of all devices, from the device on that an earlier run left."""
    folder.mkdir(parents=True, exist_ok=True)
    FleetStore(folder / "fleet.db").close()
    made = [index for index in range(_DEVICES) if not (folder / f"{index}.made").exists()]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _use_lock, (context.Lock(),)) as pool:
        list(pool.map(_make_device, repeat(folder), made, repeat(messages)))


def _use_lock(lock: Lock) -> None:
    global _write_lock
    _write_lock = lock


def _make_device(folder: Path, index: int, messages: int) -> None:
    sender = MessageSender(f"pi-{index:04}", new_key(index + 1), str(uuid.UUID(int=index + 1)))
    arrivals = [Arrival(sender.verify(sent)) for sent in _messages(sender, messages)]
    with _write_lock:
        store = FleetStore(folder / "fleet.db")
        store.enrol(sender.device, sender.key.public, replace=False, now=_NOW)
        store.ingest(arrivals, [], _NOW)
        store.close()
    (folder / f"{index}.made").touch()


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
