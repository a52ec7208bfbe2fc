"""When a task's labels are looked at: a `quality` message for every so many of them, and alerts.

A message is about the newest labelled results of the bundle that runs, at most MOST; `new` of them were not in one
before, or with another label. What a message says is in `measured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from agent import clock
from agent.alerts import Alert
from agent.clock import ClockReading
from agent.device.intake import labels
from agent.device.intake.labels import LabelTarget
from agent.device.pipeline import measured
from agent.device.pipeline.batch import LoadedTask
from agent.device.pipeline.measured import LabelWindow, build_label_schema
from agent.device.store import labels as labelled
from agent.device.store import task_keys
from agent.device.store.labels import StoredLabel
from agent.device.store.message_log import MessageLog
from agent.device.store.store import Store
from agent.performance import degradation
from agent.performance.degradation import DegradationEvent, PromisedAccuracy
from agent.performance.labels import MODEL
from agent.wire.messages import encode

LABELS_PER_MESSAGE, MAX_LABELS_PER_MESSAGE, MAX_REPORT_INTERVAL_S = 50, 500, 86_400.0
_EARLY_BATCH = 200


def build_label_targets(tasks: Sequence[LoadedTask]) -> dict[str, LabelTarget]:
    """What the intake must know to take labels of these tasks."""
    return {task.name: LabelTarget(task.config.stream, build_label_schema(task)) for task in tasks}


def tick(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, keep_s: float) -> int:
    """Join labels that waited, and report where it is time to; how many alerts. Raises StorageError."""
    _join_early_labels(task, store, now, keep_s)
    alerts = 0
    while (found := _load_due_state(task, store, now)) is not None:
        alerts += _write_report(task, store, message_log, found, now)
    return alerts


def _join_early_labels(task: LoadedTask, store: Store, now: ClockReading, keep_s: float) -> None:
    span = store.query(labelled.load_span, task.name)
    if span is None:
        return
    while True:
        with store.transaction() as tx:
            waiting = labelled.load_early(tx.connection, task.name, span, tx.uptime_s(now) - keep_s, _EARLY_BATCH)
            labels.join_early_labels(tx, task.name, waiting)
        if len(waiting) < _EARLY_BATCH:
            return


def _load_due_state(task: LoadedTask, store: Store, now: ClockReading) -> degradation.DegradationState | None:
    """The task's state where a message is due."""
    state = _load_state(task, store)
    waiting = store.query(labelled.next_numbers, task.name, state.last_number, LABELS_PER_MESSAGE)
    if len(waiting) >= LABELS_PER_MESSAGE:
        return state
    if not waiting:
        return None
    with store.transaction() as tx:
        at_s = tx.uptime_s(now)
        if not state.last_message_s:
            # The day begins with the first label.
            state.last_message_s = max(at_s, 1.0)
            tx.save_state(task.name, task_keys.LABEL_METRICS, state.to_bytes())
    return state if at_s >= state.last_message_s + MAX_REPORT_INTERVAL_S else None


def _load_state(task: LoadedTask, store: Store) -> degradation.DegradationState:
    kept = store.load_state(task.name, task_keys.LABEL_METRICS)
    digest = task.bundle.digest
    if kept is not None:
        try:
            state = degradation.DegradationState.from_bytes(kept)
        except ValueError:
            return degradation.DegradationState(digest)
        if state.bundle == digest:
            return state
        # Of another bundle: what was open against it says nothing about this one.
        return degradation.DegradationState(digest, last_number=state.last_number, last_message_s=state.last_message_s)
    return degradation.DegradationState(digest)


def _write_report(
    task: LoadedTask, store: Store, message_log: MessageLog, state: degradation.DegradationState, now: ClockReading
) -> int:
    """One message; labels and state are as they were until all of it is committed."""
    numbers = store.query(labelled.next_numbers, task.name, state.last_number, MAX_LABELS_PER_MESSAGE // 2)
    window = store.query(labelled.load_labelled, task.name, state.bundle, numbers[-1], MAX_LABELS_PER_MESSAGE)
    taken = LabelWindow.from_labelled(task, window, state)
    alerts = [*_clear_old_alerts(task, store, state), *_evaluate_labels(task, store, state, taken, numbers[-1])]
    state.last_number = numbers[-1]
    with store.transaction() as tx:
        state.last_message_s = max(tx.uptime_s(now), 1.0)
        if taken.samples:
            body = measured.build_body(task, tx, message_log.max_bytes, taken)
            message_log.append(tx, "quality", task.name, body, now)
            tx.save_state(
                task.name, task_keys.LAST_LABEL_METRICS, encode({**body, "time": clock.to_rfc3339(now.wall_us)})
            )
        for alert in alerts:
            message_log.append(tx, "alerts", task.name, alert.to_body(task.name), now)
        tx.save_state(task.name, task_keys.LABEL_METRICS, state.to_bytes())
    return len(alerts)


def _clear_old_alerts(task: LoadedTask, store: Store, state: degradation.DegradationState) -> list[Alert]:
    """Alerts about a bundle that runs no more."""
    kept = store.load_state(task.name, task_keys.LABEL_METRICS)
    try:
        old = degradation.DegradationState.from_bytes(kept) if kept else state
    except ValueError:
        return []
    if old.bundle == state.bundle:
        return []
    text = "another bundle runs now; its labels are judged anew."
    found = [
        degradation.ALERT_KINDS[kind].cleared(text, count=track.raised_count)
        for kind, track in old.tracks.items()
        if track.is_open
    ]
    # Ids go on counting, so that an alert of this bundle is another one.
    state.tracks = {kind: degradation.CusumTrack(raised_count=track.raised_count) for kind, track in old.tracks.items()}
    state.feedback_open, state.feedback_count = old.feedback_open, old.feedback_count
    return found


# --- what the labels say ---


def _evaluate_labels(
    task: LoadedTask, store: Store, state: degradation.DegradationState, label_window: LabelWindow, last_label: int
) -> Iterator[Alert]:
    own = sum(one.source == MODEL for one in label_window.samples)
    if (grown := degradation.check_feedback(state, own, len(label_window.samples))) is not None:
        yield grown
    state.first_number = min(
        [one.first_number for one in label_window.new_samples] + ([state.first_number] if state.first_number else []),
        default=0,
    )
    shares = build_label_schema(task).kind != "regress"
    for finding in _detect_degradation(task, store, state, label_window, last_label, shares=shares):
        yield degradation.build_alert(finding, binary_loss=shares)


def _detect_degradation(
    task: LoadedTask,
    store: Store,
    state: degradation.DegradationState,
    label_window: LabelWindow,
    last_label: int,
    *,
    shares: bool,
) -> list[DegradationEvent]:
    promise = _read_promise(task)
    if not label_window.corrected_count:
        return degradation.add_losses(
            state, *_compute_losses(task, label_window.new_samples), promise, binary_loss=shares
        )
    # Among the newest only, the first labels would be missing.
    kept = store.query(labelled.load_labelled, task.name, state.bundle, last_label, MAX_LABELS_PER_MESSAGE)
    known = sorted(
        (one for one in measured.filter_understood(task, kept) if one.first_number >= state.first_number),
        key=lambda one: one.first_number,
    )
    whole = bool(known) and known[0].first_number == state.first_number
    return degradation.recompute(state, *_compute_losses(task, known), promise, binary_loss=shares, complete=whole)


def _compute_losses(task: LoadedTask, samples: Sequence[StoredLabel]) -> tuple[list[float], list[float | None]]:
    """Of those that say something, and what the model's certainty tells of each."""
    judged = measured.filter_evaluable(task, samples)
    off = measured.to_labelled_predictions(task, judged).losses(build_label_schema(task).kind) if judged else None
    if off is None:
        return [], []
    return off.tolist(), measured.estimate_error_chances(task, judged)


def _read_promise(task: LoadedTask) -> PromisedAccuracy:
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    if build_label_schema(task).kind != "classify" or shipped is None or shipped.score_correct is None:
        return PromisedAccuracy()
    n = int(shipped.score_n.sum())
    return PromisedAccuracy(float(shipped.score_correct.sum()) / n, n) if n else PromisedAccuracy()
