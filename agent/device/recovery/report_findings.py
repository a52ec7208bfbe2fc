"""What an opening found is said in the log, before anything else is written there or sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from agent.clock import Now
from agent.device.recovery import findings, new_log
from agent.device.recovery.findings import Finding
from agent.device.store import ranges
from agent.device.store.eviction import DAMAGED, declare_messages, declare_readings
from agent.device.store.message_log import Author
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.errors import StorageFull

log = logging.getLogger("outstation")

_SHOWN = 50
_TEXT = 1900


def settle(store: Store, author: Author, tasks: Mapping[str, Sequence[str]], now: Now) -> None:
    """Begin a new log where the old one cannot go on; then declare what is lost, all in one transaction.

    `tasks`: those of each stream. Raises StorageError; with no room it is tried again at the next opening.
    """
    new_log.relog(store, author, now)
    found = findings.read(store.meta(findings.FINDINGS, ""))
    if not found:
        return
    try:
        with store.transaction(vital=True) as tx:
            for finding in found:
                _declare(tx, author, finding, tasks, now)
            tx.set_meta(findings.FINDINGS, "")
    except StorageFull as full:
        log.error("%s; what the opening found is said when there is room", full)


def _declare(tx: Transaction, author: Author, finding: Finding, tasks: Mapping[str, Sequence[str]], now: Now) -> None:
    mine = finding.log == author.log_id
    if mine:
        declare_messages(tx, author, now, finding.seqs, DAMAGED)
    for stream, rows in finding.rows.items():
        # What a task has still to use it meets as a hole, and reports as a run without results.
        used = min((tx.cursor(task) for task in tasks.get(stream, ())), default=rows[-1][1])
        declare_readings(tx, author, now, stream, ranges.intersect(rows, [(1, used)]), DAMAGED, used=True)
    newest = {stream: tx.next_row(stream) - 1 for stream in tasks}
    body = {
        "alert": "storage",
        "subject": "store",
        "state": "raised",
        "severity": "critical",
        "id": f"storage/opened/{author.boot}/{tx.chain()[0] + 1}",
        "summary": f"{finding.what} {_lost(finding)} {_kept(newest)}"[:_TEXT],
        "evidence": _evidence(finding) | {"newest": newest},
    }
    log.critical("%s", body["summary"])
    author.write(tx, "alerts", None, body, now)


def _lost(finding: Finding) -> str:
    parts = [f"{ranges.size(finding.seqs)} messages"] if finding.seqs else []
    parts += [f"{ranges.size(rows)} readings of {stream}" for stream, rows in finding.rows.items()]
    parts += [f"results of {task} for {ranges.size(rows)} readings" for task, rows in finding.tasks.items()]
    if not parts:
        return "Nothing else is known to be missing."
    return f"Lost, unless they were delivered before: {', '.join(parts)}."


def _kept(newest: Mapping[str, int]) -> str:
    if not newest:
        return ""
    numbers = ", ".join(f"{row} of {stream}" for stream, row in newest.items())
    return f"The newest readings are {numbers}: what was acknowledged later the card had not kept."


def _evidence(finding: Finding) -> dict[str, Any]:
    return {
        "time": finding.time,
        "log": finding.log,
        "quarantine": finding.quarantine,
        "messages": finding.seqs[:_SHOWN],
        "rows": {stream: rows[:_SHOWN] for stream, rows in finding.rows.items()},
        "tasks": {task: rows[:_SHOWN] for task, rows in finding.tasks.items()},
    }
