"""Batch: one run of a task over the rows that wait for it: read, compute, commit.

A batch reads rows and their history, computes results and all messages without touching the store, and commits them
with the cursor in one transaction. Its parts (`outstation.device.batch_parts`) do the same for drift, rules, labels and
the rest; the batch knows none of them. While the model's process computes, the parts read. During a backlog, that
process computes the next batch meanwhile.
"""

from __future__ import annotations

import time

import msgspec

from outstation.device.batch_parts.batch_part import Batch, BatchStart
from outstation.device.batch_parts.result_part import build_lost_message
from outstation.device.pipeline import prepared_batch
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import StorageFull
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import InferenceResult
from outstation.protocol.alerts.kinds import DAMAGED_ROWS


class BatchResult(msgspec.Struct, frozen=True):
    """Number of rows consumed, model windows, and alerts of a committed batch."""

    rows: int
    windows: int
    alerts: int


def run(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> BatchResult | None:
    """Run one batch of the task's backlog; None if nothing can be consumed yet.

    Raises StorageError. The batch was then rolled back, unless only the work that follows its commit failed.
    """
    task.raise_least_count(message_log)
    while True:
        max_rows = task.size.max_rows(store.quota.transaction_bytes)
        try:
            result = _run_once(task, store, message_log, now, max_rows)
        except StorageFull:
            # A full store holds back a limited reserve, and used readings make way: a smaller batch may fit.
            if max_rows <= task.window_rows:
                raise
            task.size.shrink()
        else:
            task.size.recover()
            return result


def _run_once(
    task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, max_rows: int
) -> BatchResult | None:
    start = BatchStart(time.monotonic(), time.thread_time_ns())
    started = prepared_batch.start_next(task, store, message_log, now, max_rows)
    if started is None:
        return None
    if isinstance(started, RowBatch):
        return _skip_lost(task, store, message_log, started, now)
    following = prepared_batch.prepare_next(task, store, started, max_rows)
    rows, cut = started.rows, started.cut
    ends = cut.starts + task.window_rows - 1
    batch = Batch(task, store, message_log, now, start, rows, cut, ends, started.features)
    for part in task.parts:
        part.read(batch)
    with task.crash.guard():
        results = task.inference.finish(started.run, cut)
    if following is not None:
        task.lookahead.started = following.start(task)
    _compute_and_commit(task, batch, results)
    alerts = sum(len(window.alerts) for window in batch.drift_windows) + len(batch.result_alerts)
    return BatchResult(cut.consumed, len(cut.starts), alerts)


def _compute_and_commit(task: LoadedTask, batch: Batch, results: InferenceResult) -> None:
    batch.labels, messages = scores.to_labels(results.scores, task.bundle.manifest), list[PendingMessage]()
    for part in task.parts:
        messages += part.compute(batch, results)
    windows, consumed = len(batch.ends), batch.cut.consumed
    with batch.store.transaction(batch=True) as tx:
        tx.advance_cursor(task.name, batch.rows.first, batch.rows.first + consumed - 1)
        tx.increment_counter(f"windows.{task.name}", windows)
        unspent_bytes = tx.remaining_bytes
        batch.message_log.append_all(tx, messages, batch.now)
        batch.spent_bytes = unspent_bytes - tx.remaining_bytes
        for part in task.parts:
            part.save(tx, batch)
    for part in task.parts:
        part.confirm(batch)
    for part in task.parts:
        part.follow(batch, results)


def _skip_lost(
    task: LoadedTask, store: Store, message_log: MessageLog, rows: RowBatch, now: ClockReading
) -> BatchResult:
    """Cover rows that cannot be read by a message without results; quarantine damaged ones and raise an alert."""
    messages, stream = [build_lost_message(task, rows)], task.config.stream
    if not rows.deleted:
        summary = (
            f"{stream}: rows {rows.first} to {rows.last} cannot be read back ({rows.loss_reason}); they are kept in "
            "the store's table `quarantined_rows` and have no results. Check the card."
        )
        alert = DAMAGED_ROWS.raised(summary, {"rows": [rows.first, rows.last]}, stream=stream, row=rows.first)
        messages.append(PendingMessage.from_alert(alert, task.name))
    with store.transaction(batch=True) as tx:
        tx.advance_cursor(task.name, rows.first, rows.last)
        if not rows.deleted:
            tx.quarantine_rows(stream, rows.first, rows.last)
        message_log.append_all(tx, messages, now)
    return BatchResult(rows.last - rows.first + 1, 0, len(messages) - 1)
