"""One batch of one task: take → features → invoke → judge, and everything decided is committed together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent import __version__, clock, config
from agent.alerts import DAMAGED_ROWS
from agent.clock import ClockReading
from agent.config import StreamConfig
from agent.device.pipeline import columns, drift_state, learned
from agent.device.pipeline.deadline import Deadline
from agent.device.pipeline.drift_state import ClosingMessages
from agent.device.store import task_keys
from agent.device.store.clock_segments import ClockStamp, clip_stamps
from agent.device.store.cost import CostMeter
from agent.device.store.labels import StoredPredictions
from agent.device.store.message_log import MessageLog
from agent.device.store.rows import EMPTY_ROWS, Rows, concatenate
from agent.device.store.store import RowBatch, Store
from agent.device.store.transaction import Transaction
from agent.drift.detectors import modes
from agent.drift.detectors.modes import Modes
from agent.drift.monitor import DriftMonitor
from agent.drift.state import DriftState, DriftWindowResult
from agent.errors import StorageFull
from agent.model.bundle.bundle import Bundle
from agent.model.inference import features, runtime, scores
from agent.model.inference.features import WindowCut
from agent.model.inference.inference import MAX_VALUES, Inference, InferenceResult, RunnableModel
from agent.model.inference.scores import Scores
from agent.model.inference.tuning import Tuning
from agent.performance import slices

# Model windows of a batch: many of them only where they are short, or none was timed yet.
_MAX_WINDOWS, _DEFAULT_WINDOWS, _DEFAULT_ROWS = 4096, 512, 25_600
# What a transaction counts of a result, in its message and for labels, and of each further column there; of a drift
# window by itself, and of each field.
_RESULT_BYTES, _COLUMN_BYTES, _DRIFT_BYTES, _FIELD_BYTES = 200, 40, 2_000, 1_000
# Of a batch's time in the model: far less than the watchdog's minute, on a day when all else is slow, too.
_MAX_INFERENCE_S = 5.0


class BatchObserver(Protocol):
    """Another bundle is tried with the task's batches; called by each of them."""

    def before_commit(self, task: LoadedTask, answers: InferenceResult) -> None:
        """Before the commit of what `task` answered."""

    def save_progress(self, tx: Transaction) -> None:
        """In that commit."""

    def after_commit(self, task: LoadedTask, store: Store, batch: RowBatch, answers: InferenceResult) -> None:
        """After it. Raises StorageError, and nothing for what the other bundle does."""


@dataclass
class LoadedTask:
    """A task with its model loaded. `drift` is the committed state of its judge, `ended` what is to be said first.

    `running` surrounds each run of the model; `suspected`, the agent ended during its last one. Batches have one
    `shrunk`th of the model windows that they could have, after one that there was no room for.
    """

    name: str
    config: config.TaskConfig
    stream: StreamConfig
    bundle: Bundle
    model: RunnableModel
    drift_monitor: DriftMonitor | None
    drift_state: DriftState | None
    config_digest: str
    keep_results: bool = True
    closing_messages: ClosingMessages | None = None
    tuning: Tuning | None = None
    crash_guard: Callable[[], AbstractContextManager[object]] = nullcontext
    is_crash_suspect: bool = False
    batch_observer: BatchObserver | None = None
    input_columns: list[int] = field(init=False)
    inference: Inference = field(init=False)
    cost_meter: CostMeter = field(init=False)
    deadline: Deadline = field(init=False)
    last_label: str = ""
    batch_divisor: int = 1

    def __post_init__(self) -> None:
        self.cost_meter, self.deadline = CostMeter(self.name), Deadline(self.name, self.config.deadline)
        names = [f.name for f in self.stream.fields]
        self.input_columns = [names.index(name) for name in self.bundle.manifest.input.fields]
        made, manifest = self.stream.media_format, self.bundle.manifest
        if made is not None:
            manifest = features.limit_gap(manifest, made.max_row_gap_s)
        self.inference = Inference(manifest, self.model)

    @property
    def step(self) -> int:
        return self.inference.step

    @property
    def window_rows(self) -> int:
        return self.inference.rows

    def max_batch_rows(self, transaction_bytes: int) -> int:
        """The most rows of one batch: one window, and as many more as memory, time and `transaction` bytes allow."""
        in_memory = MAX_VALUES // (self.window_rows * len(self.bundle.manifest.input.columns))
        most_s = min(_MAX_INFERENCE_S, self.deadline.seconds or _MAX_INFERENCE_S)
        in_time = _DEFAULT_WINDOWS if self.tuning is None else int(most_s * self.tuning.rows_per_s)
        many = min(_MAX_WINDOWS, max(_DEFAULT_WINDOWS, _DEFAULT_ROWS // self.step))
        # The other half is for alerts, and for the states of drift and labels.
        written = transaction_bytes // 2 // self._max_window_bytes
        windows = min(many, written, in_memory, in_time, self.deadline.max_windows) // self.batch_divisor
        return self.window_rows + max(0, self._align_to_drift_window(windows) - 1) * self.step

    def _align_to_drift_window(self, windows: int) -> int:
        """At most so many model windows, of which the last one closes a drift window where it can: summarized whole."""
        if self.drift_state is None:
            return windows
        over = (self.drift_state.open_summary.model_windows + windows) % self.drift_state.window
        return windows - over if over < windows else windows

    @property
    def _max_window_bytes(self) -> int:
        """What a model window may come to in one transaction."""
        manifest = self.bundle.manifest
        further = len(manifest.output.labels) if manifest.output.multi_label else len(manifest.output.names)
        drift = (_DRIFT_BYTES + _FIELD_BYTES * len(manifest.input.fields)) // manifest.drift.window
        return _RESULT_BYTES + _COLUMN_BYTES * further + (drift if self.drift_monitor else 0)

    @property
    def bundle_ref(self) -> dict[str, Any]:
        manifest = self.bundle.manifest
        return {"name": manifest.name, "version": manifest.version, "digest": self.bundle.digest}


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one batch did."""

    rows: int
    windows: int
    alerts: int


class _DriftUpdate(msgspec.Struct, frozen=True):
    state: DriftState | None
    verdicts: list[DriftWindowResult]


def run(task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading) -> BatchResult | None:
    """One batch of what waits for `task`; None where nothing can be consumed yet.

    Raises StorageError; then nothing of it happened, or it is only not told that it was late.
    """
    while True:
        most = task.max_batch_rows(store.quota.transaction_bytes)
        # Not the boot-time clock: while the machine sleeps, no batch is late.
        began, began_s = time.thread_time_ns(), time.monotonic()
        try:
            done = _run_once(task, store, message_log, now, most)
        except StorageFull:
            # A full store keeps only so much room back, and readings make way once they were used.
            if most <= task.window_rows:
                raise
            task.batch_divisor *= 4
        else:
            task.batch_divisor = max(1, task.batch_divisor // 2)
            if done is not None:
                task.cost_meter.record_batch(done.windows, done.rows, (time.thread_time_ns() - began) // 1000)
                task.deadline.record_batch(time.monotonic() - began_s, done.windows, store, message_log, now)
            return done


def _run_once(
    task: LoadedTask, store: Store, message_log: MessageLog, now: ClockReading, max_rows: int
) -> BatchResult | None:
    after = store.cursor(task.name)
    if after is None:
        after = store.first_row(task.config.stream) - 1
    batch = store.read_rows(task.config.stream, task.stream.fields, after, max_rows)
    if batch is None:
        return None
    if batch.loss_reason:
        return _skip_lost(task, store, message_log, batch, now)
    cut = features.cut_windows(batch.rows.t, task.inference.manifest.input.window)
    if cut.consumed == 0:
        if not _is_followed_by_lost_rows(task, store, batch):
            return None
        cut = WindowCut(cut.starts, len(batch.rows))
    matrix, answers = _run_inference(task, store, batch, cut)
    if task.batch_observer is not None:
        task.batch_observer.before_commit(task, answers)
    judged = _update_drift(task, store, batch, matrix, answers)
    given = _build_stored_predictions(task, store, batch, answers)
    names = scores.to_texts(answers.scores, task.bundle.manifest)
    with store.transaction() as tx:
        tx.advance_cursor(task.name, batch.first, batch.first + cut.consumed - 1)
        if task.closing_messages is not None:
            drift_state.discard_learned(tx, message_log, task.name, task.closing_messages, now)
        if task.drift_monitor is not None and judged.state is not None:
            drift_state.save(tx, task.name, task.drift_monitor, judged.state, task.drift_state)
        for body in _build_result_bodies(task, message_log, batch, answers, names, tx.segments.last_announced_key()):
            message_log.append(tx, "results", task.name, body, now)
        for verdict in judged.verdicts:
            _write_drift_messages(task, message_log, tx, verdict, now)
        if given is not None:
            tx.labels.store_predictions(task.name, given, tx.uptime_s(now))
        tx.increment_counter(f"windows.{task.name}", len(cut.starts))
        task.cost_meter.write_counters(tx)
        if task.is_crash_suspect:
            tx.delete_state(task.name, task_keys.CRASH_COUNT)
        if task.batch_observer is not None:
            task.batch_observer.save_progress(tx)
    task.cost_meter.confirm_written()
    task.drift_state, task.closing_messages, task.is_crash_suspect = judged.state, None, False
    if names:
        task.last_label = names[-1]
    if task.batch_observer is not None:
        task.batch_observer.after_commit(task, store, batch, answers)
    return BatchResult(cut.consumed, len(cut.starts), sum(len(v.alerts) for v in judged.verdicts))


def _is_followed_by_lost_rows(task: LoadedTask, store: Store, batch: RowBatch) -> bool:
    """Whether the rows after `batch` cannot be read, so that these few will never fill a window."""
    following = store.read_rows(task.config.stream, task.stream.fields, batch.last, 1)
    return following is not None and following.loss_reason is not None


def _run_inference(
    task: LoadedTask, store: Store, batch: RowBatch, cut: WindowCut
) -> tuple[features.Floats, InferenceResult]:
    """The batch's features in physical units (n, F), and what the model says of its windows."""
    past = load_history(task, store, batch.first - 1, task.inference.history_rows)
    matrix = features.stack_columns([batch.rows.columns[i] for i in task.input_columns])
    rows, t = matrix, batch.rows.t
    if len(past):
        earlier = features.stack_columns([past.columns[i] for i in task.input_columns])
        rows, t = np.concatenate([earlier, matrix]), np.concatenate([past.t, t])
    with task.crash_guard():
        return matrix, task.inference.run_windows(rows, t, cut, history_rows=len(past))


def load_history(task: LoadedTask, store: Store, last_row: int, count: int) -> Rows:
    """The `count` rows up to `through`, that features look back at: fewer where they were deleted or cannot be read."""
    at = max(0, last_row - count)
    kept: list[Rows] = []
    while at < last_row:
        found = store.read_rows(task.config.stream, task.stream.fields, at, last_row - at)
        if found is None:
            break
        kept = [] if found.loss_reason else [*kept, found.rows]
        at = found.last
    return concatenate(kept) if kept else EMPTY_ROWS


def _update_drift(
    task: LoadedTask, store: Store, batch: RowBatch, matrix: features.Floats, answers: InferenceResult
) -> _DriftUpdate:
    if task.drift_monitor is None or task.drift_state is None:
        return _DriftUpdate(None, [])
    found, starts = answers.scores, answers.cut.starts
    labels = found.label if found.label is not None else np.zeros(len(starts), np.int64)
    told = found.value if found.score is None else found.score
    certainty = None if told is None else told[:, None].astype(np.float32)
    state, verdicts = task.drift_monitor.process_batch(
        task.drift_state,
        matrix,
        starts,
        task.window_rows,
        labels,
        certainty,
        rows=(batch.first, batch.last),
        t=batch.rows.t,
        modes=_read_modes(task, store, batch, answers.cut),
    )
    return _DriftUpdate(state, verdicts)


def _read_modes(task: LoadedTask, store: Store, batch: RowBatch, cut: WindowCut) -> Modes | None:
    if task.drift_monitor is None or not task.drift_monitor.class_field:
        return None
    codes = batch.rows.columns[[f.name for f in task.stream.fields].index(task.drift_monitor.class_field)]
    return modes.modes_of_windows(
        codes, cut.starts, task.window_rows, store.categories(task.config.stream, task.drift_monitor.class_field)
    )


def _build_result_bodies(
    task: LoadedTask,
    message_log: MessageLog,
    batch: RowBatch,
    answers: InferenceResult,
    labels: list[str] | None,
    announced: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    """Bodies that together cover the consumed rows, each within the broker's limit."""
    cut, found = answers.cut, answers.scores
    ends = cut.starts + task.window_rows - 1
    listed = _select_published(task, found, labels)
    missing = np.where(answers.missing_share > task.bundle.manifest.input.max_missing, answers.missing_share, 0)
    most = columns.max_results(message_log.max_bytes - 2_000 - 1_200, found, labels)
    first_row, count, done = 0, len(cut.starts), 0
    while True:
        stop = min(count, done + most)
        through = cut.consumed if stop == count else int(cut.starts[stop - 1]) + task.step
        picked = np.flatnonzero(listed[done:stop]) + done
        listed_rows = ends[picked] + batch.first
        listing = columns.build(found, labels, missing, picked, listed_rows, batch.rows.t[ends[picked]])
        rows = [batch.first + first_row, batch.first + through - 1]
        body = _build_result_body(task, rows, stop - done, batch.rows.slice(first_row, through), listing)
        if incomplete := int(np.count_nonzero(missing[done:stop])):
            body["incomplete"] = incomplete
        # Where model windows overlap, the last result's row comes after the last row that is used up.
        last = max([rows[1], *listed_rows[-1:].tolist()])
        yield body | _build_clocks(clip_stamps(batch.stamps, rows[0], last), message_log, announced)
        first_row, done = through, stop
        if done == count:
            return


def _build_stored_predictions(
    task: LoadedTask, store: Store, batch: RowBatch, answers: InferenceResult
) -> StoredPredictions | None:
    """The results as they are kept for labels; None where there are none, or none are kept."""
    found = answers.scores
    if not len(found) or not task.keep_results:
        return None
    ends = answers.cut.starts + task.window_rows - 1
    names, said = [f.name for f in task.stream.fields], scores.to_codes(found)
    told: dict[str, list[str]] = {}
    for one in task.config.slices:
        name = one if isinstance(one, str) else one.field
        column = batch.rows.columns[names.index(name)][ends]
        if isinstance(one, str):
            texts = store.categories(task.config.stream, name)
            told[name] = [texts[code] or slices.MISSING for code in column.tolist()]
        else:
            told[name] = slices.name_bins(column.astype(np.float64), one.edges)
    return StoredPredictions(
        task.bundle.digest, ends + batch.first, batch.rows.t[ends], said, found.score, found.value, told
    )


def _build_clocks(stamps: Sequence[ClockStamp], message_log: MessageLog, announced: tuple[int, int]) -> dict[str, Any]:
    """Whose clock the rows have their times from: [first row, boot, segment, quality] of each run of rows.

    Left out where that goes without saying: all synced, in the boot of the message and the segment of the last anchor.
    """
    plain = announced == (message_log.boot, announced[1]) and len(stamps) == 1
    if plain and (stamps[0].boot, stamps[0].segment, stamps[0].quality) == (*announced, 0):
        return {}
    return {"clocks": [[stamp.first, stamp.boot, stamp.segment, stamp.quality] for stamp in stamps]}


def _build_result_body(
    task: LoadedTask, rows: list[int], n: int, consumed: Rows, columns: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": task.bundle_ref,
        "stream": task.config.stream,
        "rows": rows,
        "n": n,
        "input": consumed.digest(),
        "columns": columns,
        "made": {"agent": __version__, "runtime": runtime.RUNTIME_NAME, "config": task.config_digest},
    }


def _select_published(task: LoadedTask, model_scores: Scores, labels: list[str] | None) -> NDArray[np.bool_]:
    """Which results are listed in messages; all are counted."""
    count, publish = len(model_scores), task.config.publish
    if publish == "summary":
        return np.zeros(count, bool)
    if isinstance(publish, config.PublishBelow) and model_scores.score is not None:
        return np.asarray(model_scores.score < publish.below_score)
    if publish == "changes" and labels is not None:
        return np.array([a != b for a, b in zip(labels, [task.last_label, *labels[:-1]], strict=True)], bool)
    return np.ones(count, bool)


def _write_drift_messages(
    task: LoadedTask, message_log: MessageLog, tx: Transaction, verdict: DriftWindowResult, now: ClockReading
) -> None:
    """A closed drift window: its message, then its alerts, which name that message."""
    shipped = task.drift_monitor.shipped.digest if task.drift_monitor else None
    window = {
        "index": verdict.index,
        "rows": list(verdict.rows),
        "from": clock.to_rfc3339(verdict.t[0]),
        "to": clock.to_rfc3339(verdict.t[1]),
        "n": verdict.row_count,
    }
    head = {"model": task.bundle_ref, "reference": {"shipped": shipped, "site": verdict.site_digest}, "window": window}
    seq = message_log.append(tx, "drift", task.name, {**head, **verdict.members}, now)
    for alert in verdict.alerts:
        message_log.append(tx, "alerts", task.name, alert.to_body(task.name, seq=seq), now)
    learned.report_learning(task.name, message_log, tx, verdict, now)


def _skip_lost(
    task: LoadedTask, store: Store, message_log: MessageLog, batch: RowBatch, now: ClockReading
) -> BatchResult:
    """Rows that cannot be read: covered by a run without results; what is damaged is declared and set aside."""
    rows = [batch.first, batch.last]
    empty: dict[str, Any] = {"row": [], "t": []}
    run_without = {**_build_result_body(task, rows, 0, batch.rows, empty), "lost": batch.loss_reason}
    if batch.deleted:
        with store.transaction() as tx:
            tx.advance_cursor(task.name, batch.first, batch.last)
            message_log.append(tx, "results", task.name, run_without, now)
        return BatchResult(batch.last - batch.first + 1, 0, 0)
    summary = (
        f"{task.config.stream}: rows {rows[0]} to {rows[1]} cannot be read back ({batch.loss_reason}); they are set aside in "
        "the store's table `damaged` and have no results. Check the card."
    )
    with store.transaction() as tx:
        tx.advance_cursor(task.name, batch.first, batch.last)
        tx.quarantine_rows(task.config.stream, batch.first, batch.last)
        message_log.append(tx, "results", task.name, run_without, now)
        alert = DAMAGED_ROWS.raised(summary, {"rows": rows}, stream=task.config.stream, row=batch.first)
        message_log.append(tx, "alerts", task.name, alert.to_body(task.name), now)
    return BatchResult(batch.last - batch.first + 1, 0, 1)
