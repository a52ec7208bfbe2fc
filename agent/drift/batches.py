"""Batches of drift windows: windows that a batch holds whole are summarized, analyzed and, while quiet, tested
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec
import numpy as np
from msgspec.structs import replace

from agent.arrays import Bools, Float64s, Ints
from agent.drift import sampling_rate_watch
from agent.drift.baseline import summary
from agent.drift.baseline.reference import Reference
from agent.drift.baseline.summary import Summary
from agent.drift.baseline.window_statistics import WindowStatistics
from agent.drift.detectors.season import SlowTrend
from agent.drift.faults import faults
from agent.drift.faults.faults import FaultIndicators
from agent.drift.sampling_rate_watch import RateObservation, SamplingRateWatch
from agent.drift.state import Batch, DriftState
from agent.drift.testing import sequence
from agent.drift.testing.test_suite import DriftTester, Evidence, SuiteState

MAX_FIELDS_PER_PASS = 256  # of drift windows that are looked at together
MAX_VALUES_PER_PASS = 1 << 15  # about: more are slower, as they do not stay near the processor, and need more memory


class CompleteWindows(msgspec.Struct, frozen=True, eq=False):
    """The next W drift windows, of n rows each. `begin` (W,) and `starts` (W, w) are offsets into the batch."""

    begin: Ints
    starts: Ints
    n: int

    @property
    def windows(self) -> int:
        return len(self.begin)

    def summarize(
        self, shipped: Reference, batch: Batch, first: int, assign_classes: Callable[[WindowStatistics, Ints], Ints]
    ) -> FullWindows:
        """Summarize them; `first` is the number of the first model window.

        `assign_classes` maps statistics of model windows and the named classes to the classes they are compared with.
        """
        each = max(1, MAX_VALUES_PER_PASS // (self.n * batch.features.shape[1]))
        parts = [
            self._summarize_part(shipped, batch, first, slice(at, min(at + each, self.windows)), assign_classes)
            for at in range(0, self.windows, each)
        ]
        begin, end = self.begin, self.begin + self.n - 1
        count = self.starts.shape[1]
        return FullWindows(
            summary.concatenate(parts),
            list(zip((batch.first_row + begin).tolist(), (batch.first_row + end).tolist(), strict=True)),
            list(zip(batch.t[begin].tolist(), batch.t[end].tolist(), strict=True)),
            list(range(first + count, first + count * self.windows + 1, count)),
        )

    def _summarize_part(
        self,
        shipped: Reference,
        batch: Batch,
        first: int,
        index: slice,
        assign_classes: Callable[[WindowStatistics, Ints], Ints],
    ) -> Summary:
        starts, begin = self.starts[index], self.begin[index]
        at = first + index.start * starts.shape[1]
        part = batch.slice_windows(slice(at, at + starts.size), shipped)
        if shipped.windowed:
            spans = batch.t[starts + shipped.window_rows - 1] - batch.t[starts]
        else:
            spans = np.diff(batch.t[starts], axis=1)
        rows, named = self._gather_rows(part.values, begin - part.begin), part.predicted
        return summary.summarize_windows(
            shipped, rows, spans, part.stats, named, part.top_scores, assign_classes(part.stats, named)
        )

    def _gather_rows(self, values: Float64s, begin: Ints) -> Float64s:
        """Return the rows (W, n, F)."""
        windows, fields = len(begin), values.shape[1]
        if (begin[1:] - begin[:-1] == self.n).all():
            # One after another, as they are where readings come without a pause: no copy.
            return values[begin[0] : begin[0] + windows * self.n].reshape(windows, self.n, fields)
        return np.asarray(values[begin[:, None] + np.arange(self.n)])


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

    def open_window(self, state: DriftState, number: int) -> DriftState:
        """Return `state`, which is that after the window before, with window `number` as the open one."""
        rows, index = self.rows[number], state.index + 1 if number else state.index
        seen = max(state.last_counted_row, rows[1])
        return replace(
            state,
            index=index,
            open_summary=summary.select_window(self.summaries, number),
            rows=rows,
            t=self.t[number],
            last_counted_row=seen,
        )


def find_complete_windows(
    shipped: Reference, batch: Batch, first: int, window: int, last_counted_row: int
) -> CompleteWindows | None:
    """Find drift windows of `window` model windows, from model window `first` on, of rows not counted before.

    None if the next one ends later, has gaps or is too large.
    """
    most = max(1, MAX_FIELDS_PER_PASS // batch.features.shape[1])
    count = min((len(batch.starts) - first) // window, most)
    if count == 0:
        return None
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
    return CompleteWindows(begin[:count], starts[:count], int(n[0]))


def max_rows_per_pass(batch: Batch) -> int:
    return max(1, MAX_VALUES_PER_PASS // int(batch.features.shape[1]))


class WindowAnalysis(msgspec.Struct, frozen=True):
    """Analysis of W drift windows, which does not depend on earlier windows."""

    summaries: Summary
    indicators: FaultIndicators
    rate_observations: list[RateObservation]
    evidence: Evidence | None  # against the site's reference

    @classmethod
    def from_summaries(
        cls, summaries: Summary, midpoints: Ints, shipped: Reference, tester: DriftTester | None
    ) -> WindowAnalysis:
        """Analyze stacked summaries in the middle of times (W,), epoch µs; `tester` is that of the site's reference."""
        return cls(
            summaries,
            faults.compute_indicators(summaries, shipped, tester.reference if tester else None),
            sampling_rate_watch.observe_rate(summaries, midpoints, tester),
            tester.compute_evidence(summaries, midpoints) if tester else None,
        )


class QuietWindows(msgspec.Struct, frozen=True, eq=False):
    """W drift windows in which nothing happens: the state after the last, and sums after each."""

    suite: SuiteState
    slow_trend: SlowTrend
    rate_watch: SamplingRateWatch
    cusum_sums: Float64s  # (W, 2, T)
    speed_sums: Float64s  # (W, 2)

    @property
    def windows(self) -> int:
        return len(self.cusum_sums)


def find_quiet_windows(
    state: DriftState,
    tester: DriftTester,
    signs: Bools,
    observations: Sequence[RateObservation],
    evidence: Evidence,
    t: Ints,
) -> QuietWindows | None:
    """Return the windows before the first that may have a fault or raises an alert; None if that is the first one.

    `signs` (W,) say which may have a fault; they began at `t` (W,). None also while an alert is open.
    """
    is_open = state.faulty.any() or state.misread.any() or state.rate_watch.open_fault or state.rate_watch.drifting
    if is_open or state.suite.open_subjects.any():
        return None
    faulty = [bool(sign or tick.fault) for sign, tick in zip(signs.tolist(), observations, strict=True)]
    windows = faulty.index(True) if True in faulty else len(faulty)
    if not windows:
        return None
    tests = sequence.run_tests(tester, state.suite, evidence[:windows], t[:windows])
    paces = sampling_rate_watch.run_speed_cusum(state.rate_watch, observations[:windows], tester, t[:windows])
    windows = tests.windows_before_alarm
    if paces is not None and paces.exceeds_limit[:windows].any():
        windows = int(paces.exceeds_limit.argmax())
    if not windows:
        return None
    now, before = state.slow_trend, state.rate_watch.cusum.value[:, 0]
    return QuietWindows(
        suite=tests.state_after(windows),
        slow_trend=now.add(evidence.z[:windows, : len(state.fields)], t[:windows]),
        rate_watch=sampling_rate_watch.apply_quiet_windows(state.rate_watch, paces, windows),
        cusum_sums=tests.cusum.values[:windows],
        speed_sums=np.tile(before, (windows, 1)) if paces is None else paces.values[:windows, :, 0],
    )
