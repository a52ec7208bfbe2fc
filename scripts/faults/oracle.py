"""Oracle: the promises that must hold after every fault, checked against the sensor's ledger.

- each acknowledged row has one result per task at the collector, or a signed message declares it lost
- no row has two results of a task; no result belongs to a row that was never sent or was rejected
- the signed commitment of each run matches the sent rows
- `fleet audit` passes, the outbox is empty, and nobody had to intervene
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import msgspec
import numpy as np

from outstation.device.config.streams import FieldConfig
from outstation.device.machine import secret_file
from outstation.device.store.rows import Rows, commit
from outstation.fleet import config as fleet_config
from outstation.fleet.audit.audit import audit
from outstation.fleet.audit.audit_report import AuditReport
from outstation.foundation.arrays import Float32s, Ints
from outstation.foundation.errors import OutstationError
from outstation.protocol.wire import commitment
from outstation.protocol.wire.messages import ResultColumns
from outstation.workbench.testing.patience import Patience
from scripts.faults.declarations import Declarations
from scripts.faults.producer import FIELDS
from scripts.faults.world import DEVICE, TASKS, World

_POLL_S = 0.1
# While a busy machine still delivers, its patience begins again, this many times.
_MAX_EXTENSIONS = 4


class Verdict(msgspec.Struct):
    """Verdict on one round: `lost` rows are acknowledged, absent and undeclared; `declared` rows are lost but signed
    for.

    `logs` is the number of logs that the device has begun.
    """

    acknowledged: int = 0
    lost: int = 0
    declared: int = 0
    doubled: int = 0
    misdated: int = 0
    logs: int = 1
    recovery_s: float = 0.0
    problems: list[str] = msgspec.field(default_factory=list)


def settle(world: World, patience_s: float, *, expects_loss: bool = False) -> Verdict:
    """Wait until all is delivered, or nothing has changed within `patience_s`, then judge.

    Where a loss is expected, a busy machine gets no more time.
    """
    began = time.monotonic()
    patience, total = (Patience(times * patience_s, extends=not expects_loss) for times in (1, 1 + _MAX_EXTENSIONS))
    verdict = Verdict()
    answered = [sensor.pause(patience_s) for sensor in world.sensors()]
    if not all(answered):
        verdict.problems.append(f"a sensor's last line was not answered within {patience_s:.0f} s")
    if world.producer.failure is not None:
        verdict.problems.append(f"the sensor failed: {world.producer.failure}")
    before = ""
    while (waiting := _waiting(world)) and not patience.is_over() and not total.is_over():
        if before and waiting != before:
            patience.renew()
        before = waiting
        time.sleep(_POLL_S)
    verdict.recovery_s = time.monotonic() - began
    if waiting:
        verdict.problems.append(f"after {verdict.recovery_s:.0f} s not done: {waiting}")
    judge(world, verdict)
    return verdict


def _waiting(world: World) -> str:
    """Describe what is still to come; empty if nothing is."""
    if not world.running():
        return "a process is down"
    try:
        outbox = world.outbox_size()
        seen = _seen(world)
        others = [text for companion in world.companions if (text := companion.waiting())]
    except OutstationError as error:
        return str(error)
    if outbox:
        return f"{outbox} messages in the outbox"
    short = _undeclared(world, seen)
    return f"rows without result: {short}" if any(short.values()) else ", ".join(others)


def judge(world: World, verdict: Verdict) -> None:
    """Add each broken promise to `verdict`."""
    seen = _seen(world)
    ledger = world.producer.ledger
    verdict.acknowledged = len(ledger.acknowledged)
    undeclared = _undeclared(world, seen)
    for task in TASKS:
        counts = seen[task]
        absent = len(ledger.acknowledged - counts.keys())
        verdict.lost = max(verdict.lost, undeclared[task])
        verdict.declared = max(verdict.declared, absent - undeclared[task])
        verdict.doubled = max(verdict.doubled, _doubled(world, task, counts))
        strangers = len(counts.keys() - ledger.values.keys())
        if strangers:
            verdict.problems.append(f"{task}: {strangers} results of rows that nobody sent")
        if refused := len(counts.keys() & ledger.refused):
            verdict.problems.append(f"{task}: {refused} results of rows that were refused, and may be sent again")
    [(verdict.logs,)] = world.fleet.query("SELECT count(*) FROM logs WHERE device = ?", DEVICE)
    report, altered = _evidence(world)
    if altered:
        verdict.problems.append(f"{altered} runs are not over the rows that were sent")
    if not report.passed:
        undeclared_gaps = [gap for gap in report.gaps if not gap["declared"]]
        wrong = report.invalid[:3] or report.to_dict()["invalid_decisions"][:3]
        verdict.problems.append(f"the audit fails: gaps {undeclared_gaps[:3]}, invalid {wrong}")
        verdict.doubled = max(verdict.doubled, report.duplicates)
    for companion in world.companions:
        companion.judge(verdict)


def _seen(world: World) -> dict[str, Counter[int]]:
    """Return, per task, the number of results of each row by its time."""
    seen: dict[str, Counter[int]] = {task: Counter() for task in TASKS}
    for task, t, n in world.fleet.query("SELECT task, t, count(*) FROM results WHERE device = ? GROUP BY 1, 2", DEVICE):
        if task in seen:
            seen[task][t] = n
    return seen


def _undeclared(world: World, seen: dict[str, Counter[int]]) -> dict[str, int]:
    """Return, per task, the number of acknowledged rows with neither a result nor a signed declaration."""
    acknowledged = world.producer.ledger.acknowledged
    absent = {task: acknowledged - counts.keys() for task, counts in seen.items()}
    if not any(absent.values()):
        return dict.fromkeys(absent, 0)
    declarations, sent = _declarations(world), list(world.producer.ledger.values)
    return {task: declarations.undeclared(task, missing, sent) for task, missing in absent.items()}


def _doubled(world: World, task: str, counts: Counter[int]) -> int:
    """Return the number of surplus results."""
    if max(counts.values(), default=0) <= 1:
        return 0
    sql = "SELECT t, log, row, label, score, value FROM results WHERE device = ? AND task = ?"
    return _declarations(world).doubled(world.fleet.query(sql, DEVICE, task))


def _declarations(world: World) -> Declarations:
    declarations = world.fleet.query(
        "SELECT payload FROM messages WHERE device = ? AND kind IN ('audit', 'alerts', 'results')", DEVICE
    )
    return Declarations((payload for (payload,) in declarations), TASKS, forgetful=world.setting.forgetful)


def _evidence(world: World) -> tuple[AuditReport, int]:
    """Return the audit result, and the number of runs whose commitment does not match the sent rows."""
    with world.fleet.open_store() as store:
        report = audit(store, operators=fleet_config.load_trusted_keys(world.fleet.config))
    runs = world.fleet.query("SELECT payload FROM messages WHERE device = ? AND kind = 'results'", DEVICE)
    return report, sum(_altered(world, json.loads(payload)) for (payload,) in runs)


def _altered(world: World, body: dict[str, Any]) -> bool:
    first, last = body["rows"]
    times = msgspec.convert(body["columns"], ResultColumns).expand_times()
    if len(times) != last - first + 1 or not all(t in world.producer.ledger.values for t in times):
        return False
    values = np.array([world.producer.ledger.values[t] for t in times], np.float32)
    return commit_rows(world, body, np.array(times, np.int64), values) != str(body["input"])


def commit_rows(world: World, body: dict[str, Any], t: Ints, values: Float32s) -> str:
    """Compute the commitment of the device to rows of these values (n, fields)."""
    first, last = body["rows"]
    secret = secret_file.COMMITMENT_SECRET.load(world.device.data_dir)
    # Of a reissued message, the log in which it was first written.
    origin = body.get("reissued") or {}
    log = origin.get("first") or origin.get("log") or body["log"]
    key = commitment.derive_key(secret, log, body["task"], (first, last))
    rows = Rows(t, tuple(np.ascontiguousarray(column) for column in values.T))
    return commit([rows], key, [FieldConfig(name=name) for name in FIELDS], {})
