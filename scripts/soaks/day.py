"""Soak of 24 hours online: memory, file handles and threads stay constant."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outstation.workbench.testing.simulation.lossy_link import LinkConditions
from scripts.soaks import Result
from scripts.soaks.rig import DEVICE, TASK, Rig

# Connections break every few minutes; occasionally a message is lost or duplicated.
_WEATHER = LinkConditions(loss=0.002, duplication=0.002, delay_s=0.5, disconnect=0.002)
_RESTART_S = 6 * 3600.0
_MOST_GROWTH_KIB = 5 * 1024
# Permanent allocations are complete by then.
_WARM = 1 / 12
# Rows since the last run of the task, and of an incomplete window.
_UNUSED = 2_000


@dataclass(frozen=True)
class Sample:
    """Sample after garbage collection: KiB of memory (own, and total resident), handles, threads."""

    hour: float
    own: int
    rss: int
    handles: int
    threads: int

    @staticmethod
    def take(hour: float) -> Sample:
        gc.collect()
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
        handles, threads = (len(os.listdir(f"/proc/self/{folder}")) for folder in ("fd", "task"))
        # Not PSS: its share of library pages grows whenever another process that maps them ends.
        return Sample(hour, sizes["Anonymous"], sizes["Rss"], handles, threads)


def day(folder: Path, seed: int, hours: float, announce: Callable[[str], None]) -> Result:
    """Run ten rows per second with the exercise model and a broker that loses, repeats, disconnects and restarts."""
    rig = Rig(folder, seed, _WEATHER)
    samples: list[Sample] = []

    def look() -> None:
        samples.append(Sample.take((len(samples) + 1) * every / 3600))
        announce(line(rig, samples[-1]))

    every = max(hours * 3600 / 24, 300.0)
    rig.each(every, look)
    rig.each(_RESTART_S, rig.air.restart)
    try:
        rig.run(hours * 3600)
        result = judge(rig, samples, hours)
    finally:
        rig.close()
    return result


def line(rig: Rig, sample: Sample) -> str:
    memory = f"{sample.own / 1024:6.1f} MiB of its own, RSS {sample.rss / 1024:6.1f} MiB"
    held = f"{sample.handles} handles, {sample.threads} threads"
    done = f"{rig.sensor.accepted:8} rows, {rig.air.connects[DEVICE]:4} connections"
    return f"hour {sample.hour:5.2f}: {memory}, {held}; {done}"


def judge(rig: Rig, samples: list[Sample], hours: float) -> Result:
    """Check for constant resources and complete delivery."""
    report = rig.audit()
    waiting, seq = rig.store.outbox_size()
    result = Result()
    flat(samples, hours, result)
    if not report.passed or report.gaps:
        result.problems.append(f"the audit fails: gaps {report.gaps[:3]}, invalid {report.invalid[:3]}")
    if waiting:
        result.problems.append(f"{waiting} messages were not delivered")
    if (used := rig.store.cursor(TASK) or 0) < rig.sensor.accepted - _UNUSED:
        result.problems.append(f"{used} of {rig.sensor.accepted} rows were used")
    connections = rig.air.connects[DEVICE]
    result.figures |= {"hours": hours, "rows": rig.sensor.accepted, "messages": seq, "connections": connections}
    return result


def flat(samples: list[Sample], hours: float, result: Result) -> None:
    """Check that memory, handles and threads stay constant after warm-up."""
    warm = [sample for sample in samples if sample.hour >= hours * _WARM]
    growth = max(sample.own for sample in warm) - warm[0].own
    if growth > _MOST_GROWTH_KIB:
        result.problems.append(f"memory grew by {growth / 1024:.1f} MiB after hour {warm[0].hour:.1f}")
    for name in ("handles", "threads"):
        seen = sorted({getattr(sample, name) for sample in warm})
        result.figures[name] = seen[-1]
        if len(seen) > 1:
            result.problems.append(f"{name} between {seen[0]} and {seen[-1]}")
    result.figures |= {"growth_kib": growth, "own_kib": warm[-1].own}
