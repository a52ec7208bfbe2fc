"""What must hold after every fault: contract section 9, and the sensor's own ledger.

- every row that was acknowledged has one result per task at the collector, or a signed message says that it is gone
- no row has two results of a task; none comes that was not sent; the signed digest of each run is that of the sent rows
- `fleet audit` passes, the outbox is empty, and nobody had to do anything
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.device.rows import Rows
from agent.device.store import Store
from agent.errors import OutstationError
from agent.fleet.audit import Report, audit
from agent.fleet.store import FleetStore
from scripts.faults.world import DEVICE, TASKS, World

_POLL_S = 0.1


@dataclass
class Verdict:
    """Of one round. `lost`: acknowledged, not at the collector, not declared. `declared`: lost, and said so, signed."""

    acknowledged: int = 0
    lost: int = 0
    declared: int = 0
    doubled: int = 0
    recovery_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def settle(world: World, patience_s: float) -> Verdict:
    """Wait until all is delivered, as long as patience lasts, then judge."""
    began = time.monotonic()
    deadline = began + patience_s
    verdict = Verdict()
    if not world.producer.pause(patience_s):
        verdict.problems.append(f"the sensor's last line was not answered within {patience_s:.0f} s")
    if world.producer.failure is not None:
        verdict.problems.append(f"the sensor failed: {world.producer.failure}")
    while (waiting := _waiting(world)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    verdict.recovery_s = time.monotonic() - began
    if waiting:
        verdict.problems.append(f"within {patience_s:.0f} s not done: {waiting}")
    _judge(world, verdict)
    return verdict


def _waiting(world: World) -> str:
    """What is still to come; empty when nothing is."""
    if not world.running():
        return "a process is down"
    try:
        outbox = _outbox(world)
        seen = _seen(world)
    except OutstationError as error:
        return str(error)
    if outbox:
        return f"{outbox} messages in the outbox"
    short = {task: len(_absent(world, seen[task])) for task in TASKS}
    return f"rows without result: {short}" if any(short.values()) else ""


def _judge(world: World, verdict: Verdict) -> None:
    seen = _seen(world)
    ledger = world.producer.ledger
    verdict.acknowledged = len(ledger.acknowledged)
    for task in TASKS:
        counts = seen[task]
        absent = len(ledger.acknowledged - counts.keys())
        undeclared = len(_absent(world, counts))
        verdict.lost = max(verdict.lost, undeclared)
        verdict.declared = max(verdict.declared, absent - undeclared)
        verdict.doubled = max(verdict.doubled, sum(n - 1 for n in counts.values()))
        strangers = len(counts.keys() - ledger.values.keys())
        if strangers:
            verdict.problems.append(f"{task}: {strangers} results of rows that nobody sent")
    report, altered = _evidence(world)
    if altered:
        verdict.problems.append(f"{altered} runs are not over the rows that were sent")
    if not report.passed:
        undeclared_gaps = [gap for gap in report.gaps if not gap["declared"]]
        verdict.problems.append(f"the audit fails: gaps {undeclared_gaps[:3]}, invalid {report.invalid[:3]}")
        verdict.doubled = max(verdict.doubled, report.duplicates)


def _outbox(world: World) -> int:
    store = Store(world.device.data, read_only=True)
    try:
        return store.outbox_size()[0]
    finally:
        store.close()


def _seen(world: World) -> dict[str, Counter[int]]:
    """For each task, how many results each row has, by its time."""
    found: dict[str, Counter[int]] = {task: Counter() for task in TASKS}
    for task, t, n in world.fleet.ask("SELECT task, t, count(*) FROM results WHERE device = ? GROUP BY 1, 2", DEVICE):
        found[task][t] = n
    return found


def _absent(world: World, counts: Counter[int]) -> set[int]:
    """Acknowledged rows without a result that no signed message declares as gone."""
    absent = world.producer.ledger.acknowledged - counts.keys()
    return absent if not absent else absent - _declared(world, absent)


def _declared(world: World, absent: set[int]) -> set[int]:
    """Those of `absent` whose row numbers a signed message declares; numbers follow the order of sending.

    Messages that were evicted are declared by seq, without their rows: any rows between the runs around them are meant.
    """
    rows = _numbers(world)
    ranges: list[tuple[int, int]] = []
    store = world.fleet.open()
    try:
        for (payload,) in store._all(
            "SELECT payload FROM messages WHERE device = ? AND kind IN ('audit', 'results')", DEVICE
        ):
            ranges += _ranges(json.loads(payload))
    finally:
        store.close()
    return {t for t in absent if any(a <= rows[t] <= b for a, b in ranges)}


def _ranges(body: dict[str, Any]) -> list[tuple[int, int]]:
    if body["kind"] == "results":
        return [tuple(body["rows"])] if body.get("lost") else []
    evidence = body.get("evidence", {})
    return [(a, b) for a, b in evidence.get("rows", [])] if body.get("event") == "evicted" else []


def _numbers(world: World) -> dict[int, int]:
    """Time → row number on the device: what was refused got none."""
    ledger = world.producer.ledger
    taken = [t for t in ledger.values if t not in ledger.refused]
    return {t: i for i, t in enumerate(taken, 1)}


def _evidence(world: World) -> tuple[Report, int]:
    """The audit, and how many runs carry another digest than that of the rows that were sent."""
    store = world.fleet.open()
    try:
        report = audit(store)
        return report, sum(_altered(world, json.loads(payload)) for payload in _runs(store))
    finally:
        store.close()


def _runs(store: FleetStore) -> list[bytes]:
    rows = store._all("SELECT payload FROM messages WHERE device = ? AND kind = 'results'", DEVICE)
    return [bytes(payload) for (payload,) in rows]


def _altered(world: World, body: dict[str, Any]) -> bool:
    first, last = body["rows"]
    times = body["columns"]["t"]
    if len(times) != last - first + 1 or not all(t in world.producer.ledger.values for t in times):
        return False
    values = np.array([world.producer.ledger.values[t] for t in times], np.float32)
    sent = Rows(np.array(times, np.int64), tuple(np.ascontiguousarray(values[:, i]) for i in range(values.shape[1])))
    return sent.digest() != str(body["input"])
