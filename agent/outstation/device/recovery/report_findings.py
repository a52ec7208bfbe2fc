"""Report of recovery findings: in the log, before anything else is written or sent, and on the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from outstation.device.recovery import findings, new_log, salvage
from outstation.device.recovery.findings import RecoveryFinding
from outstation.device.store.message_log import MessageLog
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import ranges
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.foundation.ranges import Ranges
from outstation.protocol.alerts.kinds import STORE_DAMAGED

log = logging.getLogger("outstation")

_MAX_LISTED = 50
_MAX_SUMMARY = 1900


def report_findings(
    store: Store, message_log: MessageLog, tasks: Mapping[str, Sequence[str]], now: ClockReading
) -> None:
    """Begin a new log if one is planned, then declare all losses in one transaction.

    `tasks`: those of each stream. Raises StorageError. A full store delays the report to the next opening.
    """
    new_log.start_new_log(store, message_log, now)
    pending = findings.decode(store.get_meta(findings.FINDINGS, ""))
    if not pending:
        return
    from outstation.device.capacity.eviction import DAMAGED, declare_messages

    try:
        with store.transaction(vital=True) as tx:
            for finding in pending:
                if finding.log == message_log.log_id:
                    declare_messages(tx, message_log, now, finding.seqs, DAMAGED)
                for stream, rows in finding.rows.items():
                    _declare_lost_rows(store, tx, message_log, now, stream, rows, tasks.get(stream, ()))
                newest = {stream: tx.next_row(stream) - 1 for stream in tasks}
                summary = f"{finding.summary} {_lost_text(finding)} {_newest_text(newest)}"[:_MAX_SUMMARY]
                evidence = _evidence(finding) | {"newest": newest}
                alert = STORE_DAMAGED.raised(summary, evidence, boot=message_log.boot, seq=tx.log_head()[0] + 1)
                log.critical("%s", summary)
                message_log.append(tx, "alerts", None, alert.to_body(), now)
            tx.set_meta(findings.FINDINGS, "")
    except StorageFull as full:
        log.error("%s; findings of the opening are reported when there is room", full)


def _declare_lost_rows(
    store: Store,
    tx: Transaction,
    message_log: MessageLog,
    now: ClockReading,
    stream: str,
    rows: Ranges,
    tasks: Sequence[str],
) -> None:
    """Declare lost rows of a stream that none of its tasks meets as a gap, which a run without results reports."""
    from outstation.device.capacity.eviction import DAMAGED, declare_readings

    used = min((tx.cursor(task) for task in tasks), default=rows[-1][1])
    declare_readings(tx, message_log, now, stream, ranges.intersect(rows, [(1, used)]), DAMAGED, used=True)
    # A task without a batch yet begins at the first stored row.
    if new_tasks := [task for task in tasks if not tx.cursor(task)]:
        skipped = ranges.intersect(rows, [(1, store.first_row(stream) - 1)])
        declare_readings(tx, message_log, now, stream, skipped, DAMAGED, used=False, tasks=new_tasks)


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
    return f"The newest readings are {numbers}: later ones were acknowledged, but the card did not keep them."


def _evidence(finding: RecoveryFinding) -> dict[str, Any]:
    return {
        "time": finding.time,
        "log": finding.log,
        "quarantine": finding.quarantine,
        "messages": finding.seqs[:_MAX_LISTED],
        "rows": {stream: rows[:_MAX_LISTED] for stream, rows in finding.rows.items()},
        "tasks": {task: rows[:_MAX_LISTED] for task, rows in finding.tasks.items()},
    }


# --- on the command line ---


class StoreCondition(msgspec.Struct, frozen=True):
    """Condition of a store for people.

    `last_stop`: how the last writing process ended, `clean` or `unclean`; `last_finding`: {"time", "summary",
    "quarantine"}; `quarantine`: the folder with damaged files.
    """

    last_stop: str
    last_finding: dict[str, Any] | None
    quarantine: Path | None
    quarantine_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        quarantine = {"folder": str(self.quarantine), "bytes": self.quarantine_bytes} if self.quarantine else None
        return {"last_stop": self.last_stop, "last_finding": self.last_finding, "quarantine": quarantine}

    def __str__(self) -> str:
        parts = [f"last stop {self.last_stop}" if self.last_stop else "never stopped yet"]
        if self.last_finding:
            parts.append(f"{self.last_finding['time']}: {self.last_finding['summary']}")
        if self.quarantine:
            mib = self.quarantine_bytes / 2**20
            parts.append(f"{self.quarantine} holds {mib:.1f} MiB of damaged files; delete it after inspection")
        return "; ".join(parts)


def inspect_condition(store: Store) -> StoreCondition:
    """Return the condition of `store`, whichever process has it open to write."""
    folder = store.path.parent
    if store.get_meta(findings.CLEAN_STOP, ""):
        stop = "clean"
    else:
        stop = store.get_meta(findings.LAST_STOP, "") if _is_lock_held(folder / "lock") else "unclean"
    last = store.get_meta(findings.LAST_FINDING, "")
    quarantine = folder / salvage.QUARANTINE
    sizes = [path.stat().st_size for path in quarantine.rglob("*") if path.is_file()]
    return StoreCondition(stop, json.loads(last) if last else None, quarantine if sizes else None, sum(sizes))


def _is_lock_held(lock: Path) -> bool:
    """Return True if a process holds the lock. Does not try it, so that nobody who needs it is refused."""
    try:
        inode = lock.stat().st_ino
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text(encoding="ascii").splitlines())
    except OSError:
        return False
