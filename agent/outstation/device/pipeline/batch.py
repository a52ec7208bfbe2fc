"""Batch: one run of a task over the rows that wait for it: read, compute, commit.

A batch reads rows and their history, computes results, drift windows and all messages without touching the store, and
commits cursor, drift state, stored predictions and messages in one transaction. While the model's process computes, the
rows are committed to and measured for drift. During a backlog, it computes the next batch meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from outstation.device.pipeline import batch_messages, drift_state, label_metrics, prepared_batch
from outstation.device.pipeline.batch_messages import RowCommitments
from outstation.device.pipeline.drift_state import LearningRefusals
from outstation.device.pipeline.loaded_task import LoadedTask, StartedBatch
from outstation.device.rules import batch_rules, rule_store
from outstation.device.rules.batch_results import BatchResults
from outstation.device.rules.batch_rules import ResultAlert, RuleContext, TaskRuleStates
from outstation.device.store import task_keys
from outstation.device.store.clock_segments import ClockSegments
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.predictions import StoredPredictions, output_key
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.foundation.arrays import Float32s
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.ml.drift.baseline import modes
from outstation.ml.drift.baseline.modes import Modes
from outstation.ml.drift.batches import MeasuredWindows
from outstation.ml.drift.state import DriftState, DriftWindowResult
from outstation.ml.model.inference import features, scores
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.inference.scores import Labels, Scores
from outstation.ml.performance.expected_error import NO_ERROR_BINS, ErrorBins
from outstation.protocol.alerts.kinds import DAMAGED_ROWS

if TYPE_CHECKING:
    from outstation.device.pipeline.joined_streams import JoinedBatch
    from outstation.device.samples.requests import SampleRequest


class BatchResult(msgspec.Struct, frozen=True):
    """Number of rows consumed, model windows, and alerts of a committed batch."""

    rows: int
    windows: int
    alerts: int


class _BatchInput(msgspec.Struct, frozen=True, eq=False):
    """Everything that a batch reads: `features` (n, F) of its rows in physical units."""

    batch: RowBatch
    cut: WindowCut
    features: Float32s
    modes: Modes | None
    slices: Mapping[str, Sequence[str]]
    commitments: RowCommitments
    measured: MeasuredWindows | None
    current_segment: tuple[int, int] | None
    refusals: LearningRefusals
    rule_states: TaskRuleStates
    contradicted: frozenset[str]
    joined: JoinedBatch | None


class _BatchOutput(msgspec.Struct, frozen=True, eq=False):
    drift: DriftState | None
    refusals: LearningRefusals
    rule_states: TaskRuleStates
    predictions: Mapping[str, StoredPredictions]
    messages: list[PendingMessage]
    last_label: str
    alerts: int
    sample_requests: Sequence[SampleRequest]


def run(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> BatchResult | None:
    """Run one batch of the task's backlog; None if nothing can be consumed yet.

    Raises StorageError. The batch was then rolled back, unless only its lateness could not be recorded.
    """
    task.raise_least_count(message_log)
    while True:
        max_rows = task.max_batch_rows(store.quota.transaction_bytes)
        # The monotonic clock: while the machine sleeps, no batch is late.
        began_s = time.monotonic()
        task.cost_meter.begin_batch(time.thread_time_ns())
        try:
            result = _run_once(task, store, message_log, now, max_rows)
        except StorageFull:
            # A full store holds back a limited reserve, and used readings make way: a smaller batch may fit.
            if max_rows <= task.window_rows:
                raise
            task.shrink_batches()
        else:
            task.batch_divisor = max(1, task.batch_divisor // 2)
            if result is not None:
                task.cost_meter.end_batch(time.thread_time_ns())
                task.deadline.record_batch(time.monotonic() - began_s, result.windows, store, message_log, now)
            return result


def _run_once(
    task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, max_rows: int
) -> BatchResult | None:
    cursor = store.cursor(task.name)
    after = store.first_row(task.config.stream) - 1 if cursor is None else cursor
    started = prepared_batch.take_started(task, store, after, max_rows)
    if started is None:
        batch = prepared_batch.read_backlog(task, store, after, max_rows)
        if batch is None:
            return None
        if batch.loss_reason:
            return _skip_lost(task, store, message_log, batch, now)
        cut = features.cut_windows(batch.t, task.inference.manifest.input.window)
        joined: JoinedBatch | None = None
        if task.joined_reader is not None:
            joined = task.joined_reader.join(store, cut, batch.t, batch.first, now)
            if joined.cut.consumed == 0 and len(cut.starts):
                task.joined_reader.save_wait(store)
                return None
            joined = task.joined_reader.commit(store, message_log, joined)
            cut = joined.cut
        if cut.consumed == 0:
            following = store.read_rows(task.config.stream, task.stream.fields, batch.last, 1)
            if following is None or following.loss_reason is None:
                return None
            # The rows after these cannot be read, so these will never fill a window.
            cut = WindowCut(cut.starts, len(batch.t), cut.joined)
        started = msgspec.structs.replace(prepared_batch.prepare(task, store, batch, cut).start(task), joined=joined)
    following_batch = prepared_batch.prepare_next(task, store, started, max_rows)
    commitments, measured = _commit_rows(task, store, message_log, started), _measure(task, started)
    with task.crash_guard():
        results = task.inference.finish(started.run, started.cut)
    if following_batch is not None:
        task.started = following_batch.start(task)
    batch, cut = started.batch, started.cut
    source = _read(task, store, message_log, started, commitments, measured)
    if task.batch_observer is not None:
        task.batch_observer.before_commit(task, results)
    output = _compute(task, source, results, message_log)
    _commit(task, store, message_log, source, output, now)
    if task.batch_observer is not None:
        task.batch_observer.after_commit(task, store, batch, results)
    return BatchResult(cut.consumed, len(cut.starts), output.alerts)


# --- read ---


def _commit_rows(task: LoadedTask, store: Store, message_log: MessageLog, started: StartedBatch) -> RowCommitments:
    """Commit to the rows of the batch while the model computes, if their results will probably fit into one message."""
    stream = task.config.stream
    texts = {f.name: store.categories(stream, f.name) for f in task.stream.fields if f.type == "category"}
    commitments = RowCommitments(task, started.batch, texts, message_log)
    if len(started.cut.starts) <= task.results_per_message:
        commitments.commit(0, started.cut.consumed)
    return commitments


def _measure(task: LoadedTask, started: StartedBatch) -> MeasuredWindows | None:
    """Measure the drift windows of the batch while the model computes."""
    if task.drift_monitor is None or task.drift_state is None:
        return None
    batch = started.batch
    return task.drift_monitor.measure_batch(
        task.drift_state, started.features, started.cut.starts, first_row=batch.first, t=batch.t
    )


def _read(
    task: LoadedTask,
    store: Store,
    message_log: MessageLog,
    started: StartedBatch,
    commitments: RowCommitments,
    measured: MeasuredWindows | None,
) -> _BatchInput:
    batch, cut = started.batch, started.cut
    announced = store.query(lambda db: ClockSegments(db, store.boot).last_announced_key())
    state = task.drift_state
    is_learning = state is not None and (state.site_reference is None or state.is_inherited)
    return _BatchInput(
        batch,
        cut,
        started.features,
        _read_modes(task, store, batch, cut),
        _read_slices(task, store, batch, cut) if task.keep_results else {},
        commitments,
        measured,
        announced if announced[0] == message_log.boot else None,
        drift_state.load_refusals(store, task.name) if is_learning else LearningRefusals(),
        rule_store.load(store, task.name) if task.rules else TaskRuleStates(),
        frozenset() if state is None else label_metrics.list_contradicted(task, store),
        started.joined,
    )


def _read_modes(task: LoadedTask, store: Store, batch: RowBatch, cut: WindowCut) -> Modes | None:
    if task.drift_monitor is None or not task.drift_monitor.settings.class_field:
        return None
    codes = batch.column([f.name for f in task.stream.fields].index(task.drift_monitor.settings.class_field))
    texts = store.categories(task.config.stream, task.drift_monitor.settings.class_field)
    return modes.modes_of_windows(codes, cut.starts, task.window_rows, texts)


def _read_slices(task: LoadedTask, store: Store, batch: RowBatch, cut: WindowCut) -> dict[str, Sequence[str]]:
    """Return the slice that each model window belongs to, by the slice's name."""
    if not task.config.slices:
        return {}
    from outstation.ml.performance import slices

    names, ends = [f.name for f in task.stream.fields], cut.starts + task.window_rows - 1
    by_name: dict[str, Sequence[str]] = {}
    for slicing in task.config.slices:
        name = slicing if isinstance(slicing, str) else slicing.field
        column = batch.column(names.index(name))[ends]
        if isinstance(slicing, str):
            texts = store.categories(task.config.stream, name)
            by_name[name] = [texts[code] or slices.MISSING for code in column.tolist()]
        else:
            by_name[name] = slices.name_bins(column.astype(np.float64), slicing.edges)
    return by_name


# --- compute ---


def _compute(task: LoadedTask, source: _BatchInput, results: InferenceResult, message_log: MessageLog) -> _BatchOutput:
    error_bins = _allocate_error_bins(task, len(source.cut.starts))
    drift, windows = _update_drift(task, source, results, error_bins)
    labels = scores.to_labels(results.scores, task.bundle.manifest)
    rule_states, result_alerts = _evaluate_rules(task, source, results, labels, windows, message_log)
    messages = list(task.closing_messages or ())
    messages += [PendingMessage.from_alert(change.alert, task.name) for change in result_alerts if change.index < 0]
    messages += batch_messages.build_result_messages(
        task,
        source.batch,
        results,
        labels,
        source.commitments,
        message_log,
        source.current_segment,
        batch_messages.find_faulty_fields((task.drift_state, drift), windows),
        [change for change in result_alerts if change.index >= 0],
        source.joined.rows if source.joined is not None else {},
    )
    drift_messages, refusals = batch_messages.build_drift_messages(task, windows, source.refusals, source.contradicted)
    return _BatchOutput(
        drift,
        refusals,
        rule_states,
        _build_predictions(task, source, results.scores, error_bins),
        messages + drift_messages,
        task.last_label if labels is None or not len(labels.codes) else labels.texts[labels.codes[-1]],
        sum(len(window.alerts) for window in windows) + len(result_alerts),
        _select_samples(task, source, results, windows, result_alerts, message_log),
    )


def _build_predictions(
    task: LoadedTask, source: _BatchInput, model_scores: Scores, error_bins: ErrorBins
) -> dict[str, StoredPredictions]:
    """Return the predictions to store for labels, by output; the first output has the name ""."""
    if not len(model_scores) or not task.keep_results:
        return {}
    ends = source.cut.starts + task.window_rows - 1
    rows, t = ends + source.batch.first, source.batch.t[ends]
    joined = {} if source.joined is None or task.joined_reader is None else task.joined_reader.last_rows(source.joined)
    outputs = {"": model_scores, **model_scores.outputs}
    return {
        name: StoredPredictions(
            *(task.bundle.digest, rows, t, scores.to_codes(output), output.score, output.value, source.slices),
            joined={} if name else joined,
            expected_bin=error_bins.get(name),
        )
        for name, output in outputs.items()
    }


def _allocate_error_bins(task: LoadedTask, windows: int) -> ErrorBins:
    """Return empty bins of the answers: an expected error follows from inputs, which are gone when labels arrive."""
    if task.drift_monitor is None or task.drift_state is None:
        return NO_ERROR_BINS
    return {name: np.zeros(windows, np.uint8) for name in task.drift_monitor.shipped.error_references}


def _select_samples(
    task: LoadedTask,
    source: _BatchInput,
    results: InferenceResult,
    windows: Sequence[DriftWindowResult],
    result_alerts: Sequence[ResultAlert],
    message_log: MessageLog,
) -> Sequence[SampleRequest]:
    if task.samples is None or not len(results.scores):
        return ()
    ends = source.cut.starts + task.window_rows - 1 + source.batch.first
    alerts = [(int(c.alert.evidence["row"]), c.alert) for c in result_alerts if c.alert.state == "raised"]
    # Around the last result of a drift window.
    last_results = np.searchsorted(ends, [window.rows[1] for window in windows], side="right") - 1
    for index, window in zip(last_results.tolist(), windows, strict=True):
        alerts += [(int(ends[max(0, index)]), alert) for alert in window.alerts if alert.state == "raised"]
    subjects = [(row, f"{task.name}/{alert.id}") for row, alert in alerts]
    return task.samples.select(ends, results.scores.score, subjects, message_log.least_count(task.name))


def _evaluate_rules(
    task: LoadedTask,
    source: _BatchInput,
    results: InferenceResult,
    labels: Labels | None,
    windows: list[DriftWindowResult],
    message_log: MessageLog,
) -> tuple[TaskRuleStates, list[ResultAlert]]:
    if not task.rules or not len(results.scores):
        return source.rule_states, []
    ends = source.cut.starts + task.window_rows - 1
    is_complete = results.missing_share <= task.bundle.manifest.input.max_missing
    t = source.batch.t[ends]
    texts = None if labels is None else labels.to_list()
    batch = BatchResults(results.scores, texts, ends + source.batch.first, t, is_complete)
    context = RuleContext(message_log.device, task.name, task.bundle.digest, task.drift_state, windows)
    return batch_rules.evaluate(task.rules, source.rule_states, context, batch)


def _update_drift(
    task: LoadedTask, source: _BatchInput, results: InferenceResult, error_bins: ErrorBins
) -> tuple[DriftState | None, list[DriftWindowResult]]:
    if task.drift_monitor is None or task.drift_state is None:
        return None, []
    model_scores, starts, batch = results.scores, source.cut.starts, source.batch
    labels = model_scores.label if model_scores.label is not None else np.zeros(len(starts), np.int64)
    certainty = model_scores.value if model_scores.score is None else model_scores.score
    return task.drift_monitor.process_batch(
        task.drift_state,
        source.features,
        starts,
        task.window_rows,
        labels,
        None if certainty is None else certainty[:, None].astype(np.float32),
        rows=(batch.first, batch.last),
        t=batch.t,
        modes=source.modes,
        answers=model_scores.further_answers if task.drift_monitor.shipped.further else None,
        error_bins=error_bins,
        measured=source.measured,
    )


# --- commit ---


def _commit(
    task: LoadedTask,
    store: Store,
    message_log: MessageLog,
    source: _BatchInput,
    output: _BatchOutput,
    now: ClockReading,
) -> None:
    with store.transaction(batch=True) as tx:
        tx.advance_cursor(task.name, source.batch.first, source.batch.first + source.cut.consumed - 1)
        if task.drift_monitor is not None and output.drift is not None:
            drift_state.save_task(tx, task, output.drift)
        if output.refusals != source.refusals:
            drift_state.save_refusals(tx, task.name, output.refusals)
        if output.rule_states is not source.rule_states:
            rule_store.save(tx, task.name, output.rule_states)
        unspent_bytes = tx.remaining_bytes
        message_log.append_all(tx, output.messages, now)
        for name, predictions in output.predictions.items():
            tx.labels.store_predictions(output_key(task.name, name), predictions, tx.uptime_s(now))
        spent_bytes = unspent_bytes - tx.remaining_bytes
        tx.increment_counter(f"windows.{task.name}", len(source.cut.starts))
        if output.sample_requests:
            from outstation.device.samples import requests

            requests.add(tx, task.name, output.sample_requests)
        task.cost_meter.write_counters(tx, len(source.cut.starts), source.cut.consumed, time.thread_time_ns())
        if task.joined_reader is not None and source.joined is not None:
            task.joined_reader.save(tx, source.joined)
        if task.is_crash_suspect:
            tx.delete_state(task.name, task_keys.CRASH_COUNT)
        if task.batch_observer is not None:
            task.batch_observer.save_progress(tx)
    task.cost_meter.confirm_written()
    if task.joined_reader is not None and source.joined is not None:
        task.joined_reader.confirm(source.joined)
    task.record_transaction(len(source.cut.starts), spent_bytes)
    task.drift_state, task.closing_messages, task.is_crash_suspect = output.drift, None, False
    task.unsaved_basis = None
    task.last_label = output.last_label


def _skip_lost(
    task: LoadedTask, store: Store, message_log: MessageLog, batch: RowBatch, now: ClockReading
) -> BatchResult:
    """Cover rows that cannot be read by a message without results; quarantine damaged ones and raise an alert."""
    messages, stream = [batch_messages.build_lost_message(task, batch)], task.config.stream
    if not batch.deleted:
        summary = (
            f"{stream}: rows {batch.first} to {batch.last} cannot be read back ({batch.loss_reason}); they are kept in "
            "the store's table `quarantined_rows` and have no results. Check the card."
        )
        alert = DAMAGED_ROWS.raised(summary, {"rows": [batch.first, batch.last]}, stream=stream, row=batch.first)
        messages.append(PendingMessage.from_alert(alert, task.name))
    with store.transaction(batch=True) as tx:
        tx.advance_cursor(task.name, batch.first, batch.last)
        if not batch.deleted:
            tx.quarantine_rows(stream, batch.first, batch.last)
        message_log.append_all(tx, messages, now)
    return BatchResult(batch.last - batch.first + 1, 0, len(messages) - 1)
