"""Prepared batch: rows of a task's backlog with the features and the model's windows, before the model computes."""

from __future__ import annotations

import os

import msgspec
import numpy as np

from outstation.device.machine import heap
from outstation.device.pipeline.loaded_task import LoadedTask, StartedBatch
from outstation.device.store.message_log import MessageLog
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import EMPTY_ROWS, Rows, concatenate
from outstation.device.store.store import Store
from outstation.foundation.arrays import Float32s
from outstation.foundation.clock import ClockReading
from outstation.ml.model.inference import features
from outstation.ml.model.inference.features import WindowCut
from outstation.ml.model.inference.model_windows import ModelWindows

# A batch takes so large a share of its rows more with it, if then none wait.
_REST_DIVISOR = 16


class PreparedBatch(msgspec.Struct, frozen=True, eq=False):
    rows: RowBatch
    cut: WindowCut
    features: Float32s
    windows: ModelWindows

    def start(self, task: LoadedTask) -> StartedBatch:
        """Let the model begin to compute the batch."""
        with task.crash.guard():
            return StartedBatch(self.rows, self.cut, self.features, task.inference.start(self.windows))


def start_next(
    task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, max_rows: int
) -> StartedBatch | RowBatch | None:
    """Start the batch of the next rows that wait, or return rows that cannot be read; None if rows are to come."""
    after, oldest = store.position(task.name, task.config.stream), store.first_row(task.config.stream)
    started = take_started(task, after, oldest, max_rows)
    if started is not None:
        return started
    rows = read_backlog(task, store, after, max_rows)
    return rows if rows is None or rows.loss_reason else _start(task, store, message_log, rows, now)


def _start(
    task: LoadedTask, store: Store, message_log: MessageLog, rows: RowBatch, now: ClockReading
) -> StartedBatch | None:
    """Give the windows of the rows to the model; None if the rows have to wait for others."""
    cut: WindowCut | None = features.cut_windows(rows.t, task.inference.manifest.input.window)
    if task.joined is not None and cut is not None:
        cut = task.joined.join(store, message_log, cut, rows, now)
    if cut is None:
        return None
    if cut.consumed == 0:
        following = store.read_rows(task.config.stream, task.stream.fields, rows.last, 1)
        if following is None or following.loss_reason is None:
            return None
        # The rows after these cannot be read, so these will never fill a window.
        cut = WindowCut(cut.starts, len(rows.t), cut.joined)
    return prepare(task, store, rows, cut).start(task)


def prepare(task: LoadedTask, store: Store, batch: RowBatch, cut: WindowCut) -> PreparedBatch:
    """Build the features and the model's windows of a batch."""
    values = features.stack_parts([[part.columns[i] for i in task.input_columns] for part in batch.parts])
    history = load_history(task, store, batch.first - 1, task.inference.history_rows)
    rows, t = values, batch.t
    if len(history):
        earlier = features.stack_columns([history.columns[i] for i in task.input_columns])
        rows, t = np.concatenate([earlier, rows]), np.concatenate([history.t, t])
    return PreparedBatch(batch, cut, values, task.inference.prepare(rows, t, cut, history_rows=len(history)))


def prepare_next(task: LoadedTask, store: Store, current: StartedBatch, max_rows: int) -> PreparedBatch | None:
    """Prepare the batch after `current` while the model computes that one; None if it has to wait for its turn."""
    # A batch that joins streams waits for their rows.
    is_backlog = task.lookahead.is_allowed and len(current.rows.t) >= max_rows and task.joined is None
    if not (is_backlog and task.model.is_concurrent and len(os.sched_getaffinity(0)) > 1):
        return None
    limit = task.size.max_rows(store.quota.transaction_bytes, windows_ahead=len(current.cut.starts))
    after = current.rows.first + current.cut.consumed - 1
    batch = read_backlog(task, store, after, limit)
    if batch is None or batch.loss_reason:
        return None
    cut = features.cut_windows(batch.t, task.inference.manifest.input.window)
    return prepare(task, store, batch, cut) if cut.consumed else None


def read_backlog(task: LoadedTask, store: Store, after: int, max_rows: int) -> RowBatch | None:
    """Read the `max_rows` rows after row `after`, and the others that wait if these are few."""
    waiting = store.last_row(task.config.stream) - after
    if waiting >= max_rows:
        heap.keep_free()
    limit = waiting if max_rows < waiting <= _with_rest(max_rows) else max_rows
    return store.read_rows(task.config.stream, task.stream.fields, after, limit)


def _with_rest(max_rows: int) -> int:
    """Return the rows of a batch that leaves no few rows behind: a small batch costs several times as much a row."""
    return max_rows + max_rows // _REST_DIVISOR


def take_started(task: LoadedTask, after: int, oldest: int, max_rows: int) -> StartedBatch | None:
    """Return the started batch if it follows row `after` and has at most `max_rows`, none of them before `oldest`."""
    started, task.lookahead.started = task.lookahead.started, None
    if started is None or started.rows.first != after + 1 or len(started.rows.t) > _with_rest(max_rows):
        return None
    # Evicted rows are declared as lost, and the end of the model's process was not caused by the batch.
    is_lost = oldest > after + 1 or started.run.run.failure is not None
    return None if is_lost else started


def load_history(task: LoadedTask, store: Store, last_row: int, count: int) -> Rows:
    """Return the `count` rows up to `last_row`, for features that look back; fewer if some are deleted or damaged."""
    at = max(0, last_row - count)
    pieces: list[Rows] = []
    while at < last_row:
        piece = store.read_rows(task.config.stream, task.stream.fields, at, last_row - at)
        if piece is None:
            break
        pieces = [] if piece.loss_reason else [*pieces, piece.rows]
        at = piece.last
    return concatenate(pieces) if pieces else EMPTY_ROWS
