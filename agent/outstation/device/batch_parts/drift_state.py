"""Drift state persistence: a task's drift state in the store, and the messages when it is learned or discarded.

The state of learning and the site reference are stored apart from the rest: they are large and change seldom.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.device.store import task_keys
from outstation.device.store.message_log import PendingMessage
from outstation.device.store.store import Store
from outstation.device.store.transaction import Transaction
from outstation.foundation import arrays, decoders
from outstation.foundation.errors import BadBundle
from outstation.ml.drift import succession
from outstation.ml.drift.baseline.learning_state import LearningState
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.monitor import DriftMonitor
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import LEARNING_REFUSED


class LearningRefusals(msgspec.Struct, frozen=True):
    """Number of alerts that learning was refused so far, and whether the last one is open."""

    count: int = 0
    is_open: bool = False


class StoredBasis(msgspec.Struct, frozen=True):
    """Shipped reference that the drift state is made for, as JSON; `own` is the digest of the bundle's own one."""

    own: str
    reference: bytes


class RestoredDrift(msgspec.Struct, frozen=True):
    """Drift state as restored. `messages` and `basis` are to be committed with it; None if nothing changed."""

    monitor: DriftMonitor
    state: DriftState
    messages: list[PendingMessage] | None = None
    basis: bytes | None = None


def save(tx: Transaction, task: str, monitor: DriftMonitor, state: DriftState, previous: DriftState | None) -> None:
    """Save `state`; only the parts that differ from the stored `previous` state, if there is one."""
    tx.save_state(task, task_keys.DRIFT_STATE, monitor.to_bytes(state))
    if previous is None or previous.learning is not state.learning:
        tx.save_state(task, task_keys.LEARNING, state.learning.to_bytes())
    if previous is None or previous.guard is not state.guard:
        tx.save_state(task, task_keys.REFERENCE_GUARD, arrays.to_compressed_bytes(state.guard))
    if previous is not None and previous.site_reference is state.site_reference:
        return
    if state.site_reference is None:
        tx.delete_state(task, task_keys.SITE_REFERENCE)
    else:
        tx.save_state(task, task_keys.SITE_REFERENCE, state.site_reference.to_json())


def save_basis(tx: Transaction, task: str, basis: bytes) -> None:
    tx.save_state(task, task_keys.SHIPPED_REFERENCE, basis)


def restore(store: Store, task: str, monitor: DriftMonitor, suffix: str = "") -> RestoredDrift:
    """Return the stored state; if it is of another bundle, what this one inherits or carries over.

    `suffix` of the keys is that of a state that was set aside.
    """
    basis = _load_basis(store, task, suffix)
    if basis is not None and basis.own == monitor.settings.own.digest:
        monitor = monitor.rebase(Reference.from_json(basis.reference))
    past = store.load_state(task, task_keys.DRIFT_STATE + suffix)
    unsaved = None if basis is not None and basis.own == monitor.settings.own.digest else encode_basis(monitor)
    if past is None:
        ended = _load_ended(store, task)
        if ended is not None:
            return RestoredDrift(monitor, succession.carry_over(monitor.start(), ended)[0], [], encode_basis(monitor))
        return RestoredDrift(monitor, monitor.start(), None, unsaved)
    learning, site, guard = (
        store.load_state(task, key + suffix)
        for key in (task_keys.LEARNING, task_keys.SITE_REFERENCE, task_keys.REFERENCE_GUARD)
    )
    try:
        state = monitor.restore(past, learning, site, guard)
        return RestoredDrift(monitor, state, None, unsaved)
    except ValueError:
        pass
    old, is_whole = _decode_old(past, site, guard)
    if old is None:
        return _begin_anew(store, task, monitor.rebase(monitor.settings.own))
    inherited = Reference.from_json(basis.reference) if basis is not None and is_whole else None
    return _succeed(task, monitor, old, inherited, is_whole=is_whole)


def _load_ended(store: Store, task: str) -> DriftState | None:
    """Return what the last bundle with a reference left behind; None if there is none, or if it cannot be read."""
    stored = store.load_state(task, task_keys.ENDED_DRIFT)
    try:
        return None if stored is None else DriftState.from_bytes(stored)
    except ValueError:
        return None


def _decode_old(past: bytes, site: bytes | None, guard: bytes | None) -> tuple[DriftState | None, bool]:
    """Return as much of the state as can be read, and whether that is all."""
    for parts in ((site, guard), (None, guard), (None, None)):
        try:
            return DriftState.from_parts(past, *parts), parts == (site, guard)
        except ValueError:
            continue
    return None, False


def _begin_anew(store: Store, task: str, monitor: DriftMonitor) -> RestoredDrift:
    """Drop a state that cannot be read, such as one of another version: its open alerts end."""
    cause = "the stored drift state is damaged, or another version wrote it"
    summary = f"{task}: {cause}, so the site reference is learned again."
    evidence = {"task": task, "asked": "state unreadable", "by": "the agent"}
    messages = [PendingMessage.audit("reference reset", summary, evidence)]
    for alert in store.open_alerts(task):
        if alert["alert"] in ("drift", "fault"):
            body = {name: alert[name] for name in ("alert", "subject", "id")}
            body |= {"state": "cleared", "severity": "info", "summary": f"{task}: {cause}.", "evidence": {}}
            messages.append(PendingMessage("alerts", task, body))
    # No fewer alerts were raised so far: their ids are not used again.
    raised = np.full_like((fresh := monitor.start()).raised_counts, store.counters().get("messages.alerts", 0))
    return RestoredDrift(monitor, replace(fresh, raised_counts=raised), messages, encode_basis(monitor))


def _succeed(
    task: str, monitor: DriftMonitor, old: DriftState, basis: Reference | None, *, is_whole: bool
) -> RestoredDrift:
    """Return what a monitor of another bundle, or of a changed config, takes over from `old`, as far as it is whole."""
    evidence: dict[str, Any] = {"task": task, "asked": "bundle changed", "by": "the agent"}
    if old.site_reference is not None:
        evidence["site"] = old.site_reference.digest
    settings = monitor.settings
    if basis is not None and succession.is_heir(settings.own, basis) and old.open_summary.reference == basis.digest:
        heir = monitor.rebase(succession.merge_references(basis, settings.own))
        is_same = (old.window, old.class_field) == (settings.window, settings.class_field)
        if is_same and old.is_compatible(heir.shipped.task):
            state = succession.inherit(old, heir.shipped)
            messages = [PendingMessage.from_alert(alert, task) for alert in _carried_alerts(state, old)]
            if state.is_inherited and not old.is_inherited:
                summary = f"{task}: another bundle inherits the site reference, and learns one of its own meanwhile."
                messages.append(PendingMessage.audit("reference inherited", summary, evidence))
            return RestoredDrift(heir, state, messages, encode_basis(heir))
    monitor = monitor.rebase(settings.own)
    state, alerts = succession.carry_over(monitor.start(), old)
    messages = [PendingMessage.from_alert(alert, task) for alert in alerts]
    if old.site_reference is not None or not is_whole:
        cause = "the bundle, or the agent, was changed" if is_whole else "the stored reference cannot be read"
        summary = f"{task}: {cause}, so the site reference is learned again."
        messages.append(PendingMessage.audit("reference reset", summary, evidence))
    return RestoredDrift(monitor, state, messages, encode_basis(monitor))


def _carried_alerts(state: DriftState, old: DriftState) -> list[Alert]:
    return [succession.build_carried_alert(item) for item in state.carried[len(old.carried) :]]


def _load_basis(store: Store, task: str, suffix: str) -> StoredBasis | None:
    """Return None for one that cannot be read: then nothing is inherited."""
    stored = store.load_state(task, task_keys.SHIPPED_REFERENCE + suffix)
    if stored is None:
        return None
    try:
        basis = decoders.from_msgpack(stored, StoredBasis)
        Reference.from_json(basis.reference)
    except (msgspec.MsgspecError, BadBundle):
        return None
    return basis


def encode_basis(monitor: DriftMonitor) -> bytes:
    return msgspec.msgpack.encode(StoredBasis(monitor.settings.own.digest, monitor.settings.shipped.to_json()))


def load_for_display(store: Store, task: str) -> DriftState | None:
    """Return the stored state, of whatever bundle it is; None if there is none, or if it cannot be read."""
    past, learning, site, guard = (
        store.load_state(task, key)
        for key in (
            task_keys.DRIFT_STATE,
            task_keys.LEARNING,
            task_keys.SITE_REFERENCE,
            task_keys.REFERENCE_GUARD,
        )
    )
    try:
        state = None if past is None else DriftState.from_parts(past, site, guard)
        return state and (state if learning is None else replace(state, learning=LearningState.from_bytes(learning)))
    except ValueError:
        return None


# --- learning ---


def load_refusals(store: Store, task: str) -> LearningRefusals:
    stored = store.load_state(task, task_keys.LEARNING_REFUSED_ALERT)
    return decoders.from_json(stored, LearningRefusals) if stored else LearningRefusals()


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
        effect = (
            "no site reference yet, so drift is not tested"
            if result.site_digest is None
            else "the reference of the former bundle stays in use, and the model's answers are not tested"
        )
        summary = f"{task}: {effect}: {result.learning_error}."
        messages.append(PendingMessage.from_alert(LEARNING_REFUSED.raised(summary, count=refusals.count), task))
    return messages, refusals


def _learned_message(task: str, reference: Reference, last_row: int) -> PendingMessage:
    summary = f"{task}: learned the site reference from {reference.drift_windows} drift windows."
    evidence: dict[str, Any] = {"task": task, "site": reference.digest, "through": last_row}
    evidence["fields"] = reference.describe_fields()
    if reference.site is not None:
        evidence |= reference.site.to_dict() | {"smallest_changes": reference.describe_smallest_changes()}
    if reference.warning is not None:
        summary += f" Warning: {reference.warning}."
        evidence["warning"] = reference.warning
    return PendingMessage.audit("learned", summary, evidence)
