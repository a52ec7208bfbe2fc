"""Saved drift state: what drift detection learned with the previous bundle, set aside while a canary runs.

The canary's own detection goes on under the usual names, with what it inherits. A rollback therefore costs the site
neither its learned reference nor the rows counted since.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from agent.clock import ClockReading
from agent.device.pipeline import drift_state
from agent.device.pipeline.drift_state import RestoredDrift
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog, PendingMessage
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift import succession
from agent.drift.state import CarriedAlert, DriftState

_STATE_NAMES = (
    task_keys.DRIFT_STATE,
    task_keys.LEARNING,
    task_keys.SITE_REFERENCE,
    task_keys.SHIPPED_REFERENCE,
    task_keys.REFERENCE_GUARD,
)


def save(tx: Transaction, task: str) -> None:
    """Set the drift state of `task` aside."""
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
        tx.rename_state(task, name, name + task_keys.SAVED_SUFFIX)


def restore(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Put the saved state back: the previous bundle runs again, with the alerts that were open before the canary."""
    canary, before = _load_open_alerts(tx, task, ""), _load_open_alerts(tx, task, task_keys.SAVED_SUFFIX)
    for name in _STATE_NAMES:
        tx.delete_state(task, name)
        tx.rename_state(task, name + task_keys.SAVED_SUFFIX, name)
    reason = "its bundle was rolled back"
    alerts = succession.clear_carried([item for item in canary if item not in before], reason)
    alerts += [succession.build_reopened_alert(item, reason) for item in before if item not in canary]
    message_log.append_all(tx, [PendingMessage.from_alert(alert, task) for alert in alerts], now)


def discard(tx: Transaction, task: str) -> None:
    """Delete the saved state: the canary stays, with what it inherited or carried over."""
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)


def take_over(candidate: LoadedTask, store: Store) -> None:
    """Let the candidate take over the committed drift state of the bundle that runs now."""
    if candidate.drift_monitor is None:
        return
    restored = drift_state.restore(store, candidate.name, candidate.drift_monitor.rebase(candidate.drift_monitor.own))
    candidate.drift_monitor, candidate.drift_state = restored.monitor, restored.state
    candidate.closing_messages, candidate.unsaved_basis = restored.messages, restored.basis


def begin(tx: Transaction, message_log: MessageLog, task: str, restored: RestoredDrift, now: ClockReading) -> None:
    """Set the state of the previous bundle aside, and save what the canary takes over of it."""
    save(tx, task)
    drift_state.save(tx, task, restored.monitor, restored.state, None)
    drift_state.save_basis(tx, task, restored.basis or drift_state.encode_basis(restored.monitor))
    message_log.append_all(tx, restored.messages or [], now)


def continue_alert_numbers(state: DriftState, *others: DriftState | None) -> DriftState:
    """Return `state` with alert numbers above those of `others`: no alert id is used twice."""
    highest = max([0, *(int(other.raised_counts.max(initial=0)) for other in others if other is not None)])
    return replace(state, raised_counts=np.maximum(state.raised_counts, highest))


def _load_open_alerts(tx: Transaction, task: str, suffix: str) -> list[CarriedAlert]:
    state = tx.load_state(task, task_keys.DRIFT_STATE + suffix)
    if state is None:
        return []
    try:
        return succession.list_open_alerts(DriftState.from_bytes(state))
    except ValueError:
        return []
