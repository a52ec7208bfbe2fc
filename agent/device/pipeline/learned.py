"""What is said of a site's reference when its drift windows are gathered: that it was learned, or why not."""

from __future__ import annotations

from typing import Any

from agent.alerts import LEARNING_REFUSED
from agent.clock import ClockReading
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.transaction import Transaction
from agent.drift.baseline.reference import Reference
from agent.drift.state import DriftWindowResult


def report_learning(
    task: str, message_log: MessageLog, tx: Transaction, verdict: DriftWindowResult, now: ClockReading
) -> None:
    """With the drift window that ended the gathering; nothing for any other."""
    if verdict.learned_reference is not None:
        _report_learned(task, message_log, tx, verdict.learned_reference, verdict.rows[1], now)
    if verdict.learning_error is not None:
        body = {"event": "not learned", "summary": f"{task}: {verdict.learning_error}", "evidence": {"task": task}}
        message_log.append(tx, "audit", None, body, now)
        _report_refused(task, message_log, tx, verdict.learning_error, now)


def _report_learned(
    task: str, message_log: MessageLog, tx: Transaction, reference: Reference, last_row: int, now: ClockReading
) -> None:
    summary = f"{task}: learned this site's reference from {reference.drift_windows} drift windows."
    evidence: dict[str, Any] = {"task": task, "site": reference.digest, "through": last_row}
    if reference.site is not None:
        evidence |= reference.site.to_dict()
    if reference.warning is not None:
        summary += f" Warning: {reference.warning}."
        evidence["warning"] = reference.warning
    message_log.append(tx, "audit", None, {"event": "learned", "summary": summary, "evidence": evidence}, now)
    if (number := tx.load_state(task, task_keys.LEARNING_REFUSED_ALERT)) is not None:
        text = f"{task}: this site's reference is learned, and drift is told against it."
        alert = LEARNING_REFUSED.cleared(text, count=number.decode())
        message_log.append(tx, "alerts", task, alert.to_body(task), now)
        tx.delete_state(task, task_keys.LEARNING_REFUSED_ALERT)


def _report_refused(task: str, message_log: MessageLog, tx: Transaction, reason: str, now: ClockReading) -> None:
    number = tx.load_state(task, task_keys.LEARNING_REFUSED_ALERT)
    if number is None:
        tx.increment_counter(f"learning refused.{task}", 1)
        number = str(tx.counter(f"learning refused.{task}")).encode()
        tx.save_state(task, task_keys.LEARNING_REFUSED_ALERT, number)
    text = f"{task}: no reference of this site yet, so that drift is not told: {reason}."
    alert = LEARNING_REFUSED.raised(text, count=number.decode())
    message_log.append(tx, "alerts", task, alert.to_body(task), now)
