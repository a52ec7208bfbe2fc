"""Saved drift state: what drift detection learned with the previous bundle, set aside while a canary runs.

The canary's own detection continues under the usual names, with the state that it inherits. A rollback therefore costs
the site neither its learned reference nor the rows counted since.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.device.batch_parts import drift_state
from outstation.device.batch_parts.drift_state import LearningRefusals, RestoredDrift
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store import task_keys
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import arrays, decoders
from outstation.foundation.clock import ClockReading
from outstation.ml.drift import succession
from outstation.ml.drift.baseline import deviation
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.state import DriftState
from outstation.protocol.alerts.alert import Alert, continue_number
from outstation.protocol.alerts.kinds import LEARNING_REFUSED, monitored_names, monitoring_kind

_STATE_NAMES = (
    task_keys.DRIFT_STATE,
    task_keys.LEARNING,
    task_keys.SITE_REFERENCE,
    task_keys.SHIPPED_REFERENCE,
    task_keys.REFERENCE_GUARD,
)
_REASON = "its bundle was rolled back"
_REPLACED = "its bundle was replaced by one without a drift reference"


def save(tx: Transaction, task: str) -> None:
    """Set the drift state of `task` aside, and a copy of its refusals to learn."""
    for name in _STATE_NAMES:
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)
        tx.rename_state(task, name, name + task_keys.SAVED_SUFFIX)
    _save_refusals(tx, task, _load_refusals(tx, task, ""), task_keys.SAVED_SUFFIX)


def restore(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Put the saved state back: the previous bundle runs again, with the alerts that were open before the canary.

    It continues the canary's alert numbers: no alert id is used twice.
    """
    canary, before = _load(tx, task, ""), _load(tx, task, task_keys.SAVED_SUFFIX)
    refusals, saved_refusals = _load_refusals(tx, task, ""), _load_refusals(tx, task, task_keys.SAVED_SUFFIX)
    for name in _STATE_NAMES:
        tx.delete_state(task, name)
        tx.rename_state(task, name + task_keys.SAVED_SUFFIX, name)
    tx.delete_state(task, task_keys.LEARNING_REFUSED_ALERT + task_keys.SAVED_SUFFIX)
    if canary is None:
        # It had no drift reference, and changed no alert.
        return
    count = continue_number(saved_refusals.count, refusals.count, is_open=saved_refusals.is_open)
    saved_refusals = replace(saved_refusals, count=count)
    _save_refusals(tx, task, saved_refusals, "")
    if before is not None:
        before = continue_alert_numbers(before, canary)
        _save(tx, task, before)
    closed, reopened = _list_open(canary, refusals), _list_open(before, saved_refusals)
    alerts = [_clear(alert, _REASON) for alert_id, alert in closed.items() if alert_id not in reopened]
    alerts += [alert for alert_id, alert in reopened.items() if alert_id not in closed]
    message_log.append_all(tx, [PendingMessage.from_alert(alert, task) for alert in alerts], now)


def discard(tx: Transaction, message_log: MessageLog, task: str, now: ClockReading) -> None:
    """Delete the saved state: the canary stays, with what it inherited or carried over.

    Without a drift reference it took nothing over, and drift detection ends.
    """
    if tx.load_state(task, task_keys.DRIFT_STATE) is None:
        _end(tx, message_log, task, task_keys.SAVED_SUFFIX, now)
    for name in (*_STATE_NAMES, task_keys.LEARNING_REFUSED_ALERT):
        tx.delete_state(task, name + task_keys.SAVED_SUFFIX)


def end_unreferenced(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> int:
    """End drift detection if a change of the config put a bundle without a drift reference in place of another one.

    Call it where no canary runs. Returns the number of alerts that this clears.
    """
    if task.drift is not None or store.load_state(task.name, task_keys.DRIFT_STATE) is None:
        return 0
    with store.transaction() as tx:
        cleared = _end(tx, message_log, task.name, "", now)
        for name in _STATE_NAMES:
            tx.delete_state(task.name, name)
    return cleared


def _end(tx: Transaction, message_log: MessageLog, task: str, suffix: str, now: ClockReading) -> int:
    """Clear every open alert of the drift state at `suffix`, which nobody tests any more. Return how many.

    What remains of it serves the next bundle with a reference: no alert id is used twice.
    """
    state, refusals = _load(tx, task, suffix), _load_refusals(tx, task, "")
    alerts = [_clear(alert, _REPLACED) for alert in _list_open(state, refusals).values()]
    _save_refusals(tx, task, replace(refusals, is_open=False), "")
    message_log.append_all(tx, [PendingMessage.from_alert(alert, task) for alert in alerts], now)
    if state is not None:
        tx.save_state(task, task_keys.ENDED_DRIFT, succession.end(state).to_bytes())
    return len(alerts)


def take_over(task: LoadedTask, store: Store) -> None:
    """Let the task take over the committed drift state: as a canary, or as the previous bundle after a rollback."""
    if task.drift is not None:
        monitor = task.drift.monitor
        task.drift.take_over(drift_state.restore(store, task.name, monitor.rebase(monitor.settings.own)))


def begin(tx: Transaction, message_log: MessageLog, task: str, restored: RestoredDrift, now: ClockReading) -> None:
    """Set the state of the previous bundle aside, and save what the canary takes over of it."""
    save(tx, task)
    drift_state.save(tx, task, restored.monitor, restored.state, None)
    drift_state.save_basis(tx, task, restored.basis or drift_state.encode_basis(restored.monitor))
    message_log.append_all(tx, restored.messages or [], now)


def continue_alert_numbers(before: DriftState, canary: DriftState) -> DriftState:
    """Return the state `before` a canary with alert numbers above the canary's."""
    numbers, subjects = before.raised_counts[:, 0], before.subjects
    canary_numbers = dict(zip(canary.subjects, canary.raised_counts[:, 0].tolist(), strict=True))
    used = np.array([canary_numbers.get(subject, 0) for subject in subjects])
    highest = max(int(state.raised_counts.max(initial=0)) for state in (before, canary))
    is_open = before.suite.open_subjects
    raised = np.full_like(before.raised_counts, highest)
    raised[:, 0] = np.where(is_open & (used <= numbers), numbers, highest + is_open)
    gates = {gate.name: gate.continue_numbers(before.gates[gate.name], canary.gates[gate.name]) for gate in GATES}
    guard = before.guard.continue_numbers(canary.guard)
    return replace(before, raised_counts=raised, gates=GateStates(gates), guard=guard)


def _list_open(state: DriftState | None, refusals: LearningRefusals) -> dict[str, Alert]:
    """Return every open alert by its id, as raised again after a rollback."""
    alerts: list[Alert] = []
    if refusals.is_open:
        summary = f"no site reference yet, so drift is not tested; open again: {_REASON}."
        alerts.append(LEARNING_REFUSED.raised(summary, count=refusals.count))
    if state is not None:
        subjects = [
            (monitoring_kind(item.alert, item.subject), item.subject, item.count)
            for item in succession.list_open_alerts(state)
        ]
        subjects += [
            (kind, kind.subject, number) for gate in GATES for kind, number in gate.list_open(state.gates[gate.name])
        ]
        alerts += [
            kind.raised(f"{subject}: open again: {_REASON}.", {}, **monitored_names(subject), count=number)
            for kind, subject, number in subjects
        ]
        deviates = deviation.build_alert(state.guard, state.guard, {})
        alerts += [] if deviates is None else [deviates]
    return {alert.id: alert for alert in alerts}


def _clear(alert: Alert, reason: str) -> Alert:
    summary = f"{alert.subject}: {reason}."
    return replace(alert, state="cleared", severity="info", summary=summary, evidence={})


# --- in the store ---


def _load(tx: Transaction, task: str, suffix: str) -> DriftState | None:
    """Return as much of the stored state as can be read; None if there is none."""
    state, site, guard = (
        tx.load_state(task, name + suffix)
        for name in (task_keys.DRIFT_STATE, task_keys.SITE_REFERENCE, task_keys.REFERENCE_GUARD)
    )
    for parts in ((site, guard), (None, guard), (None, None)):
        with suppress(ValueError):
            return None if state is None else DriftState.from_parts(state, *parts)
    return None


def _save(tx: Transaction, task: str, state: DriftState) -> None:
    tx.save_state(task, task_keys.REFERENCE_GUARD, arrays.to_compressed_bytes(state.guard))
    tx.save_state(task, task_keys.DRIFT_STATE, replace(state.without_guard(), site_reference=None).to_bytes())


def _load_refusals(tx: Transaction, task: str, suffix: str) -> LearningRefusals:
    stored = tx.load_state(task, task_keys.LEARNING_REFUSED_ALERT + suffix)
    return decoders.from_json(stored, LearningRefusals) if stored else LearningRefusals()


def _save_refusals(tx: Transaction, task: str, refusals: LearningRefusals, suffix: str) -> None:
    tx.save_state(task, task_keys.LEARNING_REFUSED_ALERT + suffix, msgspec.json.encode(refusals))
