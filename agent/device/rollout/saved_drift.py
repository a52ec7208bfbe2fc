"""What drift detection knows with the bundle that ran, laid by while another one is on probation, and taken up again.

While the other one runs, its own detection begins from nothing under the usual names. So a bundle that is taken back
costs the site neither the reference it learned nor what was gathered since; alerts that were open stay so until it is
known which of the two stays.
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
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
        tx.rename_state(task, name, name + task_keys.SAVED_SUFFIX)


def restore(tx: Transaction, author: MessageLog, task: str, now: ClockReading) -> None:
    """The bundle before runs again: what was found with the other one is over."""
    ended = _end_alerts(tx, task, "", "its bundle was taken back")
    for name in _STATE_NAMES:
        tx.delete_state(task, name)
        tx.rename_state(task, name + task_keys.SAVED_SUFFIX, name)
    author.append_all(tx, [message for message in ended if message.kind == "alerts"], now)


def discard(tx: Transaction, author: MessageLog, task: str, now: ClockReading) -> None:
    """The other one stays: nothing that was learned with the one before holds for it."""
    ended = _end_alerts(tx, task, task_keys.SAVED_SUFFIX, "the bundle was changed")
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
    author.append_all(tx, ended, now)


def load(store: Store, task: str, monitor: DriftMonitor) -> tuple[DriftState, list[PendingMessage] | None]:
    """What the bundle before, now beside the other one, remembers."""
    past = store.load_state(task, task_keys.DRIFT_STATE + task_keys.SAVED_SUFFIX)
    if past is None:
        return monitor.start(), None
    try:
        return monitor.restore(
            past,
            store.load_state(task, task_keys.LEARNING + task_keys.SAVED_SUFFIX),
            store.load_state(task, task_keys.SITE_REFERENCE + task_keys.SAVED_SUFFIX),
        ), None
    except ValueError:
        return monitor.start(), None


def continue_alert_numbers(state: DriftState, *others: DriftState | None) -> DriftState:
    """With alerts named after those of `others`: no name is used twice."""
    most = max([0, *(int(one.raised_counts.max(initial=0)) for one in others if one is not None)])
    return replace(state, raised_counts=np.maximum(state.raised_counts, most))


def _end_alerts(tx: Transaction, task: str, suffix: str, reason: str) -> list[PendingMessage]:
    state = tx.load_state(task, task_keys.DRIFT_STATE + suffix)
    if state is None:
        return []
    site = tx.load_state(task, task_keys.SITE_REFERENCE + suffix)
    return drift_state.build_closing_messages(task, state, site, reason)
