"""Soak of 72 hours without a network on a store that is too small; then the network returns."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outstation.device.capacity.space import hours_until_eviction
from outstation.fleet.database.gap_ledger import EVICTED
from outstation.workbench.testing.simulation.lossy_link import LinkConditions
from scripts.soaks import Result
from scripts.soaks.rig import TASK, Rig

_OFFLINE, _ONLINE = LinkConditions(disconnect=1.0), LinkConditions(delay_s=0.2)
_RATE = 50.0
# 48 MiB for 72 hours, and never less than the minimum of a store.
_MIB_AN_HOUR, _LEAST_MIB = 48 / 72, 2
_CATCH_UP_S = 1800.0
_UNUSED = 4_000


def offline(folder: Path, seed: int, hours: float, announce: Callable[[str], None]) -> Result:
    """Run fifty rows per second with the exercise model; evicted rows are declared exactly, all others arrive."""
    mib = max(_LEAST_MIB, round(hours * _MIB_AN_HOUR))
    rig = Rig(folder, seed, _OFFLINE, rate=_RATE, buffer_toml=f'max_size = "{mib} MiB"')
    most = 0
    ends_s = rig.air.clock_s + hours * 3600

    def look() -> None:
        nonlocal most
        most = max(most, size(rig))
        if rig.air.clock_s >= ends_s:
            rig.air.conditions = _ONLINE

    def tell() -> None:
        waiting = rig.store.backlog()
        hour = (rig.air.clock_s - ends_s) / 3600 + hours
        left = hours_until_eviction(rig.daemon._store, rig.daemon._store.limit_bytes())
        used = f"{rig.store.used_bytes() / 2**20:.1f} of {mib} MiB in use"
        used += f", room for {left:g} h more" if left is not None else ""
        announce(f"hour {hour:5.1f}: {rig.sensor.accepted:9} rows, {waiting.messages:6} messages wait, {used}")

    rig.each(10.0, look)
    rig.each(max(hours * 3600 / 24, 600.0), tell)
    try:
        rig.run(hours * 3600 + _CATCH_UP_S)
        result = judge(rig)
        result.figures |= {"hours": hours, "max_size": mib << 20, "largest": most}
        if most > mib << 20:
            result.problems.append(f"the store took {most} bytes of the {mib << 20} it may")
        for name, value in result.figures.items():
            announce(f"{name:30} {value}")
    finally:
        rig.close()
    return result


def size(rig: Rig) -> int:
    names = ("outstation.db", "outstation.db-wal", "outstation.db-shm", "journal", "reserve")
    files = [rig.store.path.with_name(name) for name in names]
    return sum(file.stat().st_size for file in files if file.exists())


def judge(rig: Rig) -> Result:
    report, result = rig.audit(), Result()
    declared, readings, reasons = declarations(rig)
    missing = {seq for gap in report.gaps for seq in range(gap["from"], gap["to"] + 1)}
    waiting, last = rig.store.outbox_size()
    used = rig.store.cursor(TASK) or 0
    checks = {
        f"the audit fails: {report.invalid[:3]}": report.passed,
        f"{len(declared ^ missing)} messages are declared and there, or missing and not declared": declared == missing,
        "nothing had to go: the store was not too small": bool(missing),
        f"{waiting} messages were not delivered": not waiting,
        f"{report.messages} messages arrived and {len(missing)} went, of {last}": report.messages + len(missing)
        == last,
        f"{used} of {rig.sensor.accepted} rows were used": used >= rig.sensor.accepted - _UNUSED,
    }
    result.problems += [problem for problem, holds in checks.items() if not holds]
    result.figures |= {
        "rows": rig.sensor.accepted,
        "written": last,
        "arrived": report.messages,
        "evicted": len(missing),
        "used readings that went early": readings,
        "declarations": sum(reasons.values()),
        "stored messages": dict(Counter(str(kind) for _, _, _, kind, *_ in rig.fleet.evidence())),
    }
    return result


def declarations(rig: Rig) -> tuple[set[int], int, Counter[str]]:
    """Return the seqs and used readings declared as lost at the collector, and the number of such messages."""
    seqs: set[int] = set()
    readings, reasons = 0, Counter[str]()
    for body in payloads(rig, "audit"):
        if body["event"] == EVICTED:
            evidence = body["evidence"]
            reasons[evidence["reason"]] += 1
            seqs |= {seq for first, last in evidence.get("seq", []) for seq in range(first, last + 1)}
            readings += sum(last - first + 1 for first, last in evidence.get("rows", []) if evidence["used"])
    return seqs, readings, reasons


def payloads(rig: Rig, kind: str) -> list[dict[str, Any]]:
    return [json.loads(payload) for _, _, _, row_kind, _, payload, *_ in rig.fleet.evidence() if row_kind == kind]
