"""Another bundle that answers beside a task's own, after each batch was committed: no result waits for it.

What both said is tallied, and a `shadow` message says so each so many batches or minutes, in one commit with what is
kept. A kill loses the part since the last message; the last row that is counted is kept, so that none counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from agent.clock import ClockReading
from agent.comparison import tally
from agent.comparison.paired_intervals import ComparisonBlock
from agent.comparison.tally import ComparisonStats, Predictions
from agent.device.pipeline.loaded_task import LoadedTask
from agent.device.rollout import outcomes, shadow_windows
from agent.device.rollout.shadow_windows import AlignedWindows
from agent.device.store import labels as labelled
from agent.device.store import task_keys
from agent.device.store.labels import StoredPredictions
from agent.device.store.message_log import MessageLog
from agent.device.store.store import RowBatch, Store
from agent.drift.baseline.reference import Reference
from agent.errors import BadBundle, StorageBusy, StorageError, StorageFull
from agent.model import activation
from agent.model.inference import scores
from agent.model.inference.features import Floats
from agent.model.inference.inference import InferenceResult
from agent.model.sandbox.subprocess_model import SubprocessModel

log = logging.getLogger("outstation")

# The longest that a batch is not told of; the longest that the next batch waits for an answer to the one before.
REPORT_INTERVAL_S, ANSWER_TIMEOUT_S = 300.0, 0.25
# Of a batch's time in a model that is in this process, and holds up the next one.
_MAX_INFERENCE_S = 1.0
# After there was no room for a message.
_FULL_RETRY_S = 60.0
# First messages come often, so that a roll-out is soon judged by a few blocks; later ones seldom.
_EARLY_MESSAGES, _LATER_BATCHES, _MIN_MESSAGES = 24, 20, 12
_MAX_BLOCKS = 64
# Answers that wait to be kept for labels, while there is no room.
_MAX_UNSAVED_PREDICTIONS = 20_000


class ShadowState(msgspec.Struct, frozen=True):
    """Of one roll-out and pair of bundles: the last row counted, the last label looked at, the messages so far.

    `blocks` are their tallies; of many, neighbours are added up.
    """

    rollout: str
    task_digest: str
    other_digest: str
    last_row: int = 0
    last_label: int = 0
    message_count: int = 0
    blocks: list[ComparisonStats] = []


class _PendingBatch(msgspec.Struct, frozen=True):
    """A batch that `other` is asked about: its rows, what `task` said, and the windows that were given."""

    rows: tuple[int, int]
    predictions: Predictions
    windows: AlignedWindows


class ShadowRunner:
    """`other` beside `task`, both of one name. Used by the main loop.

    A model of `other` that runs apart is never waited for longer than PATIENCE_S; batches that come meanwhile are not
    compared. One in this process answers at once.
    """

    def __init__(self, task: LoadedTask, other: LoadedTask, rollout: str, store: Store, min_batches: int = 20) -> None:
        """`batches`: the least that are compared before anything is judged."""
        self.task, self.other = task, other
        self.state = _restore_state(store, task, other, rollout)
        self._min_batches = min_batches
        self._score_references = shadow_windows.select_score_references([_load_reference(task), _load_reference(other)])
        self._pending: _PendingBatch | None = None
        self._retry_at_s = 0.0
        # Whether labels wait that did not go into the last message.
        self._has_more_labels = False
        self._last_report_s: float | None = None
        self.stats, self._row_range = ComparisonStats(), (0, 0)
        self._unsaved_predictions: list[StoredPredictions] = []

    @property
    def blocks(self) -> list[ComparisonBlock]:
        """One for each message so far, oldest first: what `verdict.judge` takes."""
        return [ComparisonBlock(one) for one in self.state.blocks]

    def submit_batch(self, store: Store, batch: RowBatch, answers: InferenceResult) -> None:
        """A batch that `task` answered and committed. Raises StorageError, and nothing else."""
        last = batch.first + answers.cut.consumed - 1
        if last <= max(self.state.last_row, self._row_range[1]) or not len(answers.cut.starts):
            return
        self._run_guarded(lambda: self._submit(store, batch, answers, (batch.first, last)))

    def tick(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Hear what was asked, and say what is due; whether a message was written. Raises StorageError."""
        self.poll()
        if self._last_report_s is None:
            self._last_report_s = now.boot_s
        few = self.stats.batches < batches_per_message(self.state.message_count, self._min_batches)
        late = self._has_more_labels or now.boot_s >= self._last_report_s + REPORT_INTERVAL_S
        if now.boot_s < self._retry_at_s or (few and not late):
            return False
        return self._try_report(store, message_log, now)

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Take in the answer that is waited for, if it is there; whether none is waited for any more."""
        self._run_guarded(lambda: self._poll(timeout_s))
        return self._pending is None

    def report(self, store: Store, message_log: MessageLog, now: ClockReading) -> bool:
        """Say at once what was not said yet; whether there was any. Raises StorageError, also for want of room."""
        return self._report(store, message_log, now, final=False)

    def finish(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool = False) -> bool:
        """When the agent stops, or at the end (`over`): say what was not said yet. Raises StorageError."""
        self.poll(ANSWER_TIMEOUT_S)
        self._pending = None
        return self._try_report(store, message_log, now, final=final)

    # --- one batch ---

    def _submit(self, store: Store, batch: RowBatch, answers: InferenceResult, rows: tuple[int, int]) -> None:
        model, ends = self.other.model, answers.cut.starts + self.task.window_rows - 1
        if isinstance(model, SubprocessModel):
            self._poll(ANSWER_TIMEOUT_S)
            if not model.poll_ready(ANSWER_TIMEOUT_S):
                return
        found = shadow_windows.align_windows(self.other, store, batch, ends[: self._max_windows()])
        said = shadow_windows.build_predictions(
            batch.first + ends, answers.scores, answers.seconds, self._score_references[0]
        )
        waiting = _PendingBatch(rows, said, found)
        if isinstance(model, SubprocessModel):
            model.submit(found.values)
            self._pending = waiting
            # Mostly it is a matter of milliseconds, and then it is done.
            self._poll(0.0)
            return
        began_s = model.seconds
        with self.other.crash_guard():
            outputs = model.invoke(found.values)
        self._add_predictions(waiting, outputs, model.seconds - began_s)

    def _max_windows(self) -> int | None:
        """How many windows of a batch: all, of a model that nobody waits for."""
        choice = self.other.tuning
        if isinstance(self.other.model, SubprocessModel) or choice is None:
            return None
        return max(1, int(choice.rows_per_s * _MAX_INFERENCE_S))

    def _poll(self, timeout_s: float) -> None:
        model = self.other.model
        if not isinstance(model, SubprocessModel) or not model.is_busy:
            # Whoever ended it meanwhile took the question along.
            self._pending = None
            return
        began_s = model.seconds
        if (outputs := model.poll(timeout_s)) is not None:
            # What it was asked before it came to stand here says nothing.
            waiting, self._pending = self._pending, None
            if waiting is not None:
                self._add_predictions(waiting, outputs, model.seconds - began_s)

    def _add_predictions(self, pending: _PendingBatch, outputs: Floats, seconds: float) -> None:
        manifest = self.other.bundle.manifest
        found = scores.from_outputs(outputs, manifest, pending.windows.values)
        said = shadow_windows.build_predictions(pending.windows.row, found, seconds, self._score_references[1])
        kinds = shadow_windows.build_output_kind(self.task.bundle.manifest), shadow_windows.build_output_kind(manifest)
        self._add_stats(tally.compare_batch(kinds[0], pending.predictions, kinds[1], said), pending.rows)
        if self.task.keep_results and len(found):
            self._unsaved_predictions.append(
                shadow_windows.build_stored_predictions(self.other.bundle.digest, pending.windows, found)
            )
            while sum(len(one.row) for one in self._unsaved_predictions) > _MAX_UNSAVED_PREDICTIONS:
                del self._unsaved_predictions[0]

    def _run_guarded(self, action: Callable[[], None]) -> None:
        """What the other bundle does is counted, whatever it is, and ends nothing."""
        try:
            action()
        except StorageError:
            raise
        except Exception as error:
            if not isinstance(error, BadBundle):
                log.exception("task %s: %s beside it", self.task.name, self.other.bundle.manifest.name)
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
            log.error("task %s: %s; what was compared is told later", self.task.name, problem)
            self._retry_at_s = now.boot_s + _FULL_RETRY_S
            return False

    def _report(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool) -> bool:
        self._last_report_s = now.boot_s
        labels = store.query(labelled.next_numbers, self.task.name, self.state.last_label, outcomes.MAX_LABELS + 1)
        self._has_more_labels = len(labels) > outcomes.MAX_LABELS
        if not self.stats.batches and not labels:
            return False
        return self._write_message(store, message_log, now, final=final)

    def _write_message(self, store: Store, message_log: MessageLog, now: ClockReading, *, final: bool) -> bool:
        name = self.task.name
        with store.transaction() as tx:
            if self._unsaved_predictions:
                tx.labels.store_predictions(
                    labelled.shadow_key(name),
                    shadow_windows.concatenate_stored(self._unsaved_predictions),
                    tx.uptime_s(now),
                )
            by_labels, number = outcomes.count_outcomes(tx, self.task, self.other, self.state.last_label)
            block = self.stats + by_labels
            says = block != ComparisonStats()
            kept = self._next_state(block, number, has_message=says)
            if says:
                bundles = {"model": self.task.bundle_ref, "beside": self.other.bundle_ref}
                rows = (
                    [self._row_range[0], self._row_range[1]]
                    if self._row_range[1]
                    else [kept.last_row or 1, kept.last_row or 1]
                )
                body = {"rollout": kept.rollout, **bundles, "rows": rows, **block.to_body()}
                message_log.append(tx, "shadow", name, body, now)
            if not final:
                tx.save_state(name, task_keys.SHADOW_STATE, msgspec.msgpack.encode(kept))
        self.state, self.stats, self._row_range, self._unsaved_predictions = kept, ComparisonStats(), (0, 0), []
        return says

    def _next_state(self, block: ComparisonStats, last_label: int, *, has_message: bool) -> ShadowState:
        old = self.state
        blocks = merge_neighbours([*old.blocks, block]) if has_message else old.blocks
        row = max(old.last_row, self._row_range[1])
        return ShadowState(
            old.rollout, old.task_digest, old.other_digest, row, last_label, old.message_count + has_message, blocks
        )


def batches_per_message(messages: int, min_batches: int) -> int:
    """Of how many batches a message tells, after so many, where `batches` are the least that is compared."""
    each = max(1, min_batches // _MIN_MESSAGES)
    return each if messages < _EARLY_MESSAGES else max(each, _LATER_BATCHES)


def merge_neighbours(blocks: list[ComparisonStats]) -> list[ComparisonStats]:
    """Neighbours added up, where there are more than are kept."""
    if len(blocks) <= _MAX_BLOCKS:
        return blocks
    return [sum(blocks[i : i + 2], ComparisonStats()) for i in range(0, len(blocks), 2)]


def _restore_state(store: Store, task: LoadedTask, other: LoadedTask, rollout: str) -> ShadowState:
    newest = store.query(labelled.newest_number, task.name)
    fresh = ShadowState(rollout, task.bundle.digest, other.bundle.digest, last_label=newest)
    found = store.load_state(task.name, task_keys.SHADOW_STATE)
    with suppress(msgspec.MsgspecError, ValueError):
        kept = fresh if found is None else msgspec.msgpack.decode(found, type=ShadowState)
        if (kept.rollout, kept.task_digest, kept.other_digest) == (rollout, fresh.task_digest, fresh.other_digest):
            return kept
    return fresh


def _load_reference(task: LoadedTask) -> Reference | None:
    with suppress(BadBundle):
        return activation.read_reference(task.bundle)
    return None
