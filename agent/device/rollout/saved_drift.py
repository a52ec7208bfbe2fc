"""Saved drift state: what drift detection learned with the previous bundle, set aside while a canary runs.

The canary's own detection starts empty under the usual names. A rollback therefore costs the site neither its learned
reference nor the rows counted since. Alerts that were open stay open until it is known which of the two bundles stays.
"""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from agent.clock import ClockReading
from agent.device.pipeline import drift_state
from agent.device.store import task_keys
from agent.device.store.message_log import MessageLog, PendingMessage
from agent.device.store.store import Store
from agent.device.store.transaction import Transaction
from agent.drift.monitor import DriftMonitor
from agent.drift.state import DriftState

_STATE_NAMES = (task_keys.DRIFT_STATE, task_keys.LEARNING, task_keys.SITE_REFERENCE)


def save(tx: Transaction, task: str) -> None:
    """Set the drift state of `task` aside."""
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
        tx.rename_state(task, name, name + task_keys.SAVED_SUFFIX)


def restore(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Put the saved state back and clear the canary's alerts: the previous bundle runs again."""
    closing = _build_closing_messages(tx, task, "", "its bundle was rolled back")
    for name in _STATE_NAMES:
        tx.delete_state(task, name)
        tx.rename_state(task, name + task_keys.SAVED_SUFFIX, name)
    message_log.append_all(tx, [message for message in closing if message.kind == "alerts"], now)


def discard(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Delete the saved state and clear its alerts: the canary stays, and has another reference."""
    closing = _build_closing_messages(tx, task, task_keys.SAVED_SUFFIX, "the bundle was changed")
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
    message_log.append_all(tx, closing, now)


def load(store: Store, task: str, monitor: DriftMonitor) -> tuple[DriftState, list[PendingMessage] | None]:
    """Load the saved state, for the previous bundle that runs as the canary's shadow."""
    saved = store.load_state(task, task_keys.DRIFT_STATE + task_keys.SAVED_SUFFIX)
    if saved is None:
        return monitor.start(), None
    try:
        return monitor.restore(
            saved,
            store.load_state(task, task_keys.LEARNING + task_keys.SAVED_SUFFIX),
            store.load_state(task, task_keys.SITE_REFERENCE + task_keys.SAVED_SUFFIX),
        ), None
    except ValueError:
        return monitor.start(), None


def continue_alert_numbers(state: DriftState, *others: DriftState | None) -> DriftState:
    """Return `state` with alert numbers above those of `others`: no alert id is used twice."""
    highest = max([0, *(int(other.raised_counts.max(initial=0)) for other in others if other is not None)])
    return replace(state, raised_counts=np.maximum(state.raised_counts, highest))


def _build_closing_messages(tx: Transaction, task: str, suffix: str, reason: str) -> list[PendingMessage]:
    state = tx.load_state(task, task_keys.DRIFT_STATE + suffix)
    if state is None:
        return []
    site = tx.load_state(task, task_keys.SITE_REFERENCE + suffix)
    return drift_state.build_closing_messages(task, state, site, reason)
