"""What an opening found is said in the log, before anything else is written there or sent."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.alerts import STORE_DAMAGED
from agent.clock import ClockReading
from agent.device.recovery import findings, new_log, salvage
from agent.device.recovery.findings import RecoveryFinding
from agent.device.store import ranges
from agent.device.store.eviction import DAMAGED, declare_messages, declare_readings
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull

log = logging.getLogger("outstation")

_MAX_LISTED = 50
_MAX_SUMMARY = 1900


def report_findings(
    store: Store, message_log: MessageLog, tasks: Mapping[str, Sequence[str]], now: ClockReading
) -> None:
    """Begin a new log where the old one cannot go on; then declare what is lost, all in one transaction.

    `tasks`: those of each stream. Raises StorageError; with no room it is tried again at the next opening.
    """
    new_log.start_new_log(store, message_log, now)
    found = findings.decode(store.get_meta(findings.FINDINGS, ""))
    if not found:
        return
    try:
        with store.transaction(vital=True) as tx:
            for finding in found:
                _report_finding(tx, message_log, finding, tasks, now)
            tx.set_meta(findings.FINDINGS, "")
    except StorageFull as full:
        log.error("%s; what the opening found is said when there is room", full)


def _report_finding(
    tx: Transaction,
    message_log: MessageLog,
    finding: RecoveryFinding,
    tasks: Mapping[str, Sequence[str]],
    now: ClockReading,
) -> None:
    mine = finding.log == message_log.log_id
    if mine:
        declare_messages(tx, message_log, now, finding.seqs, DAMAGED)
    for stream, rows in finding.rows.items():
        # What a task has still to use it meets as a hole, and reports as a run without results.
        used = min((tx.cursor(task) for task in tasks.get(stream, ())), default=rows[-1][1])
        declare_readings(tx, message_log, now, stream, ranges.intersect(rows, [(1, used)]), DAMAGED, used=True)
    newest = {stream: tx.next_row(stream) - 1 for stream in tasks}
    summary = f"{finding.summary} {_lost_text(finding)} {_newest_text(newest)}"[:_MAX_SUMMARY]
    evidence = _evidence(finding) | {"newest": newest}
    alert = STORE_DAMAGED.raised(summary, evidence, boot=message_log.boot, seq=tx.log_head()[0] + 1)
    log.critical("%s", summary)
    message_log.append(tx, "alerts", None, alert.to_body(), now)


def _lost_text(finding: RecoveryFinding) -> str:
    parts = [f"{ranges.count(finding.seqs)} messages"] if finding.seqs else []
    parts += [f"{ranges.count(rows)} readings of {stream}" for stream, rows in finding.rows.items()]
    parts += [f"results of {task} for {ranges.count(rows)} readings" for task, rows in finding.tasks.items()]
    if not parts:
        return "Nothing else is known to be missing."
    return f"Lost, unless they were delivered before: {', '.join(parts)}."


def _newest_text(newest: Mapping[str, int]) -> str:
    if not newest:
        return ""
    numbers = ", ".join(f"{row} of {stream}" for stream, row in newest.items())
    return f"The newest readings are {numbers}: what was acknowledged later the card had not kept."


def _evidence(finding: RecoveryFinding) -> dict[str, Any]:
    return {
        "time": finding.time,
        "log": finding.log,
        "quarantine": finding.quarantine,
        "messages": finding.seqs[:_MAX_LISTED],
        "rows": {stream: rows[:_MAX_LISTED] for stream, rows in finding.rows.items()},
        "tasks": {task: rows[:_MAX_LISTED] for task, rows in finding.tasks.items()},
    }


class StoreCondition(msgspec.Struct, frozen=True):
    """`stop`: how the last process that wrote here ended, `clean` or `unclean`.

    `last`: {"time", "what", "quarantine"} of the last finding.
    """

    last_stop: str
    last_finding: dict[str, Any] | None
    quarantine: Path | None
    quarantine_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        quarantine = {"folder": str(self.quarantine), "bytes": self.quarantine_bytes} if self.quarantine else None
        return {"stop": self.last_stop, "last": self.last_finding, "quarantine": quarantine}

    def __str__(self) -> str:
        parts = [f"last stop {self.last_stop}" if self.last_stop else "never stopped yet"]
        if self.last_finding:
            parts.append(f"{self.last_finding['time']}: {self.last_finding['what']}")
        if self.quarantine:
            parts.append(f"{self.quarantine} holds {self.quarantine_bytes / 2**20:.1f} MiB; delete it when looked at")
        return "; ".join(parts)


def inspect_condition(store: Store) -> StoreCondition:
    """Of `store`, whoever has it open to write."""
    folder = store.path.parent
    if store.get_meta(findings.CLEAN_STOP, ""):
        stop = "clean"
    else:
        stop = store.get_meta(findings.LAST_STOP, "") if _is_lock_held(folder / "lock") else "unclean"
    last = store.get_meta(findings.LAST_FINDING, "")
    place = folder / salvage.QUARANTINE
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    return StoreCondition(stop, json.loads(last) if last else None, place if sizes else None, sum(sizes))


def _is_lock_held(lock: Path) -> bool:
    """Whether a process holds the lock; without touching it, so that nobody who wants it is turned away."""
    try:
        inode = lock.stat().st_ino
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    except OSError:
        return False
