"""Messages of a batch: its results, and the drift windows that it closed. Nothing is read or written here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from outstation import __version__
from outstation.device import config
from outstation.device.pipeline import columns, drift_state
from outstation.device.pipeline.drift_state import LearningRefusals
from outstation.device.pipeline.loaded_task import LoadedTask
from outstation.device.rules.batch_rules import ResultAlert
from outstation.device.store.clock_segments import ClockStamp, clip_stamps
from outstation.device.store.message_log import MessageLog, PendingMessage
from outstation.device.store.row_batch import RowBatch
from outstation.device.store.rows import commit
from outstation.foundation import clock
from outstation.foundation.arrays import Ints
from outstation.ml.drift.state import DriftState, DriftWindowResult, QuietRun
from outstation.ml.kernel import library
from outstation.ml.model.inference.inference import InferenceResult
from outstation.ml.model.inference.runtime_name import runtime_name
from outstation.ml.model.inference.scores import Labels, Scores
from outstation.protocol.alerts.alert import Alert
from outstation.protocol.wire import commitment

if TYPE_CHECKING:
    from outstation.protocol.wire.messages import JoinedRange

# The message's header, then its other members beside the columns.
_HEAD_BYTES, _MEMBER_BYTES, _FAULTS_BYTES = 2_000, 1_200, 500
# For each further input: its name, its stream, rows and their commitment.
_JOINED_BYTES = 320
_MAX_FAULTS = 64
_NOT_JOINED: Mapping[str, JoinedRange] = {}


class RowCommitments:
    """Commitments to rows of a batch; each is computed once. `texts`: those of category codes, by field."""

    def __init__(
        self, task: LoadedTask, batch: RowBatch, texts: Mapping[str, Sequence[str]], message_log: MessageLog
    ) -> None:
        self._task, self._batch, self._texts, self._log = task, batch, texts, message_log
        self._known: dict[tuple[int, int], str] = {}

    def commit(self, start: int, stop: int) -> str:
        """Return the commitment to the rows from offset `start` to before `stop`."""
        if (start, stop) not in self._known:
            rows = self._batch.first + start, self._batch.first + stop - 1
            key = commitment.derive_key(self._log.secret, self._log.log_id, self._task.name, rows)
            parts = self._batch.slice_parts(start, stop)
            self._known[start, stop] = commit(parts, key, self._task.stream.fields, self._texts)
        return self._known[start, stop]


def build_result_messages(
    task: LoadedTask,
    batch: RowBatch,
    results: InferenceResult,
    labels: Labels | None,
    commitments: RowCommitments,
    message_log: MessageLog,
    current_segment: tuple[int, int] | None,
    faulty: Sequence[str] = (),
    alerts: Sequence[ResultAlert] = (),
    joined: Mapping[str, JoinedRange] = _NOT_JOINED,
) -> Iterator[PendingMessage]:
    """Return the messages that together cover the consumed rows, each as long as the log takes.

    Each has the `alerts` that its results raised or cleared behind it. `faulty` are the fields with a sensor fault
    meanwhile. `joined` are the rows that each further input was joined from.
    `current_segment` is (boot, segment) of the log's last clock anchor, or None if that is of another boot.
    """
    cut, model_scores = results.cut, results.scores
    ends = cut.starts + task.window_rows - 1
    privacy = message_log.field_privacy(task.name)
    is_published = _select_published(task, model_scores, labels) & privacy.lists_results
    # Where messages about faults stay on the device, nor are their fields named.
    hides_faults = privacy.keeps("drift") or privacy.keeps("alerts")
    named = [] if hides_faults else [name for name in faulty if not privacy.hides_numbers(name)]
    missing = np.where(results.missing_share > task.bundle.manifest.input.max_missing, results.missing_share, 0)
    lists_all = privacy.min_results <= 1 and bool(is_published.all())
    listed = (ends + batch.first, batch.t[ends]) if lists_all else (None, None)
    max_bytes = message_log.max_bytes - _HEAD_BYTES - _MEMBER_BYTES - _FAULTS_BYTES - _JOINED_BYTES * len(joined)
    max_results = columns.max_results(max_bytes, model_scores, labels, missing, *listed)
    first_row, count, done = 0, len(cut.starts), 0
    task.results_per_message = max_results
    while True:
        stop = min(count, done + max_results)
        through = cut.consumed if stop == count else int(cut.starts[stop - 1]) + task.step
        published = np.flatnonzero(is_published[done:stop]) + done
        published = _leave_out_rare(published, labels, privacy.min_results)
        published_rows = ends[published] + batch.first
        listing = columns.build(model_scores, labels, missing, published, published_rows, batch.t[ends[published]])
        rows = [batch.first + first_row, batch.first + through - 1]
        body = _result_body(task, rows, stop - done, commitments.commit(first_row, through), listing)
        if incomplete := int(np.count_nonzero(missing[done:stop])):
            body["incomplete"] = incomplete
        if named:
            body["faults"] = named
        if joined:
            body["joined"] = msgspec.to_builtins(joined)
        # Where model windows overlap, the last result's row comes after the last consumed row.
        last_row = max([rows[1], *published_rows[-1:].tolist()])
        body |= _clock_members(clip_stamps(batch.stamps, rows[0], last_row), current_segment)
        is_last = stop == count
        raised = [change.alert for change in alerts if done <= change.index and (is_last or change.index < stop)]
        yield PendingMessage("results", task.name, body, raised)
        first_row, done = through, stop
        if done == count:
            return


def find_faulty_fields(states: Sequence[DriftState | None], windows: Sequence[DriftWindowResult]) -> list[str]:
    """Return the fields with an open fault alert in one of the states, or with a fault in a drift window.

    If they are very many, or have long names, only the first are listed.
    """
    known = [state for state in states if state is not None]
    faulty = {name for state in known for name in itertools.compress(state.fields, state.faults.open_fields)}
    features = (window.members["features"] for window in windows)
    faulty |= {name for field in features for name, numbers in field.items() if numbers["fault"]}
    sizes = itertools.accumulate(len(json.dumps(name)) + 1 for name in sorted(faulty))
    return [name for name, size in zip(sorted(faulty), sizes, strict=True) if size < _FAULTS_BYTES][:_MAX_FAULTS]


def build_lost_message(task: LoadedTask, batch: RowBatch) -> PendingMessage:
    """Return the message that covers rows without results, because they cannot be read: it commits to none."""
    body = _result_body(task, [batch.first, batch.last], 0, "", {"row": [], "t": []})
    return PendingMessage("results", task.name, {**body, "lost": batch.loss_reason})


def build_drift_messages(
    task: LoadedTask, windows: Sequence[DriftWindowResult], refusals: LearningRefusals, contradicted: Collection[str]
) -> tuple[list[PendingMessage], LearningRefusals]:
    """Return the messages of closed drift windows, each with its alerts and what it ended to learn.

    A run of quiet windows is one message. Also return the refusals to learn after them. Where labels contradict the
    certainty of an output in `contradicted`, the accuracy that is expected from it is marked.
    """
    messages: list[PendingMessage] = []
    for window in windows:
        body, window_alerts = _drift_body(task, window), window.alerts
        if contradicted:
            _mark_estimates(body, contradicted)
        if "" in contradicted:
            window_alerts = tuple(map(_mark_contradicted, window_alerts))
        messages.append(PendingMessage("drift", task.name, body, window_alerts))
        learning, refusals = drift_state.build_learning_messages(task.name, window, refusals)
        messages += learning
    return messages, refusals


def _mark_estimates(body: dict[str, Any], contradicted: Collection[str]) -> None:
    """Note which expected accuracies and errors of a drift message are known to be wrong."""
    if "" in contradicted and body["estimate"]:
        body["estimate"] = {**body["estimate"], "outside": True}
    if further := body["output"].get("further"):
        marked = {
            name: {**part, "estimate": {**part["estimate"], "outside": True}}
            if name in contradicted and part.get("estimate")
            else part
            for name, part in further.items()
        }
        body["output"] = {**body["output"], "further": marked}


def _mark_contradicted(alert: Alert) -> Alert:
    """Note that the accuracy or error which the alert expects is known to be wrong."""
    name = next((name for name in ("accuracy", "error") if name in alert.evidence), None)
    if name is None:
        return alert
    evidence = {**alert.evidence, name: {**alert.evidence[name], "outside": True}}
    return replace(alert, summary=f"{alert.summary} Labels contradict this expected {name}.", evidence=evidence)


def _drift_body(task: LoadedTask, window: DriftWindowResult) -> dict[str, Any]:
    shipped = task.drift_monitor.shipped.digest if task.drift_monitor else None
    span = {
        "index": window.index,
        "rows": list(window.rows),
        "from": clock.to_rfc3339(window.t[0]),
        "to": clock.to_rfc3339(window.t[1]),
        "n": window.row_count,
    }
    reference = {"shipped": shipped, "site": window.site_digest}
    body = {"model": task.bundle_ref, "reference": reference, "window": span}
    if window.quiet is not None and len(window.quiet) > 1:
        body["windows"] = _quiet_columns(window.quiet)
    return body | window.members


def _quiet_columns(quiet: QuietRun) -> dict[str, Any]:
    (first, last), (begin, end) = quiet.rows.T, quiet.t.T
    return {
        "first": columns.encode_runs(first),
        "last": columns.encode_runs(last),
        "from": columns.encode_times(begin),
        "to": columns.encode_times(end),
        "n": columns.encode_runs(quiet.row_counts),
        "nearest": quiet.nearest.tolist(),
    }


def _result_body(task: LoadedTask, rows: list[int], n: int, proof: str, columns: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": task.bundle_ref,
        "stream": task.config.stream,
        "rows": rows,
        "n": n,
        "input": proof,
        "columns": columns,
        "made": {
            "agent": __version__,
            "runtime": f"{runtime_name()} {task.model.kernels}, kernel {library.variant()}",
            "config": task.config_digest,
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


def _select_published(task: LoadedTask, model_scores: Scores, labels: Labels | None) -> NDArray[np.bool_]:
    """Return which results the messages list; all results are counted."""
    count, publish = len(model_scores), task.config.publish
    if publish == "summary":
        return np.zeros(count, bool)
    if isinstance(publish, config.PublishBelow) and model_scores.score is not None:
        return np.asarray(model_scores.score < publish.below_score)
    if publish == "changes" and labels is not None:
        last = labels.texts.index(task.last_label) if task.last_label in labels.texts else -1
        return np.asarray(np.diff(labels.codes, prepend=last) != 0)
    return np.ones(count, bool)
