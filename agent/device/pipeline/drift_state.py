"""A task's drift state in the store: how it is kept, found again, and what of an earlier bundle's is put right.

What is gathered while learning, and the site's reference, are kept apart: they are large, and seldom others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.alerts import MonitoredAlert, monitoring_kind
from agent.arrays import Bools
from agent.clock import ClockReading
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.baseline.learning import LearningState
from agent.drift.monitor import DriftMonitor
from agent.drift.state import DriftState
from agent.drift.testing.test_suite import JOINT, OUTPUT, SCORE


class ClosingMessages(msgspec.Struct, frozen=True):
    """`messages` (kind, body) that say what is no more."""

    messages: list[tuple[str, dict[str, Any]]]


def save(tx: Transaction, task: str, monitor: DriftMonitor, state: DriftState, previous: DriftState | None) -> None:
    """`before` is what was kept last, if anything was."""
    tx.save_state(task, task_keys.DRIFT_STATE, monitor.to_bytes(state))
    if previous is None or previous.learning is not state.learning:
        tx.save_state(task, task_keys.LEARNING, state.learning.to_bytes())
    if previous is not None and previous.site_reference is state.site_reference:
        return
    if state.site_reference is None:
        tx.delete_state(task, task_keys.SITE_REFERENCE)
    else:
        tx.save_state(task, task_keys.SITE_REFERENCE, state.site_reference.to_json())


def restore(store: Store, task: str, monitor: DriftMonitor) -> tuple[DriftState, ClosingMessages | None]:
    """What is remembered of the task; and what another bundle had begun, to end with the next state that is kept."""
    past = store.load_state(task, task_keys.DRIFT_STATE)
    if past is None:
        return monitor.start(), None
    try:
        return monitor.restore(
            past, store.load_state(task, task_keys.LEARNING), store.load_state(task, task_keys.SITE_REFERENCE)
        ), None
    except ValueError:
        return _restart(task, monitor.start(), past, store.load_state(task, task_keys.SITE_REFERENCE))


def load_for_display(store: Store, task: str) -> DriftState | None:
    """The same for people, whatever bundle it is of; None where there is nothing to read."""
    past, learning = store.load_state(task, task_keys.DRIFT_STATE), store.load_state(task, task_keys.LEARNING)
    try:
        state = None if past is None else DriftState.from_parts(past, store.load_state(task, task_keys.SITE_REFERENCE))
        return state and (state if learning is None else replace(state, learning=LearningState.from_bytes(learning)))
    except ValueError:
        return None


def discard_learned(
    tx: Transaction, message_log: MessageLog, task: str, closing: ClosingMessages, now: ClockReading
) -> None:
    tx.delete_state(task, task_keys.LEARNING)
    tx.delete_state(task, task_keys.SITE_REFERENCE)
    write_closing_messages(tx, message_log, task, closing, now)


def write_closing_messages(
    tx: Transaction, message_log: MessageLog, task: str, closing: ClosingMessages, now: ClockReading
) -> None:
    for kind, body in closing.messages:
        message_log.append(tx, kind, task if kind == "alerts" else None, body, now)


def build_closing_messages(task: str, saved_state: bytes, site: bytes | None, reason: str) -> ClosingMessages:
    """What is to be said when nothing that this state knows holds any more, because of `why`."""
    try:
        old = DriftState.from_parts(saved_state, site)
    except ValueError:
        return ClosingMessages([])
    messages: list[tuple[str, dict[str, Any]]] = [("alerts", body) for body in _build_cleared_alerts(task, old, reason)]
    if old.site_reference is not None:
        summary = f"{task}: {reason}, so this site's reference is learned anew."
        evidence = {"task": task, "asked": "bundle changed", "site": old.site_reference.digest, "by": "the agent"}
        messages.append(("audit", {"event": "reference reset", "summary": summary, "evidence": evidence}))
    return ClosingMessages(messages)


def _restart(
    task: str, start: DriftState, saved_state: bytes, site: bytes | None
) -> tuple[DriftState, ClosingMessages]:
    """Nothing that was learned for another bundle holds for this one."""
    said = build_closing_messages(task, saved_state, site, "the bundle, or the agent, was changed")
    try:
        old = DriftState.from_bytes(saved_state)
    except ValueError:
        return start, said
    # Names of alerts are never used twice.
    raised = np.full_like(start.raised_counts, old.raised_counts.max(initial=0))
    return replace(start, raised_counts=raised, learned_count=old.learned_count), said


def _build_cleared_alerts(task: str, old: DriftState, reason: str) -> Iterator[dict[str, Any]]:
    """Cleared: what they were against is gone."""
    subjects = (*old.fields, OUTPUT, SCORE, JOINT)
    opened: dict[MonitoredAlert, Bools] = {"drift": old.suite.open_subjects, "fault": old.faulty}
    for column, (alert, is_open) in enumerate(opened.items()):
        for i in np.flatnonzero(is_open).tolist():
            summary = f"{subjects[i]}: no longer watched as before: {reason}."
            names = {"field": subjects[i], "count": old.raised_counts[i, column]}
            yield monitoring_kind(alert, subjects[i]).cleared(summary, **names).to_body(task)
