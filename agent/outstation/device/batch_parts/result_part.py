"""Result part of a batch: messages that cover the consumed rows, with the results, their rows' commitment and clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outstation import __version__
from outstation.device import config
from outstation.device.batch_parts import columns
from outstation.device.batch_parts.batch_part import Batch, BatchPart
from outstation.device.batch_parts.drift_part import FAULTS_BYTES
from outstation.device.batch_parts.task_plan import TaskPlan
from outstation.device.store.clock_segments import ClockSegments, ClockStamp, clip_stamps
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import commit
from outstation.foundation.arrays import Float32s, Ints
from outstation.ml.kernel import library
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.scores import Labels, Scores
from outstation.protocol.wire import commitment

# The message's header, then its other members beside the columns.
_HEAD_BYTES, _MEMBER_BYTES = 2_000, 1_200
# For each further input: its name, its stream, rows and their commitment.
_JOINED_BYTES = 320


class RowCommitments:
    """Commitments to rows of a batch; each is computed once. `texts`: those of category codes, by field."""

    def __init__(
        self, plan: TaskPlan, rows: RowBatch, texts: Mapping[str, Sequence[str]], message_log: MessageLog
    ) -> None:
        self._plan, self._rows, self._texts, self._log = plan, rows, texts, message_log
        self._known: dict[tuple[int, int], str] = {}

    def commit(self, start: int, stop: int) -> str:
        """Return the commitment to the rows from offset `start` to before `stop`."""
        if (start, stop) not in self._known:
            rows = self._rows.first + start, self._rows.first + stop - 1
            key = commitment.derive_key(self._log.secret, self._log.log_id, self._plan.name, rows)
            parts = self._rows.slice_parts(start, stop)
            self._known[start, stop] = commit(parts, key, self._plan.stream.fields, self._texts)
        return self._known[start, stop]


class ResultPart(BatchPart):
    """Messages of the results of one task; together they cover the consumed rows, each as long as the log takes.

    `last_label`: of the newest committed result; `results_per_message`: how many fit into one, as of the last batch.
    """

    def __init__(self, plan: TaskPlan) -> None:
        self._plan = plan
        self.last_label, self.results_per_message = "", 0
        self._commitments: RowCommitments | None = None
        self._segment: tuple[int, int] | None = None

    def read(self, batch: Batch) -> None:
        """Commit to the rows while the model computes, if their results will probably fit into one message."""
        store, log, stream = batch.store, batch.message_log, self._plan.config.stream
        texts = {f.name: store.categories(stream, f.name) for f in self._plan.stream.fields if f.type == "category"}
        self._commitments = commitments = RowCommitments(self._plan, batch.rows, texts, log)
        if len(batch.ends) <= self.results_per_message:
            commitments.commit(0, batch.cut.consumed)
        announced = store.query(lambda db: ClockSegments(db, store.boot).last_announced_key())
        # (boot, segment) of the log's last clock anchor, or None if that is of another boot.
        self._segment = announced if announced[0] == log.boot else None

    def compute(self, batch: Batch, results: InferenceResult) -> Iterator[PendingMessage]:
        """Return the messages, each with the alerts that its results raised or cleared behind it."""
        scores, labels, count, commitments = results.scores, batch.labels, len(batch.ends), self._commitments
        assert commitments is not None
        privacy = batch.message_log.field_privacy(self._plan.name)
        is_published = self._select_published(scores, labels) & privacy.lists_results
        max_missing = self._plan.bundle.manifest.input.max_missing
        missing = np.where(results.missing_share > max_missing, results.missing_share, 0)
        members = self._build_members(batch)
        lists_all = privacy.min_results <= 1 and bool(is_published.all())
        max_results = self.results_per_message = self._count_fitting(batch, scores, missing, lists_all=lists_all)
        first_row = done = 0
        while True:
            stop = min(count, done + max_results)
            through = batch.cut.consumed if stop == count else int(batch.cut.starts[stop - 1]) + self._plan.step
            published = np.flatnonzero(is_published[done:stop]) + done
            published = _leave_out_rare(published, labels, privacy.min_results)
            ends = batch.ends[published]
            published_rows = ends + batch.rows.first
            listing = columns.build(scores, labels, missing, published, published_rows, batch.rows.t[ends])
            rows = [batch.rows.first + first_row, batch.rows.first + through - 1]
            proof = commitments.commit(first_row, through)
            body = _result_body(self._plan, rows, stop - done, proof, listing)
            if incomplete := int(np.count_nonzero(missing[done:stop])):
                body["incomplete"] = incomplete
            # Where model windows overlap, the last result's row comes after the last consumed row.
            last_row = max([rows[1], *published_rows[-1:].tolist()])
            body |= members | _clock_members(clip_stamps(batch.rows.stamps, rows[0], last_row), self._segment)
            is_last, changes = stop == count, batch.result_alerts
            raised = [change.alert for change in changes if done <= change.index and (is_last or change.index < stop)]
            yield PendingMessage("results", self._plan.name, body, raised)
            first_row, done = through, stop
            if done == count:
                return

    def confirm(self, batch: Batch) -> None:
        if batch.labels is not None and len(batch.labels.codes):
            self.last_label = batch.labels.texts[batch.labels.codes[-1]]
        self._commitments = None

    def _build_members(self, batch: Batch) -> dict[str, Any]:
        """Return what each message says of the batch: fields with a sensor fault, and the rows that were joined."""
        privacy, members = batch.message_log.field_privacy(self._plan.name), dict[str, Any]()
        # Where messages about faults stay on the device, nor are their fields named.
        if not (privacy.keeps("drift") or privacy.keeps("alerts")):
            named = [name for name in batch.faulty_fields if not privacy.hides_numbers(name)]
            members |= {"faults": named} if named else {}
        return members | ({"joined": msgspec.to_builtins(batch.joined_rows)} if batch.joined_rows else {})

    def _count_fitting(self, batch: Batch, scores: Scores, missing: Float32s, *, lists_all: bool) -> int:
        """Return the number of results that fit into one message."""
        rows, t = (batch.ends + batch.rows.first, batch.rows.t[batch.ends]) if lists_all else (None, None)
        further = _JOINED_BYTES * len(batch.joined_rows)
        max_bytes = batch.message_log.max_bytes - _HEAD_BYTES - _MEMBER_BYTES - FAULTS_BYTES - further
        return columns.max_results(max_bytes, scores, batch.labels, missing, rows, t)

    def _select_published(self, model_scores: Scores, labels: Labels | None) -> NDArray[np.bool_]:
        """Return which results the messages list; all results are counted."""
        count, publish = len(model_scores), self._plan.config.publish
        if publish == "summary":
            return np.zeros(count, bool)
        if isinstance(publish, config.PublishBelow) and model_scores.score is not None:
            return np.asarray(model_scores.score < publish.below_score)
        if publish == "changes" and labels is not None:
            last = labels.texts.index(self.last_label) if self.last_label in labels.texts else -1
            return np.asarray(np.diff(labels.codes, prepend=last) != 0)
        return np.ones(count, bool)


def build_lost_message(plan: TaskPlan, batch: RowBatch) -> PendingMessage:
    """Return the message that covers rows without results, because they cannot be read: it commits to none."""
    body = _result_body(plan, [batch.first, batch.last], 0, "", {"row": [], "t": []})
    return PendingMessage("results", plan.name, {**body, "lost": batch.loss_reason})


def _result_body(plan: TaskPlan, rows: list[int], n: int, proof: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": plan.bundle_ref,
        "stream": plan.config.stream,
        "rows": rows,
        "n": n,
        "input": proof,
        "columns": columns,
        "made": {
            "agent": __version__,
            "runtime": f"{runtime_name()} {plan.model.kernels}, kernel {library.variant()}",
            "config": plan.config_digest,
        },
    }


def _clock_members(stamps: Sequence[ClockStamp], current_segment: tuple[int, int] | None) -> dict[str, Any]:
    """Return the clock of the rows' times, [first row, boot, segment, quality] for each run of rows.

    Return nothing if all rows are synced and of the current segment.
    """
    if current_segment is not None and len(stamps) == 1:
        [stamp] = stamps
        if (stamp.boot, stamp.segment, stamp.quality) == (*current_segment, 0):
            return {}
    return {"clocks": [[stamp.first, stamp.boot, stamp.segment, stamp.quality] for stamp in stamps]}


def _leave_out_rare(published: Ints, labels: Labels | None, min_results: int) -> Ints:
    """Return the published results without those of a class that has fewer than `min_results` of them."""
    if min_results <= 1 or not len(published):
        return published
    if labels is None:
        return published if len(published) >= min_results else published[:0]
    _, classes, counts = np.unique(labels.codes[published], return_inverse=True, return_counts=True)
    return np.asarray(published[counts[classes] >= min_results])
