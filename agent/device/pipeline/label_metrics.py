"""Label metrics: a task's performance metrics from labels, as a `quality` message every 50 labels, with its alerts.

A message covers the newest labelled results of the current bundle, at most 500. Labels that are the model's own
answers, verdicts of people who saw the prediction, and results that are not numbers are counted, and left out of every
metric.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from agent import clock, decoders
from agent.alerts.alert import Alert
from agent.clock import ClockReading
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.store import labels as label_store
from agent.device.store import predictions, task_keys
from agent.device.store.labels import StoredLabel
from agent.device.store.message_log import MessageLog, PendingMessage
from agent.device.store.store import Store
from agent.indices import bincount
from agent.performance import cbpe, degradation, slices
from agent.performance.degradation import (
    Agreement,
    CusumTrack,
    DegradationEvent,
    DegradationState,
    LabelledLoss,
    PromisedAccuracy,
)
from agent.performance.estimates import MetricEstimate, compute_metrics
from agent.performance.labels import MODEL, NO_TRUTH, LabelSchema, LabelTarget, count_sources
from agent.performance.metrics import LabelledPredictions
from agent.wire.messages import encode
from agent.wire.privacy import least_count

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
    def from_labelled(cls, task: LoadedTask, window: Sequence[StoredLabel], state: DegradationState) -> LabelWindow:
        valid = filter_valid(task, window)
        new = [sample for sample in valid if sample.number > state.last_number]
        return cls(valid, new, sum(sample.first_number <= state.last_number for sample in new))


def build_label_targets(tasks: Sequence[LoadedTask]) -> dict[str, LabelTarget]:
    """Return what intake needs to check labels of these tasks."""
    return {task.name: LabelTarget(task.config.stream, build_label_schema(task)) for task in tasks}


def build_label_schema(task: LoadedTask) -> LabelSchema:
    manifest = task.bundle.manifest
    return LabelSchema(manifest.label_kind, tuple(manifest.output.labels))


def tick(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, keep_s: float) -> int:
    """Join early labels with their results, and write the messages that are due; return the number of alerts.

    Raises StorageError.
    """
    task.raise_least_count(message_log)
    _join_early_labels(task, store, now, keep_s)
    alerts = 0
    while (state := _load_due_state(task, store, now)) is not None:
        alerts += _write_report(task, store, message_log, state, now)
    return alerts


def contradict_certainty(task: LoadedTask, store: Store) -> bool:
    """Return True while labels contradict the accuracy that is expected from the scores."""
    stored = store.load_state(task.name, task_keys.LABEL_METRICS)
    return stored is not None and degradation.contradict_certainty(stored, task.bundle.digest)


def _join_early_labels(task: LoadedTask, store: Store, now: ClockReading, keep_s: float) -> None:
    span = store.query(predictions.load_span, task.name)
    if span is None:
        return
    while True:
        with store.transaction() as tx:
            early = label_store.load_early(tx.connection, task.name, span, tx.uptime_s(now) - keep_s, _EARLY_BATCH)
            for _, label, received_us in early:
                labels = tx.labels
                result = labels.find(task.name, label)
                outcome = "unmatched" if result is None else labels.store_label(task.name, label, result, received_us)
                tx.increment_counter(label_store.outcome_counter(task.name, outcome), 1)
            tx.labels.delete_early_labels(task.name, [number for number, _, _ in early])
        if len(early) < _EARLY_BATCH:
            return


def _load_due_state(task: LoadedTask, store: Store, now: ClockReading) -> DegradationState | None:
    """Return the task's state if a message is due."""
    state = _load_state(task, store)
    new = store.query(label_store.next_numbers, task.name, state.last_number, LABELS_PER_MESSAGE)
    if len(new) >= LABELS_PER_MESSAGE:
        return state
    if not new:
        return None
    with store.transaction() as tx:
        at_s = tx.uptime_s(now)
        if not state.last_message_s:
            # The first interval begins with the first label.
            state.last_message_s = max(at_s, 1.0)
            tx.save_state(task.name, task_keys.LABEL_METRICS, state.to_bytes())
    return state if at_s >= state.last_message_s + MAX_REPORT_INTERVAL_S else None


def _load_state(task: LoadedTask, store: Store) -> DegradationState:
    stored, digest = store.load_state(task.name, task_keys.LABEL_METRICS), task.bundle.digest
    if stored is not None:
        try:
            state = DegradationState.from_bytes(stored)
        except ValueError:
            return DegradationState(digest)
        if state.bundle == digest:
            return state
        # Of another bundle: its open alerts say nothing about this one.
        return DegradationState(digest, last_number=state.last_number, last_message_s=state.last_message_s)
    return DegradationState(digest)


def _write_report(
    task: LoadedTask, store: Store, message_log: MessageLog, state: DegradationState, now: ClockReading
) -> int:
    """Write one message and its alerts; a failed commit leaves labels and state as they were."""
    numbers = store.query(label_store.next_numbers, task.name, state.last_number, MAX_LABELS_PER_MESSAGE // 2)
    stored = store.query(label_store.load_labelled, *(task.name, state.bundle, numbers[-1], MAX_LABELS_PER_MESSAGE))
    window = LabelWindow.from_labelled(task, stored, state)
    alerts = [*_clear_old_alerts(task, store, state), *_evaluate_labels(task, store, state, window, numbers[-1])]
    state.last_number = numbers[-1]
    messages, body = [], None
    published = _load_published(task, store)
    cells = _select_cells(task, window, published, message_log.least_count(task.name))
    # Where too few labels are new, a later message covers them.
    if window.samples and _ALL in cells[_ALL]:
        body = _build_body(task, store, message_log.max_bytes, window, cells)
        if any(_is_counted(state, sample.source, sample.by) for sample in window.new_samples):
            counted = _load_counted(task, store, state, numbers[-1])
            state.is_estimate_wrong = _contradicts_estimate(task, filter_evaluable(task, counted))
        messages.append(PendingMessage("quality", task.name, body))
        for partition, selected in cells.items():
            published[partition] = published.get(partition, {}) | selected
    messages += [PendingMessage.from_alert(alert, task.name) for alert in alerts]
    with store.transaction() as tx:
        state.last_message_s = max(tx.uptime_s(now), 1.0)
        message_log.append_all(tx, messages, now)
        if body is not None:
            last = encode({**body, "time": clock.to_rfc3339(now.wall_us)})
            tx.save_state(task.name, task_keys.LAST_LABEL_METRICS, last)
            tx.save_state(task.name, task_keys.PUBLISHED_CELLS, msgspec.msgpack.encode(published))
        tx.save_state(task.name, task_keys.LABEL_METRICS, state.to_bytes())
    return len(alerts)


def _clear_old_alerts(task: LoadedTask, store: Store, state: DegradationState) -> list[Alert]:
    """Clear alerts about a bundle that no longer runs."""
    stored = store.load_state(task.name, task_keys.LABEL_METRICS)
    try:
        old = DegradationState.from_bytes(stored) if stored else state
    except ValueError:
        return []
    if old.bundle == state.bundle:
        return []
    text = "another bundle runs now; its labels are evaluated from the start."
    alerts = [
        degradation.ALERT_KINDS[kind].cleared(text, count=track.raised_count)
        for kind, track in old.tracks.items()
        if track.is_open
    ]
    # Counts continue, so that ids of this bundle's alerts are new.
    state.tracks = {kind: CusumTrack(raised_count=track.raised_count) for kind, track in old.tracks.items()}
    state.feedback_open, state.feedback_count = old.feedback_open, old.feedback_count
    return alerts


def _contradicts_estimate(task: LoadedTask, samples: Sequence[StoredLabel]) -> bool:
    """Return True if the interval of the accuracy excludes that of its estimate."""
    estimate = _estimate_accuracy(task, samples)
    if estimate is None:
        return False
    schema, predictions = build_label_schema(task), to_labelled_predictions(task, samples)
    metrics = [metric.to_dict() for metric in compute_metrics(schema.kind, schema.labels, predictions)]
    measured = next((m for m in metrics if m["metric"] == "accuracy" and "slice" not in m), None)
    if measured is None or measured["low"] is None:
        return False
    return bool(measured["high"] < estimate["low"] or measured["low"] > estimate["high"])


# --- degradation ---


def _evaluate_labels(
    task: LoadedTask, store: Store, state: DegradationState, window: LabelWindow, last_label: int
) -> Iterator[Alert]:
    if not state.is_authenticated and any(sample.by for sample in filter_evaluable(task, window.new_samples)):
        state.require_authenticated()
    new = [sample for sample in window.new_samples if _is_counted(state, sample.source, sample.by)]
    if not new:
        return
    newest = _load_counted(task, store, state, last_label)
    own = sum(sample.source == MODEL for sample in newest)
    if (alert := degradation.check_feedback(state, own, len(newest), _compare_agreement(task, newest))) is not None:
        yield alert
    truth = filter_evaluable(task, new)
    known = [state.first_number] if state.first_number else []
    state.first_number = min([sample.first_number for sample in truth] + known, default=0)
    binary_loss = build_label_schema(task).kind != "regress"
    for event in _detect_degradation(task, store, state, truth, last_label, binary_loss=binary_loss):
        yield degradation.build_alert(event, binary_loss=binary_loss)


def _detect_degradation(
    task: LoadedTask,
    store: Store,
    state: DegradationState,
    new: Sequence[StoredLabel],
    last_label: int,
    *,
    binary_loss: bool,
) -> list[DegradationEvent]:
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    if build_label_schema(task).kind != "classify" or shipped is None or shipped.score_correct is None:
        promise = PromisedAccuracy()
    else:
        n = int(shipped.score_n.sum())
        promise = PromisedAccuracy(float(shipped.score_correct.sum()) / n, n) if n else PromisedAccuracy()
    # Corrections by others, and of verdicts, change no loss.
    if not any(sample.first_number <= state.last_number for sample in new):
        losses = _compute_losses(task, new)
        return degradation.add_losses(state, losses, promise, binary_loss=binary_loss)
    # Not from the window, which may lack the first labels.
    stored = filter_evaluable(task, _load_counted(task, store, state, last_label, is_truth=True))
    samples = sorted(
        (s for s in stored if s.first_number >= state.first_number), key=lambda sample: sample.first_number
    )
    complete = bool(samples) and samples[0].first_number == state.first_number
    losses = _compute_losses(task, samples)
    return degradation.recompute(state, losses, promise, binary_loss=binary_loss, complete=complete)


def _is_counted(state: DegradationState, source: str, by: str, *, is_truth: bool = False) -> bool:
    """Return True if a label may raise or clear an alert; with `is_truth`, if it is ground truth as well."""
    return bool(by or not state.is_authenticated) and not (is_truth and source in NO_TRUTH)


def _load_counted(
    task: LoadedTask, store: Store, state: DegradationState, through: int, *, is_truth: bool = False
) -> list[StoredLabel]:
    """Return the newest valid samples that count, which no flood of other labels pushes out."""
    load = partial(label_store.load_labelled, is_wanted=partial(_is_counted, state, is_truth=is_truth))
    return filter_valid(task, store.query(load, task.name, state.bundle, through, MAX_LABELS_PER_MESSAGE))


def _compute_losses(task: LoadedTask, evaluable: Sequence[StoredLabel]) -> list[LabelledLoss]:
    """Return the losses of samples that `filter_evaluable` returned."""
    if not evaluable:
        return []
    losses = to_labelled_predictions(task, evaluable).losses(build_label_schema(task).kind)
    if losses is None:
        return []
    chances = _estimate_error_chances(task, evaluable)
    return [
        LabelledLoss(loss, chance, sample.prediction.row, sample.prediction.t)
        for loss, chance, sample in zip(losses.tolist(), chances, evaluable, strict=True)
    ]


def _estimate_error_chances(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[float | None]:
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    scores = [sample.prediction.score for sample in samples]
    if shipped is None or shipped.score_correct is None or not len(shipped.score_edges):
        return [None] * len(samples)
    known = np.array([0.0 if score is None else score for score in scores])
    chances = cbpe.correctness_probabilities(shipped.score_n, shipped.score_correct, shipped.score_edges, known)
    return [None if score is None else 1 - float(chance) for score, chance in zip(scores, chances, strict=True)]


# --- samples ---


def filter_valid(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
    """Return the samples whose label the current bundle knows."""
    schema = build_label_schema(task)

    def is_valid(sample: StoredLabel) -> bool:
        try:
            schema.parse(sample.label)
        except ValueError:
            return False
        return True

    return [sample for sample in samples if is_valid(sample)]


def filter_evaluable(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[StoredLabel]:
    """Return the samples with ground truth, whose result is a number."""
    is_classified = build_label_schema(task).kind in ("classify", "several")
    has_scores = any(sample.prediction.score is not None for sample in samples)

    def is_complete(sample: StoredLabel) -> bool:
        if not is_classified:
            return sample.prediction.value is not None
        # A model without any scores is evaluated by its classes alone.
        return sample.prediction.predicted_class is not None and (sample.prediction.score is not None or not has_scores)

    return [sample for sample in samples if sample.source not in NO_TRUTH and is_complete(sample)]


def to_labelled_predictions(task: LoadedTask, samples: Sequence[StoredLabel]) -> LabelledPredictions:
    results, schema = [sample.prediction for sample in samples], build_label_schema(task)
    has_classes = all(result.predicted_class is not None for result in results)
    classes = np.array([result.predicted_class for result in results], np.int64) if has_classes else None
    score = np.array([np.nan if r.score is None else r.score for r in results]) if has_classes else None
    value = None if any(r.value is None for r in results) else np.array([r.value for r in results])
    return LabelledPredictions(np.array([schema.parse(sample.label) for sample in samples]), classes, score, value)


# --- the message ---


def _load_published(task: LoadedTask, store: Store) -> Partitions:
    stored = store.load_state(task.name, task_keys.PUBLISHED_CELLS)
    try:
        return decoders.from_msgpack(stored, Partitions) if stored else {}
    except msgspec.MsgspecError:
        return {}


def _select_cells(task: LoadedTask, window: LabelWindow, published: Partitions, k: int) -> Partitions:
    """Return the cells that the message may show by the least count `k`, with the numbers of their labels."""
    samples = filter_evaluable(task, window.samples)
    numbers = [sample.number for sample in samples]
    cells: Partitions = {_ALL: {_ALL: numbers}}
    schema = build_label_schema(task)
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
    task: LoadedTask, store: Store, max_bytes: int, window: LabelWindow, cells: Partitions
) -> dict[str, Any]:
    """Return the message's members, at most `max_bytes` long with the header."""
    ordered = sorted(window.samples, key=lambda sample: sample.prediction.row)
    evaluable = filter_evaluable(task, ordered)
    rows, times = [sample.prediction.row for sample in ordered], [sample.prediction.t for sample in ordered]
    members: dict[str, Any] = {
        "model": task.bundle_ref,
        "window": {
            "rows": [rows[0], rows[-1]],
            "from": clock.to_rfc3339(min(times)),
            "to": clock.to_rfc3339(max(times)),
            "n": len(evaluable),
            "new": len(window.new_samples),
            "corrected": window.corrected_count,
            "no_result": sum(sample.source not in NO_TRUTH for sample in ordered) - len(evaluable),
        },
        "labels": _describe_labels(task, store, ordered, cells),
        "estimate": _estimate_accuracy(task, evaluable),
    }
    computed = _compute_metrics(task, evaluable)
    shown = {f"{partition}={name}" for partition, selected in cells.items() for name in selected}
    estimates = [metric.to_dict() for metric in computed if not metric.slice or metric.slice in shown]
    members[least_count.WITHHELD] = len(computed) - len(estimates)
    while estimates and len(encode({**members, "metrics": estimates})) > max_bytes - _HEAD_BYTES:
        # Slices and rare classes come last.
        estimates = estimates[: len(estimates) * 3 // 4]
    return {**members, "metrics": estimates}


def _compute_metrics(task: LoadedTask, samples: Sequence[StoredLabel]) -> list[MetricEstimate]:
    if not samples:
        return []
    schema, predictions = build_label_schema(task), to_labelled_predictions(task, samples)
    return [
        *compute_metrics(schema.kind, schema.labels, predictions),
        *slices.compute_slice_metrics(schema.kind, predictions, _group_slices(samples)),
    ]


def _describe_labels(
    task: LoadedTask, store: Store, ordered: Sequence[StoredLabel], cells: Partitions
) -> dict[str, Any]:
    """Return the labels' sources, delay and counts by class, and the share of results that have one."""
    delay = np.array([max(0, sample.received - sample.prediction.t) / 1e6 for sample in ordered])
    rows = (ordered[0].prediction.row, ordered[-1].prediction.row)
    results, counters = store.query(predictions.count_predictions, task.name, *rows), store.counters()
    members: dict[str, Any] = {
        "n": len(ordered),
        "delay_s": {"median": round(float(np.median(delay)), 3), "p90": round(float(np.quantile(delay, 0.9)), 3)},
        "coverage": round(min(1.0, len(ordered) / results), 4) if results else None,
        "sources": count_sources([sample.source for sample in ordered]),
        "authenticated": sum(bool(sample.by) for sample in ordered),
        **{name: counters.get(f"labels {name}.{task.name}", 0) for name in ("replaced", "late", "unmatched")},
    }
    shown = cells.get(_CLASS, {})
    return members | _count_classes(build_label_schema(task), [sample.label for sample in ordered], shown)


def _compare_agreement(task: LoadedTask, samples: Sequence[StoredLabel]) -> Agreement:
    """Count how often people's labels agree with the answers, beside what the scores let expect."""
    schema = build_label_schema(task)
    judged = [s for s in samples if s.source != MODEL and s.prediction.predicted_class is not None]
    chances = _estimate_error_chances(task, judged)
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


def _estimate_accuracy(task: LoadedTask, samples: Sequence[StoredLabel]) -> Mapping[str, Any] | None:
    """Return the accuracy expected without labels (CBPE), and whether the labels' accuracy is outside its interval."""
    shipped = task.drift_monitor.shipped if task.drift_monitor else None
    scores = [sample.prediction.score for sample in samples]
    if shipped is None or shipped.score_correct is None or not samples or any(score is None for score in scores):
        return None
    bins = np.searchsorted(shipped.score_edges, np.array(scores, np.float64), side="right")
    counts = bincount(bins, minlength=len(shipped.score_n))
    estimate = cbpe.estimate_accuracy(shipped.score_n, shipped.score_correct, counts)
    predictions = to_labelled_predictions(task, samples)
    if estimate is None or predictions.predicted is None:
        return None
    accuracy = float(predictions.right.mean())
    return {**estimate, "outside": not estimate["low"] <= accuracy <= estimate["high"]}
