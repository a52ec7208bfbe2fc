"""Shadow evaluation: run a second bundle on each committed batch, without delaying results.

Comparison statistics accumulate. Every few batches or minutes they are sent as a `shadow` message, in one commit with
the saved state. A kill loses the statistics since the last message. The last counted row is saved; no row
counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rollout import shadow_windows
from outstation.device.rollout.shadow_windows import AlignedWindows
from outstation.device.store import label_store, task_keys
from outstation.device.store.message_log import MessageLog
from outstation.device.store.predictions import StoredPredictions, output_key, shadow_key
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.store import Store
from outstation.foundation import decoders
from outstation.foundation.arrays import Float32s
from outstation.foundation.clock import ClockReading
from outstation.foundation.errors import BadBundle, StorageBusy, StorageError, StorageFull
from outstation.ml.comparison import tally
from outstation.ml.comparison.paired_intervals import ComparisonBlock
from outstation.ml.comparison.tally import ComparisonStats, OutputKind, Predictions
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.model import activation
from outstation.ml.model.inference import scores
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.sandbox.subprocess_model import ModelRequest, SubprocessModel
from outstation.protocol.wire.jws import encode

log = logging.getLogger("outstation")

# The longest time between messages; the longest time that a batch waits for the previous answer of the shadow.
REPORT_INTERVAL_S, ANSWER_TIMEOUT_S = 300.0, 0.25
# Inference time per batch of a shadow that runs in this process, and delays the next batch.
_MAX_INFERENCE_S = 1.0
_FULL_RETRY_S = 60.0
# The first messages are small, so that a roll-out is soon judged by a few blocks; later ones are larger.
_EARLY_MESSAGES, _LATER_BATCHES, _MIN_MESSAGES = 24, 20, 12
_MAX_BLOCKS = 64
# Members that the log adds, topic and signature.
_HEAD_BYTES = 1_000
# Predictions that wait to be stored while the store is full.
_MAX_UNSAVED_PREDICTIONS = 20_000


class ShadowState(msgspec.Struct, frozen=True):
    """Saved state of one roll-out and pair of bundles: last row and label counted, messages sent, their statistics."""

    rollout: str
    task_digest: str
    other_digest: str
    last_labels: dict[str, int]  # of each output
    last_row: int = 0
    message_count: int = 0
    blocks: list[ComparisonStats] = []


class _PendingBatch(msgspec.Struct, frozen=True):
    """A batch that the shadow works on: its rows, the predictions of `task`, the shadow's windows and its request."""

    rows: tuple[int, int]
    predictions: Predictions
    windows: AlignedWindows
    request: ModelRequest | None = None  # None if the shadow runs in this process


class ShadowRunner:
    """Shadow evaluation of `other` on the batches of `task`. Used by the main loop.

    A shadow in a process of its own delays a batch by ANSWER_TIMEOUT_S at most; batches that arrive while it is busy
    are not compared. A shadow in this process answers at once.
    """

    def __init__(self, task: LoadedTask, other: LoadedTask, rollout: str, store: Store, min_batches: int = 20) -> None:
        """Continue from the saved state. `min_batches` are compared before any rule is evaluated."""
        self.task, self.other = task, other
        self.state = _restore_state(store, task, other, rollout)
        self._min_batches = min_batches
        self._bases = shadow_windows.select_estimate_bases([_load_reference(task), _load_reference(other)])
        self._pending: _PendingBatch | None = None
        self._retry_at_s = 0.0
        # Labels that did not fit into the last message.
        self._has_more_labels = False
        self._last_report_s: float | None = None
        self.stats, self._row_range = ComparisonStats(), (0, 0)
        self._unsaved_predictions: list[dict[str, StoredPredictions]] = []

    @property
    def blocks(self) -> list[ComparisonBlock]:
        """One block for each message so far, oldest first, as rules take them."""
        return [ComparisonBlock(stats) for stats in self.state.blocks]

    def submit_batch(self, store: Store, batch: RowBatch, answers: InferenceResult) -> None:
        """Compare a batch that `task` answered and committed. Raises StorageError only."""
        last = batch.first + answers.cut.consumed - 1
        if last <= max(self.state.last_row, self._row_range[1]) or not len(answers.cut.starts):
            return
        self._run_guarded(lambda: self._submit(store, batch, answers, (batch.first, last)))

    def tick(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Poll the shadow and report if due; return True if a message was written. Raises StorageError."""
        self.poll()
        if self._last_report_s is None:
            self._last_report_s = now.boot_s
        # A message about fewer windows than the least count would say nothing.
        has_enough = not 0 < self.stats.n < message_log.least_count(self.task.name)
        is_due = has_enough and self.stats.batches >= batches_per_message(self.state.message_count, self._min_batches)
        is_late = self._has_more_labels or now.boot_s >= self._last_report_s + REPORT_INTERVAL_S
        if now.boot_s < self._retry_at_s or not (is_due or is_late):
            return False
        return self._try_report(store, message_log, now)

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Collect a pending answer; return True if none is pending any more."""
        self._run_guarded(lambda: self._poll(timeout_s))
        return self._pending is None

    def report(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Report now; return True if there was anything. Raises StorageError, StorageFull."""
        return self._report(store, message_log, now, final=False)

    def finish(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool = False) -> bool:
        """Report the rest when the daemon stops, or at the end of the comparison (`final`). Raises StorageError."""
        self.poll(ANSWER_TIMEOUT_S)
        self._pending = None
        return self._try_report(store, message_log, now, final=final)

    # --- one batch ---

    def _submit(self, store: Store, batch: RowBatch, answers: InferenceResult, rows: tuple[int, int]) -> None:
        model, ends = self.other.model, answers.cut.starts + self.task.window_rows - 1
        if isinstance(model, SubprocessModel):
            self._poll(ANSWER_TIMEOUT_S)
            if self._pending is not None or not model.poll_ready(ANSWER_TIMEOUT_S):
                return
        windows = shadow_windows.align_windows(self.other, store, batch, ends[: self._max_windows()])
        errors = shadow_windows.expect_own_errors(self.task, store, batch, ends, answers.scores, self._bases[0])
        predictions = shadow_windows.build_predictions(
            batch.first + ends, answers.scores, answers.seconds, self._bases[0], errors
        )
        pending = _PendingBatch(rows, predictions, windows)
        if isinstance(model, SubprocessModel):
            self._pending = replace(pending, request=model.submit(windows.model_input))
            # Usually the answer takes milliseconds.
            self._poll(0.0)
            return
        start_s = model.seconds
        with self.other.crash.guard():
            outputs = model.invoke(windows.model_input)
        self._add_predictions(pending, outputs, model.seconds - start_s)

    def _max_windows(self) -> int | None:
        """Return the limit of windows per batch; None for a model that no batch waits for."""
        tuning = self.other.tuning
        if isinstance(self.other.model, SubprocessModel) or tuning is None:
            return None
        return max(1, int(tuning.rows_per_s * _MAX_INFERENCE_S))

    def _poll(self, timeout_s: float) -> None:
        model, pending = self.other.model, self._pending
        if not isinstance(model, SubprocessModel) or pending is None or pending.request is None:
            return
        if (outputs := model.poll(pending.request, timeout_s)) is not None:
            self._pending = None
            self._add_predictions(pending, outputs, pending.request.seconds)

    def _add_predictions(self, pending: _PendingBatch, outputs: Float32s, seconds: float) -> None:
        manifest = self.other.bundle.manifest
        other_scores = scores.from_outputs(outputs, manifest, pending.windows.values)
        basis = self._bases[1]
        errors = basis.expect_errors(pending.windows.rows, pending.windows.starts, other_scores)
        predictions = shadow_windows.build_predictions(pending.windows.row, other_scores, seconds, basis, errors)
        kind = OutputKind.from_schemas(self.task.bundle.manifest.label_schemas)
        other_kind = OutputKind.from_schemas(manifest.label_schemas)
        self._add_stats(tally.compare_batch(kind, pending.predictions, other_kind, predictions), pending.rows)
        if self.task.keep_results and len(other_scores):
            self._unsaved_predictions.append(
                shadow_windows.build_stored_predictions(self.other.bundle.digest, pending.windows, other_scores)
            )
            while sum(len(part[""].row) for part in self._unsaved_predictions) > _MAX_UNSAVED_PREDICTIONS:
                del self._unsaved_predictions[0]

    def _run_guarded(self, action: Callable[[], None]) -> None:
        """Count any failure of the shadow; only StorageError propagates."""
        try:
            action()
        except StorageError:
            raise
        except Exception as error:
            if not isinstance(error, BadBundle):
                log.exception("task %s: shadow %s", self.task.name, self.other.bundle.manifest.name)
            rows = self._pending.rows if self._pending is not None else None
            self._pending = None
            self._add_stats(tally.from_failure(str(error) or type(error).__name__), rows)

    def _add_stats(self, stats: ComparisonStats, rows: tuple[int, int] | None) -> None:
        self.stats += stats
        if rows is not None:
            self._row_range = (self._row_range[0] or rows[0], max(self._row_range[1], rows[1]))

    # --- one message ---

    def _try_report(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool = False) -> bool:
        try:
            return self._report(store, message_log, now, final=final)
        except (StorageFull, StorageBusy) as problem:
            log.error("task %s: %s; the comparison is reported later", self.task.name, problem)
            self._retry_at_s = now.boot_s + _FULL_RETRY_S
            return False

    def _report(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool) -> bool:
        self._last_report_s = now.boot_s
        name, old = self.task.name, self.state
        waiting = shadow_windows.count_waiting_labels(store, self.task, old.last_labels)
        self._has_more_labels = any(count > shadow_windows.MAX_LABELS for count in waiting.values())
        # So few labels wait for more.
        least = 1 if final else max(1, message_log.least_count(name))
        ready = {output: old.last_labels.get(output, 0) for output, count in waiting.items() if count >= least}
        if not self.stats.batches and not ready:
            return False
        with store.transaction() as tx:
            if self._unsaved_predictions:
                for output in self._unsaved_predictions[0]:
                    parts = [part[output] for part in self._unsaved_predictions]
                    predictions = shadow_windows.concatenate_stored(parts)
                    tx.labels.store_predictions(shadow_key(name, output), predictions, tx.uptime_s(now))
            outcomes, last_labels = shadow_windows.count_outcomes(tx, self.task, self.other, ready)
            block = self.stats + outcomes
            has_message = block != ComparisonStats()
            blocks = merge_neighbours([*old.blocks, block]) if has_message else old.blocks
            row = max(old.last_row, self._row_range[1])
            state = replace(
                old,
                last_labels=old.last_labels | last_labels,
                last_row=row,
                message_count=old.message_count + has_message,
                blocks=blocks,
            )
            if has_message:
                row = state.last_row or 1
                head = {
                    "rollout": state.rollout,
                    "model": self.task.bundle_ref,
                    "other": self.other.bundle_ref,
                    "rows": list(self._row_range) if self._row_range[1] else [row, row],
                }
                limit = message_log.max_bytes - len(encode(head)) - _HEAD_BYTES
                for part in block.to_bodies(lambda part: len(encode(part)) <= limit):
                    message_log.append(tx, "shadow", name, head | part, now)
            if not final:
                tx.save_state(name, task_keys.SHADOW_STATE, msgspec.msgpack.encode(state))
        self.state, self.stats, self._row_range = state, ComparisonStats(), (0, 0)
        self._unsaved_predictions = []
        return has_message


def batches_per_message(messages: int, min_batches: int) -> int:
    """Return the batches of the next message after `messages`, if rules need `min_batches`."""
    early = max(1, min_batches // _MIN_MESSAGES)
    return early if messages < _EARLY_MESSAGES else max(early, _LATER_BATCHES)


def merge_neighbours(blocks: list[ComparisonStats]) -> list[ComparisonStats]:
    """Add neighbouring blocks up if there are more than the limit."""
    if len(blocks) <= _MAX_BLOCKS:
        return blocks
    return [sum(blocks[i : i + 2], ComparisonStats()) for i in range(0, len(blocks), 2)]


def _restore_state(store: Store, task: LoadedTask, other: LoadedTask, rollout: str) -> ShadowState:
    newest_labels = {
        output: store.query(label_store.newest_number, output_key(task.name, output))
        for output in task.bundle.manifest.label_schemas
    }
    fresh = ShadowState(rollout, task.bundle.digest, other.bundle.digest, newest_labels)
    saved = store.load_state(task.name, task_keys.SHADOW_STATE)
    with suppress(msgspec.MsgspecError, ValueError):
        state = fresh if saved is None else decoders.from_msgpack(saved, ShadowState)
        if (state.rollout, state.task_digest, state.other_digest) == (rollout, fresh.task_digest, fresh.other_digest):
            return state
    return fresh


def _load_reference(task: LoadedTask) -> Reference | None:
    with suppress(BadBundle):
        return activation.read_reference(task.bundle)
    return None
