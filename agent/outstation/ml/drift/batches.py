"""Batches of drift windows: windows that a batch holds whole are summarized, analyzed and, up to the first that is
not quiet, tested together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float32s, Float64s, Ints, any_true
from outstation.ml.drift.baseline import summary
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.row_counts import RowCounts, count_rows
from outstation.ml.drift.baseline.runs import Tail
from outstation.ml.drift.baseline.summary import Summary
from outstation.ml.drift.baseline.window_statistics import WindowStatistics
from outstation.ml.drift.detectors.gate import GateObservation, GateRun, GateWindows
from outstation.ml.drift.detectors.registry import GATES, GateStates
from outstation.ml.drift.faults import faults
from outstation.ml.drift.faults.faults import FaultIndicators
from outstation.ml.drift.reporting.training_distance import describe_training_distance
from outstation.ml.drift.sequential import sequence
from outstation.ml.drift.sequential.test_suite import DriftTester, Evidence, SuiteState
from outstation.ml.drift.state import Batch, BatchPart, DriftState, DriftWindowResult, QuietRun
from outstation.ml.kernel import library as kernel
from outstation.protocol.alerts.alert import Alert

# Fields of drift windows that are looked at together: fewer cost more calls of Python, more need more memory. Wide rows
# are looked at in so many windows, if these have no more fields than the second number.
MAX_FIELDS_PER_PASS, MAX_FIELDS_PER_LARGE_PASS, LARGE_PASS_WINDOWS = 640, 4096, 32
# About; NumPy makes sorted copies of rows as float64.
MAX_VALUES_PER_COMPILED_PASS, MAX_VALUES_PER_NUMPY_PASS = 1 << 21, 1 << 17


class MeasuredPart(msgspec.Struct, frozen=True, eq=False):
    """Consecutive complete windows as their rows `part` show them, whatever the model answers."""

    index: slice  # of the complete windows
    part: BatchPart
    rows: Float32s  # (W, n, F)
    counted: tuple[RowCounts, Tail]


class CompleteWindows(msgspec.Struct, frozen=True, eq=False):
    """The next W drift windows, of n rows each, from model window number `first` of the batch on.

    `begin` (W,) and `starts` (W, w) are offsets into the batch.
    """

    first: int
    begin: Ints
    starts: Ints
    n: int

    @property
    def windows(self) -> int:
        return len(self.begin)

    def measure(self, shipped: Reference, batch: Batch) -> MeasuredWindows:
        """Measure what does not depend on the model's answers: most of the time that the windows take."""
        each = max(1, max_rows_per_pass(batch) // self.n)
        indices = (slice(at, min(at + each, self.windows)) for at in range(0, self.windows, each))
        return MeasuredWindows(self, batch.first_row, [self._measure_part(shipped, batch, index) for index in indices])

    def _measure_part(self, shipped: Reference, batch: Batch, index: slice) -> MeasuredPart:
        part = batch.slice_windows(self._model_windows(index), shipped)
        rows = self._gather_rows(part.values, self.begin[index] - part.begin)
        return MeasuredPart(index, part, rows, count_rows(shipped, rows, Tail.empty(rows.shape[2])))

    def _model_windows(self, index: slice) -> slice:
        count = self.starts.shape[1]
        return slice(self.first + index.start * count, self.first + index.stop * count)

    def summarize(
        self,
        shipped: Reference,
        batch: Batch,
        measured: MeasuredWindows | None,
        assign_classes: Callable[[WindowStatistics, Ints], Ints],
    ) -> FullWindows:
        """Summarize them; `measured`, which this uses up, may be of other windows or rows, and is then left alone.

        `assign_classes` maps statistics of model windows and the named classes to the classes they are compared with.
        """
        if measured is None or not measured.is_for(self, batch):
            measured = self.measure(shipped, batch)
        parts = list[Summary]()
        while measured.parts:
            # Not held any longer: the next windows take the same memory.
            parts.append(self._summarize_part(shipped, batch, measured.parts.pop(0), assign_classes))
        begin, end = self.begin, self.begin + self.n - 1
        count = self.starts.shape[1]
        return FullWindows(
            summary.concatenate(parts),
            list(zip((batch.first_row + begin).tolist(), (batch.first_row + end).tolist(), strict=True)),
            list(zip(batch.t[begin].tolist(), batch.t[end].tolist(), strict=True)),
            list(range(self.first + count, self.first + count * self.windows + 1, count)),
        )

    def _summarize_part(
        self,
        shipped: Reference,
        batch: Batch,
        measured: MeasuredPart,
        assign_classes: Callable[[WindowStatistics, Ints], Ints],
    ) -> Summary:
        starts, answers = self.starts[measured.index], batch.slice_answers(self._model_windows(measured.index))
        if shipped.windowed:
            spans = batch.t[starts + shipped.window_rows - 1] - batch.t[starts]
        else:
            spans = np.diff(batch.t[starts], axis=1)
        stats = measured.part.stats
        stack, _ = summary.summarize_windows(
            shipped,
            measured.rows,
            spans,
            stats,
            classes=assign_classes(stats, answers["predicted"]),
            counted=measured.counted,
            **answers,
        )
        return stack

    def _gather_rows(self, values: Float32s, begin: Ints) -> Float32s:
        """Return the rows (W, n, F)."""
        windows, fields = len(begin), values.shape[1]
        if (begin[1:] - begin[:-1] == self.n).all():
            # One after another, as they are where readings come without a pause: no copy.
            return values[begin[0] : begin[0] + windows * self.n].reshape(windows, self.n, fields)
        return np.asarray(values[begin[:, None] + np.arange(self.n)])


class MeasuredWindows(msgspec.Struct, frozen=True, eq=False):
    """Complete windows of a batch from row `first_row` on, measured in parts."""

    windows: CompleteWindows
    first_row: int
    parts: list[MeasuredPart]

    def is_for(self, windows: CompleteWindows, batch: Batch) -> bool:
        """Return True if it is of these windows, and was not used yet."""
        mine = self.windows
        return (
            bool(self.parts)
            and (self.first_row, mine.first, mine.n) == (batch.first_row, windows.first, windows.n)
            and np.array_equal(mine.begin, windows.begin)
            and np.array_equal(mine.starts, windows.starts)
        )


class FullWindows(msgspec.Struct, frozen=True, eq=False, dict=True):
    """W consecutive drift windows that are full."""

    summaries: Summary
    rows: list[tuple[int, int]]  # of each the first and the last one
    t: list[tuple[int, int]]  # their times
    ends: list[int]  # how many model windows of the batch there are up to the end of each

    @classmethod
    def from_state(cls, state: DriftState, end: int) -> FullWindows:
        """Return the open window of `state`."""
        return cls(summary.stack_one(state.open_summary), [state.rows], [state.t], [end])

    def extend(self, more: FullWindows) -> FullWindows:
        """Append others."""
        stack = summary.concatenate([self.summaries, more.summaries])
        return FullWindows(stack, self.rows + more.rows, self.t + more.t, self.ends + more.ends)

    @property
    def windows(self) -> int:
        return len(self.rows)

    @cached_property
    def start_times(self) -> Ints:
        """(W,) begin of each, epoch µs."""
        return np.array([begin for begin, _ in self.t])

    @property
    def midpoints(self) -> Ints:
        """(W,) middle of each, epoch µs."""
        return np.array([sum(both) // 2 for both in self.t])

    def open_windows(self, state: DriftState, index: slice, *, summarized: bool) -> DriftState:
        """Return `state`, that after the window before, with the last of these windows as the open one."""
        rows = self.rows[index][-1]
        return replace(
            state,
            index=state.index + index.stop - index.start - (0 if index.start else 1),
            open_summary=summary.select_window(self.summaries, index.start) if summarized else state.open_summary,
            rows=rows,
            t=self.t[index][-1],
            last_counted_row=max(state.last_counted_row, rows[1]),
        )

    def build_result(
        self,
        index: slice,
        last: DriftState,
        *,
        learned_reference: Reference | None,
        learning_error: str | None,
        alerts: tuple[Alert, ...],
        nearest: Float64s | None,
    ) -> DriftWindowResult:
        """Return the result of these windows, still without members; `last` is the state that the last one closes."""
        rows, t, row_counts = self.rows[index], self.t[index], self.summaries.row_counts[index]
        return DriftWindowResult(
            index=last.index - len(rows) + 1,
            rows=(rows[0][0], rows[-1][1]),
            t=(t[0][0], t[-1][1]),
            row_count=int(row_counts.sum()),
            site_digest=last.site_reference.digest if last.site_reference else None,
            learned_reference=learned_reference,
            learning_error=learning_error,
            members={},
            alerts=alerts,
            quiet=None if nearest is None else QuietRun(np.array(rows), np.array(t), row_counts, nearest),
        )


def find_complete_windows(
    shipped: Reference, batch: Batch, first: int, window: int, last_counted_row: int
) -> CompleteWindows | None:
    """Find drift windows of `window` model windows, from model window `first` on, of rows not counted before.

    None if the next one ends later, has gaps or is too large.
    """
    fields = batch.features.shape[1]
    most = max(1, MAX_FIELDS_PER_PASS // fields, min(LARGE_PASS_WINDOWS, MAX_FIELDS_PER_LARGE_PASS // fields))
    left = (len(batch.starts) - first) // window
    if left == 0:
        return None
    # As many passes as needed, of as few windows as these allow: memory is that of the largest.
    count = -(-left // -(-left // most))
    rows = shipped.window_rows
    starts = batch.starts[first : first + count * window].reshape(count, window)
    ends = starts[:, -1] + rows
    # A row in several model windows counts in the first drift window that has it.
    begin = starts[:, 0].copy()
    begin[0] = max(begin[0], last_counted_row + 1 - batch.first_row)
    np.maximum(begin[1:], ends[:-1], out=begin[1:])
    n = ends - begin
    fit = (n == n[0]) & (n > 0) & (starts[:, 1:] - starts[:, :-1] <= rows).all(1)
    count = len(fit) if fit.all() else int(fit.argmin())
    if not count or n[0] > max_rows_per_pass(batch):
        return None
    return CompleteWindows(first, begin[:count], starts[:count], int(n[0]))


def max_rows_per_pass(batch: Batch) -> int:
    most = MAX_VALUES_PER_NUMPY_PASS if kernel.kernel() is None else MAX_VALUES_PER_COMPILED_PASS
    return max(1, most // int(batch.features.shape[1]))


class WindowAnalysis(msgspec.Struct, frozen=True, dict=True):
    """Analysis of W drift windows, which does not depend on earlier windows."""

    summaries: Summary
    indicators: FaultIndicators
    gates: dict[str, Sequence[GateObservation]]  # what each gate observed
    evidence: Evidence | None  # against the site's reference

    @cached_property
    def faulty(self) -> list[bool]:
        """(W,) True if there is any sign of a fault."""
        signs: list[bool] = self.indicators.has_indication.tolist()
        for observations in self.gates.values():
            signs = [sign or bool(seen.fault) for sign, seen in zip(signs, observations, strict=True)]
        return signs

    @classmethod
    def from_summaries(
        cls, summaries: Summary, midpoints: Ints, shipped: Reference, tester: DriftTester | None
    ) -> WindowAnalysis:
        """Analyze stacked summaries in the middle of times (W,), epoch µs; `tester` is that of the site's reference."""
        windows = GateWindows(
            summaries.detectors, summaries.sampling.mean_step_us(), summaries.repeated_share, midpoints
        )
        baselines = tester.reference.baselines if tester else {}
        return cls(
            summaries,
            faults.compute_indicators(summaries, shipped, midpoints, tester.reference if tester else None),
            {gate.name: gate.observe(windows, baselines.get(gate.name)) for gate in GATES},
            tester.compute_evidence(summaries, midpoints) if tester else None,
        )

    def build_gate_alerts(
        self,
        number: int,
        previous: GateStates,
        closed: DriftState,
        current: GateStates,
        site: Reference | None,
        shipped: Reference,
    ) -> list[Alert]:
        """Build the alerts that gates raise and clear with window `number`, which state `closed` closes."""
        if site is None:
            return []
        evidence = {"window": closed.index, "rows": list(closed.rows), "site": site.digest}
        alerts: list[Alert] = []
        for gate in GATES:
            name = gate.name
            states = previous[name], current[name], self.gates[name][number]
            alerts += gate.build_alerts(*states, site.baselines[name], closed.t, evidence)
        if not any(alert.state == "raised" for alert in alerts):
            return alerts
        unlike, distance = describe_training_distance(summary.select_window(self.summaries, number), shipped)
        return [
            replace(alert, summary=f"{alert.summary.removesuffix('.')}{unlike}.", evidence=alert.evidence | distance)
            if alert.state == "raised"
            else alert
            for alert in alerts
        ]


class AdvancedTests(msgspec.Struct, frozen=True, eq=False):
    """Tests of consecutive windows up to the last quiet one, or of a single window that is not quiet."""

    windows: int
    suite: SuiteState
    gates: GateStates
    blocked: bool  # kept out of drift tests and of learning
    nearest: Float64s | None  # (windows,) largest sum of each as a share of its limit; None if not quiet


def advance_tests(
    state: DriftState,
    tester: DriftTester | None,
    analysis: WindowAnalysis,
    first: int,
    start_times: Ints,
    *,
    has_fault: bool,
    plain: int,
) -> AdvancedTests:
    """Advance the tests over windows from number `first` on, of which that one `has_fault` or not.

    So many of them are `plain`: without any sign of a fault.
    """
    suite, gates, evidence = state.suite, state.gates, analysis.evidence
    if tester is None or evidence is None:
        return AdvancedTests(1, suite, gates, has_fault or gates.block_window, None)
    ahead = slice(first, first + max(1, plain))
    runs = _run_gates(state, tester.reference, analysis, ahead, start_times)
    free = 0 if has_fault else min(run.windows_before_block for run in runs.values())
    if not free:
        gates = gates if has_fault else _gates_after(runs, 1)
        # Sums of fields may come from wrong classes that the model has named since a gate drifts.
        return AdvancedTests(1, suite.reset_except_open() if gates.drifting else suite, gates, True, None)
    ahead = slice(first, first + free)
    tests = sequence.run_tests(tester, suite, evidence[ahead], start_times[ahead])
    before_alarm = tests.windows_before_alarm
    windows, nearest = max(1, before_alarm), None
    if plain and before_alarm:
        nearest = _nearest_shares(tests.cusum.values[:windows], tester.limits.limit * suite.caution, runs)
    return AdvancedTests(windows, tests.state_after(windows), _gates_after(runs, windows), False, nearest)


def _run_gates(
    state: DriftState, site: Reference, analysis: WindowAnalysis, ahead: slice, start_times: Ints
) -> dict[str, GateRun]:
    fields_drift = any_true(state.suite.open_fields)
    return {
        gate.name: gate.run(
            state.gates[gate.name],
            analysis.gates[gate.name][ahead],
            site.baselines[gate.name],
            start_times[ahead],
            fields_drift=fields_drift,
            to_clear=site.task.windows_to_clear,
        )
        for gate in GATES
    }


def _gates_after(runs: Mapping[str, GateRun], windows: int) -> GateStates:
    return GateStates({name: run.state_after(windows) for name, run in runs.items()})


def count_plain_windows(state: DriftState, analysis: WindowAnalysis, first: int) -> int:
    """Return the number of windows from number `first` on without any sign of a fault; 0 while an alert is open."""
    is_open = state.faults.any_open or any(gate.is_open for gate in state.gates.values())
    if is_open or state.is_inherited or any_true(state.suite.open_subjects):
        return 0
    faulty = analysis.faulty[first:]
    return faulty.index(True) if True in faulty else len(faulty)


def _nearest_shares(sums: Float64s, limit: Float64s, gates: Mapping[str, GateRun]) -> Float64s | None:
    """Return the largest of all sums, (W, 2, T) and of `gates`, as a share of its limit (W,), 3 decimals.

    `limit` (T,) is that of the sums. None if a gate waits.
    """
    nearest = (np.maximum(sums[:, 0], sums[:, 1]) / limit).max(1)
    for run in gates.values():
        shares = run.nearest_shares(len(sums))
        if shares is None:
            return None
        nearest = np.maximum(nearest, shares)
    return np.asarray(nearest.round(3))
