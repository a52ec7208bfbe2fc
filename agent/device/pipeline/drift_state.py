"""Drift state persistence: a task's drift state in the store, and the messages when it is learned or discarded.

The state of learning and the site reference are stored apart from the rest: they are large and change seldom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.alerts import LEARNING_REFUSED, Alert, MonitoredAlert, monitoring_kind
from agent.device.store import task_keys
from agent.device.store.message_log import PendingMessage
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.baseline.learning import LearningState
from agent.drift.baseline.reference import Reference
from agent.drift.detectors.detector import JOINT, OUTPUT, SCORE
from agent.drift.monitor import DriftMonitor
from agent.drift.state import DriftState, DriftWindowResult


class LearningRefusals(msgspec.Struct, frozen=True):
    """Number of alerts that learning was refused so far, and whether the last one is open."""

    count: int = 0
    is_open: bool = False


def save(tx: Transaction, task: str, monitor: DriftMonitor, state: DriftState, previous: DriftState | None) -> None:
    """Save `state`; only the parts that differ from the stored `previous` state, if there is one."""
    tx.save_state(task, task_keys.DRIFT_STATE, monitor.to_bytes(state))
    if previous is None or previous.learning is not state.learning:
        tx.save_state(task, task_keys.LEARNING, state.learning.to_bytes())
    if previous is not None and previous.site_reference is state.site_reference:
        return
    if state.site_reference is None:
        tx.delete_state(task, task_keys.SITE_REFERENCE)
    else:
        tx.save_state(task, task_keys.SITE_REFERENCE, state.site_reference.to_json())


def restore(store: Store, task: str, monitor: DriftMonitor) -> tuple[DriftState, list[PendingMessage] | None]:
    """Return the stored state, or a new one if the stored state is of another bundle.

    In the second case also return the closing messages, to be committed with the next state; otherwise None.
    """
    past = store.load_state(task, task_keys.DRIFT_STATE)
    if past is None:
        return monitor.start(), None
    site = store.load_state(task, task_keys.SITE_REFERENCE)
    try:
        return monitor.restore(past, store.load_state(task, task_keys.LEARNING), site), None
    except ValueError:
        return _restart(task, monitor.start(), past, site)


def load_for_display(store: Store, task: str) -> DriftState | None:
    """Return the stored state, of whatever bundle it is; None if there is none, or if it cannot be read."""
    past, learning = store.load_state(task, task_keys.DRIFT_STATE), store.load_state(task, task_keys.LEARNING)
    try:
        state = None if past is None else DriftState.from_parts(past, store.load_state(task, task_keys.SITE_REFERENCE))
        return state and (state if learning is None else replace(state, learning=LearningState.from_bytes(learning)))
    except ValueError:
        return None


def discard_learned(tx: Transaction, task: str) -> None:
    """Delete what was learned with another bundle."""
    tx.delete_state(task, task_keys.LEARNING)
    tx.delete_state(task, task_keys.SITE_REFERENCE)


def build_closing_messages(task: str, saved_state: bytes, site: bytes | None, reason: str) -> list[PendingMessage]:
    """Return the messages that end everything this state holds: open alerts are cleared, the reference is dropped."""
    try:
        old = DriftState.from_parts(saved_state, site)
    except ValueError:
        return []
    messages = [PendingMessage.from_alert(alert, task) for alert in _clear_alerts(old, reason)]
    if old.site_reference is not None:
        summary = f"{task}: {reason}, so the site reference is learned again."
        evidence = {"task": task, "asked": "bundle changed", "site": old.site_reference.digest, "by": "the agent"}
        messages.append(PendingMessage.audit("reference reset", summary, evidence))
    return messages


def _restart(
    task: str, start: DriftState, saved_state: bytes, site: bytes | None
) -> tuple[DriftState, list[PendingMessage]]:
    messages = build_closing_messages(task, saved_state, site, "the bundle, or the agent, was changed")
    try:
        old = DriftState.from_bytes(saved_state)
    except ValueError:
        return start, messages
    # Ids of alerts are never used twice.
    raised = np.full_like(start.raised_counts, old.raised_counts.max(initial=0))
    return replace(start, raised_counts=raised, learned_count=old.learned_count), messages


def _clear_alerts(old: DriftState, reason: str) -> Iterator[Alert]:
    subjects = (*old.fields, OUTPUT, SCORE, JOINT)
    numbers: dict[MonitoredAlert, list[tuple[int, int]]] = {
        "drift": [(i, int(old.raised_counts[i, 0])) for i in np.flatnonzero(old.suite.open_subjects).tolist()],
        "fault": [(i, int(old.faults.number[i, kind])) for i, kind in np.argwhere(old.faults.number > 0).tolist()],
    }
    for alert, opened in numbers.items():
        for i, number in opened:
            summary = f"{subjects[i]}: no longer monitored as before: {reason}."
            yield monitoring_kind(alert, subjects[i]).cleared(summary, field=subjects[i], count=number)


# --- learning ---


def load_refusals(store: Store, task: str) -> LearningRefusals:
    stored = store.load_state(task, task_keys.LEARNING_REFUSED_ALERT)
    return msgspec.json.decode(stored, type=LearningRefusals) if stored else LearningRefusals()


def save_refusals(tx: Transaction, task: str, refusals: LearningRefusals) -> None:
    tx.save_state(task, task_keys.LEARNING_REFUSED_ALERT, msgspec.json.encode(refusals))


def build_learning_messages(
    task: str, result: DriftWindowResult, refusals: LearningRefusals
) -> tuple[list[PendingMessage], LearningRefusals]:
    """Return the messages of a drift window that ended the learning of a site reference, and the refusals after it."""
    messages: list[PendingMessage] = []
    if result.learned_reference is not None:
        messages.append(_learned_message(task, result.learned_reference, result.rows[1]))
        if refusals.is_open:
            summary = f"{task}: the site reference is learned, and drift is tested against it."
            messages.append(PendingMessage.from_alert(LEARNING_REFUSED.cleared(summary, count=refusals.count), task))
            refusals = LearningRefusals(refusals.count)
    if result.learning_error is not None:
        messages.append(PendingMessage.audit("not learned", f"{task}: {result.learning_error}", {"task": task}))
        refusals = LearningRefusals(refusals.count + (not refusals.is_open), is_open=True)
        summary = f"{task}: no site reference yet, so drift is not tested: {result.learning_error}."
        messages.append(PendingMessage.from_alert(LEARNING_REFUSED.raised(summary, count=refusals.count), task))
    return messages, refusals


def _learned_message(task: str, reference: Reference, last_row: int) -> PendingMessage:
    summary = f"{task}: learned the site reference from {reference.drift_windows} drift windows."
    evidence: dict[str, Any] = {"task": task, "site": reference.digest, "through": last_row}
    if reference.site is not None:
        evidence |= reference.site.to_dict() | {"smallest_changes": reference.describe_smallest_changes()}
    if reference.warning is not None:
        summary += f" Warning: {reference.warning}."
        evidence["warning"] = reference.warning
    return PendingMessage.audit("learned", summary, evidence)
