"""Drift state of a task: what is remembered, how model windows fill a drift window, and the result of a closed one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from msgspec import structs
from msgspec.structs import replace

from outstation.foundation import arrays
from outstation.foundation.arrays import Float32s, Float64s, Ints, any_true
from outstation.foundation.errors import BadBundle
from outstation.ml.drift.baseline import sampling, summary, window_statistics
from outstation.ml.drift.baseline.deviation import ReferenceGuard
from outstation.ml.drift.baseline.learning_state import LearningState
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.runs import Tail
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.baseline.window_statistics import WindowStatistics
from outstation.ml.drift.detectors.detector import Task
from outstation.ml.drift.detectors.registry import GateStates, get_layout
from outstation.ml.drift.faults.open_faults import OpenFaults
from outstation.ml.drift.numeric.escalation import DriftSizes, Escalation
from outstation.ml.drift.sequential.test_suite import SuiteState
from outstation.ml.kernel import comparisons
from outstation.ml.kernel import library as kernel
from outstation.ml.performance.expected_error import NO_ERROR_BINS, ErrorBins
from outstation.protocol.alerts.alert import Alert, MonitoredAlert


class CarriedAlert(msgspec.Struct, frozen=True):
    """Alert that was open before the bundle was changed, and stays open although nothing tests its subject."""

    alert: MonitoredAlert
    subject: str
    count: int


class DriftState(msgspec.Struct, frozen=True, eq=False):
    """State of drift detection. Constant size, apart from windows gathered while learning."""

    fields: tuple[str, ...]
    window: int  # model windows per drift window
    index: int  # of the open drift window, from 1
    open_summary: Summary
    tail: Tail
    rows: tuple[int, int]  # first and last row of the open drift window, as the stream numbers them; (0, -1) if none
    t: tuple[int, int]  # their times, epoch µs
    last_counted_row: int
    learning: LearningState
    site_reference: Reference | None
    learned_count: int  # site references so far
    requested_learn_s: float  # of readings to learn from, as a command asked
    suite: SuiteState
    faults: OpenFaults
    drift_escalation: Escalation  # (F + 3 + H,)
    drift_sizes: DriftSizes
    raised_counts: Ints  # (F + 3 + H, 2) alerts raised so far: drift, fault
    raised_window: Ints  # (F + 3 + H,) the drift window of the last drift alert
    gates: GateStates
    guard: ReferenceGuard
    carried: tuple[CarriedAlert, ...] = ()
    # The site's reference was learned with another model. Its answers are not tested, and another one is gathered.
    is_inherited: bool = False
    class_field: str = ""  # field that names modes, if any
    known_modes: tuple[str, ...] = ()  # names that have a class

    @classmethod
    def start(cls, shipped: Reference, window: int, class_field: str = "") -> DriftState:
        fields = len(shipped.fields)
        return cls(
            fields=shipped.fields,
            window=window,
            index=1,
            open_summary=Summary.empty(shipped),
            tail=Tail.empty(fields),
            rows=(0, -1),
            t=(0, 0),
            last_counted_row=-1,
            learning=LearningState.empty(shipped),
            site_reference=None,
            learned_count=0,
            requested_learn_s=0.0,
            suite=SuiteState.start(shipped.task),
            faults=OpenFaults.none(shipped),
            drift_escalation=Escalation.none((shipped.task.subject_count,)),
            drift_sizes=DriftSizes.none(get_layout(shipped.task).test_count, shipped.task.subject_count),
            raised_counts=np.zeros((shipped.task.subject_count, 2), np.int64),
            raised_window=np.zeros(shipped.task.subject_count, np.int64),
            gates=GateStates.start(),
            guard=ReferenceGuard(),
            class_field=class_field,
        )

    @property
    def subjects(self) -> tuple[str, ...]:
        """Name of each subject."""
        return self.suite.task.name_subjects(self.fields)

    @property
    def tested_reference(self) -> Reference | None:
        """The site's reference, unless it is held."""
        return None if self.guard.is_held else self.site_reference

    def without_guard(self) -> DriftState:
        """Return the state without the references that its guard compares with: they are stored separately."""
        return replace(self, guard=ReferenceGuard(is_held=self.guard.is_held))

    def is_compatible(self, task: Task) -> bool:
        """Return True if the state has the tests of this task."""
        tests = get_layout(task).test_count
        site_fits = self.site_reference is None or len(self.site_reference.test_mean) == tests
        return (
            site_fits and self.suite.task == task and len(self.suite.cusum.alarm[0]) == len(self.suite.ended) == tests
        )

    def to_bytes(self) -> bytes:
        return arrays.to_compressed_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> DriftState:
        """Decode `to_bytes`. Raises ValueError."""
        return arrays.from_compressed_bytes(data, cls)

    @classmethod
    def from_parts(cls, data: bytes, site: bytes | None, guard: bytes | None = None) -> DriftState:
        """Decode a state, its site's reference, which is kept apart as JSON, and its guard. Raises ValueError."""
        state = cls.from_bytes(data)
        if guard is not None:
            state = replace(state, guard=arrays.from_compressed_bytes(guard, ReferenceGuard))
        if site is None or state.site_reference is not None:
            return state
        try:
            reference = Reference.from_json(site)
        except BadBundle as error:
            raise ValueError(str(error)) from error
        return replace(state, site_reference=reference) if reference.site is not None else state


class QuietRun(msgspec.Struct, frozen=True, eq=False):
    """Columns of W consecutive quiet drift windows: nothing indicates a fault, no alert is open and none is raised.

    `nearest` is the largest sum of a test after each window, as a share of its limit.
    """

    rows: Ints  # (W, 2) first and last row
    t: Ints  # (W, 2) their times, epoch µs
    row_counts: Ints  # (W,)
    nearest: Float64s  # (W,)

    def __len__(self) -> int:
        return len(self.nearest)

    def extend(self, more: QuietRun) -> QuietRun:
        """Append the windows that follow."""
        pairs = zip(structs.astuple(self), structs.astuple(more), strict=True)
        return QuietRun(*(np.concatenate(both) for both in pairs))


class DriftWindowResult(msgspec.Struct, frozen=True):
    """Result of a closed drift window, or of a run of quiet ones from number `index` on.

    `members` holds the message's `features`, `output`, `estimate` and `state`: sums over the run, and the state after
    its last window.
    """

    index: int
    rows: tuple[int, int]
    t: tuple[int, int]
    row_count: int
    site_digest: str | None  # digest of the site's reference that this window was judged by
    learned_reference: Reference | None  # the site's reference, when this window completed it
    learning_error: str | None  # why the windows gathered so far were dropped
    members: dict[str, Any]
    alerts: tuple[Alert, ...]
    quiet: QuietRun | None = None  # None if the window is not quiet

    @property
    def windows(self) -> int:
        return 1 if self.quiet is None else len(self.quiet)


class Batch(msgspec.Struct, frozen=True):
    """Batch of rows with their model windows."""

    features: Float32s  # (n, F)
    starts: Ints  # (w,)
    predicted: Ints  # (w,); (0,) before the model has answered
    top_scores: Float64s | None  # (w,)
    first_row: int
    t: Ints  # (n,) epoch µs
    answers: Float64s | None = None  # (w, P) of further outputs
    error_bins: ErrorBins = NO_ERROR_BINS  # written as windows are summarized

    def slice_windows(self, index: slice, shipped: Reference) -> BatchPart:
        """Return a part with these model windows."""
        begin, end = int(self.starts[index][0]), int(self.starts[index][-1]) + shipped.window_rows
        values, starts = np.ascontiguousarray(self.features[begin:end], np.float32), self.starts[index] - begin
        if _has_infinite(values):
            values = np.where(np.isinf(values), np.float32(np.nan), values)
        return BatchPart(
            values=values,
            starts=starts,
            stats=window_statistics.compute_statistics(values, starts, shipped.window_rows, shipped.floor),
            begin=begin,
            first_row=self.first_row + begin,
            t=self.t[begin:end],
            **self.slice_answers(index),
        )

    def slice_answers(self, index: slice) -> dict[str, Any]:
        """Return the model's answers for these model windows, by the names that a summary has for them."""
        return {
            "predicted": self.predicted[index],
            "top_scores": None if self.top_scores is None else self.top_scores[index],
            "answers": None if self.answers is None else self.answers[index],
            "error_bins": {name: bins[index] for name, bins in self.error_bins.items()},
        }


class BatchPart(msgspec.Struct, frozen=True):
    """Part of a batch, with statistics of its model windows."""

    values: Float32s  # (n, F) infinities are missing values
    starts: Ints  # (w,)
    stats: WindowStatistics
    predicted: Ints  # (w,)
    top_scores: Float64s | None  # (w,)
    answers: Float64s | None  # (w, P)
    error_bins: ErrorBins
    begin: int
    first_row: int
    t: Ints  # (n,) epoch µs


def _has_infinite(values: Float32s) -> bool:
    library = kernel.kernel()
    if library is not None:
        return comparisons.has_infinite(library, values)
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without an array of its own; infinities and missing values both show.
        return not math.isfinite(values.sum()) and any_true(np.isinf(values))


def fill_window(state: DriftState, shipped: Reference, part: BatchPart, classes: Ints) -> DriftState:
    """Add a part's model windows, compared with `classes`, and those of its rows that were not counted before."""
    rows = window_statistics.covered_rows(part.starts, shipped.window_rows, state.last_counted_row + 1 - part.first_row)
    begin, end = (rows.start, rows.stop - 1) if isinstance(rows, slice) else (int(rows[0]), int(rows[-1]))
    first = part.first_row + begin, int(part.t[begin])
    is_fresh = state.rows[1] < state.rows[0]
    stack, tail = summary.summarize_windows(
        shipped,
        part.values[rows][None],
        sampling.compute_spans(part.t, part.starts, shipped.window_rows, state.tail.t)[None],
        part.stats,
        part.predicted,
        part.top_scores,
        classes,
        answers=part.answers,
        error_bins=part.error_bins,
        before=None if is_fresh else summary.stack_one(state.open_summary),
        tail=state.tail,
    )
    return replace(
        state,
        open_summary=summary.select_window(stack, 0),
        tail=replace(tail, t=int(part.t[end])),
        rows=(first[0] if is_fresh else state.rows[0], part.first_row + end),
        t=(first[1] if is_fresh else state.t[0], int(part.t[end])),
        last_counted_row=part.first_row + end,
    )


def start_next_window(state: DriftState, empty: Summary) -> DriftState:
    """Open the next drift window."""
    tail = Tail.empty(len(state.fields))
    return replace(state, index=state.index + 1, open_summary=empty, tail=tail, rows=(0, -1), t=(0, 0))
