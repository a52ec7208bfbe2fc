"""Merge of drift summaries: histograms and moments of many windows, and a history of bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Ints
from outstation.ml.comparison.tally import merge_moments
from outstation.ml.drift.reporting.parsed_message import ExpectedPerformance, FieldReport, WindowReport
from outstation.protocol.wire.messages import Moments

MAX_SPANS = 96
# Reports of a field that wait to be merged; few enough that memory grows with devices only.
_MAX_PENDING = 32
_FIRST_WIDTH_US = 60_000_000


class MergedField(msgspec.Struct, frozen=True, eq=False):
    """One field over drift windows.

    `counts` (bins + 2,): rows below, in each bin of the reference, and above; `missing`: rows without a value.
    """

    counts: Ints
    missing: int
    moments: Moments

    @classmethod
    def empty_like(cls, template: MergedField) -> MergedField:
        return cls(np.zeros_like(template.counts), 0, Moments())

    def __add__(self, other: MergedField) -> MergedField:
        """Merge both; any order and grouping gives the same up to rounding. Raises ValueError for unequal bins."""
        if len(self.counts) != len(other.counts):
            raise ValueError(f"histograms of {len(self.counts) - 2} and {len(other.counts) - 2} bins do not add up")
        moments = merge_moments(self.moments, other.moments)
        return MergedField(self.counts + other.counts, self.missing + other.missing, moments)

    @classmethod
    def sum_of(cls, reports: Sequence[FieldReport], start: MergedField | None = None) -> MergedField:
        """Merge reports, at least one, in their order, behind `start`. One sum of arrays, however many there are."""
        counts = np.array([[report.below, *report.counts, report.above] for report in reports], np.int64).sum(axis=0)
        missing, moments = sum(report.missing for report in reports), Moments()
        if start is not None:
            counts, missing, moments = counts + start.counts, missing + start.missing, start.moments
        for report in reports:
            if report.mean is not None and report.m2 is not None:
                moments = merge_moments(moments, Moments(report.n, report.mean, report.m2))
        return cls(counts, missing, moments)

    @property
    def sd(self) -> float:
        return math.sqrt(self.moments.m2 / self.moments.n) if self.moments.n else 0.0

    def counts_without(self, part: MergedField) -> Ints:
        """Return the counts of everything merged except `part`; exact."""
        return self.counts - part.counts


class FieldTotals:
    """Fields of one device over its drift windows: reports gather and are merged many at once."""

    def __init__(self) -> None:
        self._merged: dict[str, MergedField] = {}
        self._pending: dict[str, list[FieldReport]] = {}

    def add(self, fields: Mapping[str, FieldReport]) -> None:
        for name, report in fields.items():
            pending = self._pending.setdefault(name, [])
            pending.append(report)
            if len(pending) == _MAX_PENDING:
                self._merged[name] = MergedField.sum_of(pending, self._merged.get(name))
                pending.clear()

    def merge(self) -> dict[str, MergedField]:
        """Return each field over all windows so far."""
        for name, pending in self._pending.items():
            if pending:
                self._merged[name] = MergedField.sum_of(pending, self._merged.get(name))
                pending.clear()
        return self._merged


class PerformanceEstimates(msgspec.Struct):
    """Sums of what drift windows let expect without labels: accuracy (CBPE), or mean absolute error (DLE)."""

    accuracy_total: float = 0.0
    accuracy_count: int = 0
    error_total: float = 0.0
    error_count: int = 0
    further: dict[str, PerformanceEstimates] = {}  # by further output

    def add(self, window: WindowReport, windows: int) -> None:
        """Add the estimates of a run's windows, where they are the same for all."""
        self.add_output(window.expected, windows)
        for name, expected in window.further_expected.items():
            self.further.setdefault(name, PerformanceEstimates()).add_output(expected, windows)

    def add_output(self, expected: ExpectedPerformance | None, windows: int) -> None:
        """Add the estimates of one output."""
        if expected is None:
            return
        if expected.is_error:
            self.error_total += expected.value * windows
            self.error_count += windows
        else:
            self.accuracy_total += expected.value * windows
            self.accuracy_count += windows

    def merge(self, other: PerformanceEstimates) -> None:
        self.accuracy_total += other.accuracy_total
        self.accuracy_count += other.accuracy_count
        self.error_total += other.error_total
        self.error_count += other.error_count
        for name, further in other.further.items():
            self.further.setdefault(name, PerformanceEstimates()).merge(further)

    @property
    def accuracy(self) -> float | None:
        """Mean expected accuracy."""
        return self.accuracy_total / self.accuracy_count if self.accuracy_count else None

    @property
    def error(self) -> float | None:
        """Mean expected absolute error."""
        return self.error_total / self.error_count if self.error_count else None


class HistorySpan(msgspec.Struct):
    """The drift windows of all devices within a span of time; `expected` is of the first output only."""

    windows: int = 0
    drifting_devices: set[str] = msgspec.field(default_factory=set)
    faulty_devices: set[str] = msgspec.field(default_factory=set)
    expected: PerformanceEstimates = msgspec.field(default_factory=PerformanceEstimates)

    def merge(self, other: HistorySpan) -> None:
        self.windows += other.windows
        self.drifting_devices |= other.drifting_devices
        self.faulty_devices |= other.faulty_devices
        self.expected.merge(other.expected)


class DriftHistory:
    """Drift windows over time in at most `MAX_SPANS` equal spans, which widen as time passes; any order."""

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH_US
        self._spans: dict[int, HistorySpan] = {}

    def add(self, device: str, window: WindowReport) -> None:
        for end in window.ends:
            span = self._spans.get(end // self._width)
            if span is None:
                span = self._spans[end // self._width] = HistorySpan()
                while max(self._spans) - min(self._spans) >= MAX_SPANS:
                    self._widen()
                span = self._spans[end // self._width]
            span.windows += 1
            if window.state in ("drift", "fault"):
                (span.drifting_devices if window.state == "drift" else span.faulty_devices).add(device)
            span.expected.add_output(window.expected, 1)

    def merge(self, other: DriftHistory) -> None:
        """Add the windows of another history."""
        while self._width < other._width:
            self._widen()
        for index, span in other._spans.items():
            self._spans.setdefault(index * other._width // self._width, HistorySpan()).merge(span)
        while self._spans and max(self._spans) - min(self._spans) >= MAX_SPANS:
            self._widen()

    def __iter__(self) -> Iterator[tuple[int, int, HistorySpan]]:
        """Yield (from, to, span) of each span with a window; epoch µs."""
        for index in sorted(self._spans):
            yield index * self._width, (index + 1) * self._width, self._spans[index]

    def _widen(self) -> None:
        narrow, self._spans, self._width = self._spans, {}, self._width * 2
        for index, span in narrow.items():
            self._spans.setdefault(index // 2, HistorySpan()).merge(span)
