"""Label metrics: performance metrics of each output from labels, as a `quality` message every 50 labels, with alerts.

A message covers the newest labelled results of the current bundle, at most 500. Labels that are the model's own
answers, verdicts of people who saw the prediction, and results that are not numbers are counted, and left out of every
metric.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from outstation.device.pipeline.labelled_output import LabelledOutput, list_outputs
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store import label_store, predictions, task_keys
from outstation.device.store.label_store import StoredLabel
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.predictions import output_key
from outstation.device.store.store import Store
from outstation.foundation import clock, decoders
from outstation.foundation.clock import ClockReading
from outstation.ml.performance import degradation
from outstation.ml.performance.degradation import (
    Agreement,
    CusumTrack,
    DegradationEvent,
    DegradationState,
    LabelledLoss,
    PromisedAccuracy,
)
from outstation.ml.performance.labels import MODEL, NO_TRUTH, LabelSchema, count_sources
from outstation.protocol.alerts import kinds
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.alerts.kinds import OWN_LABELS
from outstation.protocol.wire.jws import encode
from outstation.protocol.wire.privacy import least_count

if TYPE_CHECKING:
    from outstation.ml.performance.estimates import MetricEstimate

LABELS_PER_MESSAGE, MAX_LABELS_PER_MESSAGE, MAX_REPORT_INTERVAL_S = 50, 500, 86_400.0
_EARLY_BATCH = 200
_MAX_CLASSES = 40
# The message's header, `labels` and `estimate`, beside the metrics.
_HEAD_BYTES = 1_500
# Partitions of the labelled results beside the slices: into one cell, and by class.
_ALL, _CLASS = "", "class"
# Numbers of the labels in each cell of each partition.
Partitions = dict[str, dict[str, list[int]]]


class LabelWindow(msgspec.Struct, frozen=True):
    """Labelled results in the order of their labels; `new_samples` were in no message before.

    `corrected_count` of the new ones replaced a label that was in a message.
    """

    samples: list[StoredLabel]
    new_samples: list[StoredLabel]
    corrected_count: int

    @classmethod
    def from_labelled(
        cls, output: LabelledOutput, window: Sequence[StoredLabel], state: DegradationState
    ) -> LabelWindow:
        valid = output.filter_valid(window)
        new = [sample for sample in valid if sample.number > state.last_number]
        return cls(valid, new, sum(sample.first_number <= state.last_number for sample in new))


def tick(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, keep_s: float) -> int:
    """Join early labels with their results, and write the messages that are due; return the number of alerts.

    Raises StorageError.
    """
    task.raise_least_count(message_log)
    alerts = _end_outputs(task, store, message_log, now)
    for output in list_outputs(task):
        _join_early_labels(output.key, store, now, keep_s)
        while (state := _load_due_state(output, store, now)) is not None:
            alerts += _write_report(output, store, message_log, state, now)
    return alerts


def _end_outputs(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> int:
    """End the labels' tests and waits of outputs that the bundle does not have; return the number of alerts."""
    count = 0
    stored = store.query(predictions.list_stored_outputs, task.name)
    for name in set(stored) - task.bundle.manifest.label_schemas.keys():
        key = output_key(task.name, name)
        # No result can come any more.
        _join_early_labels(key, store, now, -math.inf)
        old, state = _load_stored_state(key, store), _load_state(key, task.bundle.digest, store)
        if old is None or old.bundle == state.bundle:
            continue
        alerts = _clear_old_alerts(old, state, is_dropped=True)
        with store.transaction() as tx:
            message_log.append_all(tx, _build_alert_messages(task.name, name, alerts), now)
            tx.save_state(key, task_keys.LABEL_METRICS, state.to_bytes())
            tx.delete_state(key, task_keys.LAST_LABEL_METRICS)
        count += len(alerts)
    return count


def _build_alert_messages(task: str, output: str, alerts: Sequence[Alert]) -> list[PendingMessage]:
    return [PendingMessage.from_alert(kinds.name_output(alert, output), task) for alert in alerts]


def _join_early_labels(key: str, store: Store, now: ClockReading, keep_s: float) -> None:
    """Store early labels whose result may be there, and those older than `keep_s`, or count them as unmatched."""
    span = store.query(predictions.load_span, key)
    # Read first: without such labels nothing needs room.
    while store.query(label_store.load_early, key, span, store.uptime_s(now) - keep_s, 1):
        with store.transaction() as tx:
            early = label_store.load_early(tx.connection, key, span, tx.uptime_s(now) - keep_s, _EARLY_BATCH)
            for _, label, received_us in early:
                result = tx.labels.find(key, label)
                outcome = "unmatched" if result is None else tx.labels.store_label(key, label, result, received_us)
                tx.increment_counter(label_store.outcome_counter(key, outcome), 1)
            tx.labels.delete_early_labels(key, [number for number, _, _ in early])


def _load_due_state(output: LabelledOutput, store: Store, now: ClockReading) -> DegradationState | None:
    """Return the task's state if a message is due."""
    state = _load_state(output.key, output.digest, store)
    new = store.query(label_store.next_numbers, output.key, state.last_number, LABELS_PER_MESSAGE)
    if len(new) >= LABELS_PER_MESSAGE:
        return state
    if not new:
        return None
    with store.transaction() as tx:
        at_s = tx.uptime_s(now)
        if not state.last_message_s:
            # The first interval begins with the first label.
            state.last_message_s = max(at_s, 1.0)
            tx.save_state(output.key, task_keys.LABEL_METRICS, state.to_bytes())
    return state if at_s >= state.last_message_s + MAX_REPORT_INTERVAL_S else None


def _load_stored_state(key: str, store: Store) -> DegradationState | None:
    """Return the state of an output as stored, of any bundle; of none if it is damaged, None without one."""
    if (stored := store.load_state(key, task_keys.LABEL_METRICS)) is None:
        return None
    try:
        return DegradationState.from_bytes(stored)
    except ValueError:
        return DegradationState("")


def _load_state(key: str, digest: str, store: Store) -> DegradationState:
    state = _load_stored_state(key, store)
    if state is None:
        return DegradationState(digest)
    if state.bundle == digest:
        return state
    # Of another bundle: its open alerts say nothing about this one.
    return DegradationState(digest, last_number=state.last_number, last_message_s=state.last_message_s)


def _write_report(
    output: LabelledOutput, store: Store, message_log: MessageLog, state: DegradationState, now: ClockReading
) -> int:
    """Write one message and its alerts; a failed commit leaves labels and state as they were."""
    numbers = store.query(label_store.next_numbers, output.key, state.last_number, MAX_LABELS_PER_MESSAGE // 2)
    stored = store.query(label_store.load_labelled, *(output.key, state.bundle, numbers[-1], MAX_LABELS_PER_MESSAGE))
    window = LabelWindow.from_labelled(output, stored, state)
    alerts = _clear_old_alerts(_load_stored_state(output.key, store), state)
    alerts += _evaluate_labels(output, store, state, window, numbers[-1])
    state.last_number = numbers[-1]
    messages, body = [], None
    published = _load_published(output, store)
    cells = _select_cells(output, window, published, message_log.least_count(output.task))
    # Where too few labels are new, a later message covers them.
    if window.samples and _ALL in cells[_ALL]:
        body = _build_body(output, store, message_log.max_bytes, window, cells)
        if any(_is_counted(state, sample.source, sample.by) for sample in window.new_samples):
            counted = _load_counted(output, store, state, numbers[-1])
            state.is_estimate_wrong = _contradicts_estimate(output, output.filter_evaluable(counted))
        messages.append(PendingMessage("quality", output.task, body))
        for partition, selected in cells.items():
            published[partition] = published.get(partition, {}) | selected
    messages += _build_alert_messages(output.task, output.name, alerts)
    with store.transaction() as tx:
        state.last_message_s = max(tx.uptime_s(now), 1.0)
        message_log.append_all(tx, messages, now)
        if body is not None:
            last = encode({**body, "time": clock.to_rfc3339(now.wall_us)})
            tx.save_state(output.key, task_keys.LAST_LABEL_METRICS, last)
            tx.save_state(output.key, task_keys.PUBLISHED_CELLS, msgspec.msgpack.encode(published))
        tx.save_state(output.key, task_keys.LABEL_METRICS, state.to_bytes())
    return len(alerts)


def _clear_old_alerts(
    old: DegradationState | None, state: DegradationState, *, is_dropped: bool = False
) -> list[Alert]:
    """Clear alerts about a bundle that no longer runs; all of them if the one that does has no such output."""
    if old is None or old.bundle == state.bundle:
        return []
    text = (
        "the model that runs now has no such output."
        if is_dropped
        else "another bundle runs now; its labels are evaluated from the start."
    )
    alerts = [
        degradation.ALERT_KINDS[kind].cleared(text, count=track.raised_count)
        for kind, track in old.tracks.items()
        if track.is_open
    ]
    if is_dropped and old.feedback_open:
        alerts.append(OWN_LABELS.cleared(text, count=old.feedback_count))
    # Counts continue, so that ids of this bundle's alerts are new.
    state.tracks = {kind: CusumTrack(raised_count=track.raised_count) for kind, track in old.tracks.items()}
    state.feedback_open, state.feedback_count = old.feedback_open and not is_dropped, old.feedback_count
    return alerts


def _contradicts_estimate(output: LabelledOutput, samples: Sequence[StoredLabel]) -> bool:
    """Return True if the interval of the accuracy or error excludes that of its estimate."""
    estimate = output.estimate_performance(samples)
    if estimate is None:
        return False
    from outstation.ml.performance.estimates import compute_metrics

    schema, predictions = output.schema, output.to_labelled_predictions(samples)
    metrics = [metric.to_dict() for metric in compute_metrics(schema.kind, schema.labels, predictions)]
    name, low, high = ("accuracy", "low", "high") if output.error is None else ("mae", "mae_low", "mae_high")
    measured = next((m for m in metrics if m["metric"] == name and "slice" not in m), None)
    if measured is None or measured["low"] is None:
        return False
    return bool(measured["high"] < estimate[low] or measured["low"] > estimate[high])


# --- degradation ---


def _evaluate_labels(
    output: LabelledOutput, store: Store, state: DegradationState, window: LabelWindow, last_label: int
) -> Iterator[Alert]:
    if not state.is_authenticated and any(sample.by for sample in output.filter_evaluable(window.new_samples)):
        state.require_authenticated()
    new = [sample for sample in window.new_samples if _is_counted(state, sample.source, sample.by)]
    if not new:
        return
    newest = _load_counted(output, store, state, last_label)
    own = sum(sample.source == MODEL for sample in newest)
    if (alert := degradation.check_feedback(state, own, len(newest), _compare_agreement(output, newest))) is not None:
        yield alert
    truth = output.filter_evaluable(new)
    known = [state.first_number] if state.first_number else []
    state.first_number = min([sample.first_number for sample in truth] + known, default=0)
    binary_loss = output.schema.kind != "regress"
    for event in _detect_degradation(output, store, state, truth, last_label, binary_loss=binary_loss):
        yield degradation.build_alert(event, binary_loss=binary_loss)


def _detect_degradation(
    output: LabelledOutput,
    store: Store,
    state: DegradationState,
    new: Sequence[StoredLabel],
    last_label: int,
    *,
    binary_loss: bool,
) -> list[DegradationEvent]:
    promise, held_out = PromisedAccuracy(), output.held_out
    if output.schema.kind == "classify" and held_out is not None and (n := int(held_out.n.sum())):
        promise = PromisedAccuracy(float(held_out.correct.sum()) / n, n)
    # Corrections by others, and of verdicts, change no loss.
    if not any(sample.first_number <= state.last_number for sample in new):
        losses = _compute_losses(output, new)
        return degradation.add_losses(state, losses, promise, binary_loss=binary_loss)
    # Not from the window, which may lack the first labels.
    stored = output.filter_evaluable(_load_counted(output, store, state, last_label, is_truth=True))
    samples = sorted(
        (s for s in stored if s.first_number >= state.first_number), key=lambda sample: sample.first_number
    )
    complete = bool(samples) and samples[0].first_number == state.first_number
    losses = _compute_losses(output, samples)
    return degradation.recompute(state, losses, promise, binary_loss=binary_loss, complete=complete)


def _is_counted(state: DegradationState, source: str, by: str, *, is_truth: bool = False) -> bool:
    """Return True if a label may raise or clear an alert; with `is_truth`, if it is ground truth as well."""
    return bool(by or not state.is_authenticated) and not (is_truth and source in NO_TRUTH)


def _load_counted(
    output: LabelledOutput, store: Store, state: DegradationState, through: int, *, is_truth: bool = False
) -> list[StoredLabel]:
    """Return the newest valid samples that count, which no flood of other labels pushes out."""
    load = partial(label_store.load_labelled, is_wanted=partial(_is_counted, state, is_truth=is_truth))
    return output.filter_valid(store.query(load, output.key, state.bundle, through, MAX_LABELS_PER_MESSAGE))


def _compute_losses(output: LabelledOutput, evaluable: Sequence[StoredLabel]) -> list[LabelledLoss]:
    """Return the losses of samples that `filter_evaluable` returned."""
    if not evaluable:
        return []
    losses = output.to_labelled_predictions(evaluable).losses(output.schema.kind)
    if losses is None:
        return []
    chances = output.estimate_error_chances(evaluable)
    return [
        LabelledLoss(loss, chance, sample.prediction.row, sample.prediction.t)
        for loss, chance, sample in zip(losses.tolist(), chances, evaluable, strict=True)
    ]


# --- the message ---


def _load_published(output: LabelledOutput, store: Store) -> Partitions:
    stored = store.load_state(output.key, task_keys.PUBLISHED_CELLS)
    try:
        return decoders.from_msgpack(stored, Partitions) if stored else {}
    except msgspec.MsgspecError:
        return {}


def _select_cells(output: LabelledOutput, window: LabelWindow, published: Partitions, k: int) -> Partitions:
    """Return the cells that the message may show by the least count `k`, with the numbers of their labels."""
    from outstation.ml.performance import slices

    samples = output.filter_evaluable(window.samples)
    numbers = [sample.number for sample in samples]
    cells: Partitions = {_ALL: {_ALL: numbers}}
    schema = output.schema
    if schema.class_names:
        cells[_CLASS] = {name: [] for name in schema.class_names}
        for sample in samples:
            for name in schema.true_names(sample.label):
                cells[_CLASS][name].append(sample.number)
    for field, texts in _group_slices(samples).items():
        for number, text in zip(numbers, slices.merge_rare_values(texts), strict=True):
            cells.setdefault(field, {}).setdefault(text, []).append(number)
    return {name: least_count.select_cells(parts, published.get(name, {}), k) for name, parts in cells.items()}


def _group_slices(samples: Sequence[StoredLabel]) -> dict[str, list[str]]:
    """Return the texts (n,) of the slices that all samples have, by field."""
    names = sorted(set.intersection(*(set(sample.prediction.slices) for sample in samples))) if samples else []
    return {name: [sample.prediction.slices[name] for sample in samples] for name in names}


def _build_body(
    output: LabelledOutput, store: Store, max_bytes: int, window: LabelWindow, cells: Partitions
) -> dict[str, Any]:
    """Return the message's members, at most `max_bytes` long with the header."""
    ordered = sorted(window.samples, key=lambda sample: sample.prediction.row)
    evaluable = output.filter_evaluable(ordered)
    rows, times = [sample.prediction.row for sample in ordered], [sample.prediction.t for sample in ordered]
    members: dict[str, Any] = {
        "model": output.model,
        **({"output": output.name} if output.name else {}),
        "window": {
            "rows": [rows[0], rows[-1]],
            "from": clock.to_rfc3339(min(times)),
            "to": clock.to_rfc3339(max(times)),
            "n": len(evaluable),
            "new": len(window.new_samples),
            "corrected": window.corrected_count,
            "no_result": sum(sample.source not in NO_TRUTH for sample in ordered) - len(evaluable),
        },
        "labels": _describe_labels(output, store, ordered, cells),
        "estimate": output.estimate_performance(evaluable),
    }
    computed = _compute_metrics(output, evaluable)
    shown = {f"{partition}={name}" for partition, selected in cells.items() for name in selected}
    estimates = [metric.to_dict() for metric in computed if not metric.slice or metric.slice in shown]
    members[least_count.WITHHELD] = len(computed) - len(estimates)
    while estimates and len(encode({**members, "metrics": estimates})) > max_bytes - _HEAD_BYTES:
        # Slices and rare classes come last.
        estimates = estimates[: len(estimates) * 3 // 4]
    return {**members, "metrics": estimates}


def _compute_metrics(output: LabelledOutput, samples: Sequence[StoredLabel]) -> list[MetricEstimate]:
    if not samples:
        return []
    from outstation.ml.performance import slices
    from outstation.ml.performance.estimates import compute_metrics

    schema, predictions = output.schema, output.to_labelled_predictions(samples)
    return [
        *compute_metrics(schema.kind, schema.labels, predictions),
        *slices.compute_slice_metrics(schema.kind, predictions, _group_slices(samples)),
    ]


def _describe_labels(
    output: LabelledOutput, store: Store, ordered: Sequence[StoredLabel], cells: Partitions
) -> dict[str, Any]:
    """Return the labels' sources, delay and counts by class, and the share of results that have one."""
    delay = np.array([max(0, sample.received - sample.prediction.t) / 1e6 for sample in ordered])
    rows = (ordered[0].prediction.row, ordered[-1].prediction.row)
    results, counters = store.query(predictions.count_predictions, output.key, *rows), store.counters()
    members: dict[str, Any] = {
        "n": len(ordered),
        "delay_s": {"median": round(float(np.median(delay)), 3), "p90": round(float(np.quantile(delay, 0.9)), 3)},
        "coverage": round(min(1.0, len(ordered) / results), 4) if results else None,
        "sources": count_sources([sample.source for sample in ordered]),
        "authenticated": sum(bool(sample.by) for sample in ordered),
        **{name: counters.get(f"labels {name}.{output.key}", 0) for name in ("replaced", "late", "unmatched")},
    }
    shown = cells.get(_CLASS, {})
    return members | _count_classes(output.schema, [sample.label for sample in ordered], shown)


def _compare_agreement(output: LabelledOutput, samples: Sequence[StoredLabel]) -> Agreement:
    """Count how often people's labels agree with the answers, beside what the scores let expect."""
    schema = output.schema
    judged = [s for s in samples if s.source != MODEL and s.prediction.predicted_class is not None]
    chances = output.estimate_error_chances(judged)
    known = [(sample, chance) for sample, chance in zip(judged, chances, strict=True) if chance is not None]
    wrong = sum(schema.parse(sample.label) != sample.prediction.predicted_class for sample, _ in known)
    return Agreement(len(known), wrong, sum(chance for _, chance in known))


def _count_classes(schema: LabelSchema, texts: Sequence[str], shown: Collection[str]) -> dict[str, Any]:
    """Return the number of labels of each class, and their imbalance; a class without labels counts as one there.

    Classes that are not `shown` are counted together, and then there is no imbalance.
    """
    if not schema.class_names:
        return {}
    counts = dict.fromkeys(schema.class_names, 0)
    for text in texts:
        for name in schema.true_names(text):
            counts[name] += 1
    largest = sorted(counts, key=lambda name: -counts[name])[:_MAX_CLASSES]
    imbalance = max(counts.values()) / max(1, min(counts.values()))
    named = {name: counts[name] for name in largest if name in shown}
    if len(shown) == len(counts):
        return {"classes": named, "imbalance": round(imbalance, 2)}
    hidden = sum(counts[name] for name in counts if name not in shown)
    return {"classes": named | {least_count.OTHER: hidden}, "imbalance": None}
