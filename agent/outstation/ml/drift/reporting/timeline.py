"""Drift timeline of one task on one device, of bounded length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from outstation.foundation.arrays import Ints
from outstation.ml.drift.reporting.parsed_message import ExpectedPerformance, SubjectReport, WindowReport

EARLIEST_US = 946_684_800_000_000  # 2000-01-01; a clock that was never set says 1970
MAX_POINTS = 480  # then neighbors are merged
MAX_SHARES = 4 * MAX_POINTS  # as runs of windows have one point
_STATE_SEVERITY = {"untested": 0, "ok": 1, "insufficient": 2, "drift": 3, "fault": 4}


class Point(msgspec.Struct, frozen=True):
    """One drift window, a run of quiet ones, or merged neighbors with the largest sums and the worst states.

    Times are epoch µs.
    """

    t: tuple[int, int]
    subjects: dict[str, SubjectReport]
    expected: ExpectedPerformance | None
    further_expected: Mapping[str, ExpectedPerformance] = {}  # of further outputs

    def merge(self, later: Point) -> Point:
        names = [*self.subjects, *(name for name in later.subjects if name not in self.subjects)]
        both = {name: _worse_report(self.subjects.get(name), later.subjects.get(name)) for name in names}
        worse = later.expected if self.expected is None else self.expected.find_worse(later.expected)
        further = {**later.further_expected, **self.further_expected}
        further |= {name: known.find_worse(later.further_expected.get(name)) for name, known in further.items()}
        return Point((self.t[0], max(self.t[1], later.t[1])), both, worse, further)


class StateHistogram(msgspec.Struct):
    """Rows of a field below, in and above the reference's bins, over a number of drift windows of one state."""

    windows: int
    counts: Ints


class Timeline(msgspec.Struct):
    """Timeline; reports of windows are added in the order of their time.

    `nearest`: end of each window, and the largest sum of any test then as a share of its limit; of neighbors the larger
    one, where windows are many. `histograms` per field and state; those of "drift" cover the last spell only. Windows
    with a fault are left out.
    """

    points: list[Point] = msgspec.field(default_factory=list)
    windows: int = 0
    reports: int = 0
    reports_per_point: int = 1
    nearest: list[tuple[int, float | None]] = msgspec.field(default_factory=list)
    windows_per_share: int = 1
    histograms: dict[str, dict[str, StateHistogram]] = msgspec.field(default_factory=dict)
    _last_state: dict[str, str] = msgspec.field(default_factory=dict)

    def add(self, window: WindowReport) -> None:
        point = Point(window.t, window.subjects, window.expected, window.further_expected)
        if window.state != "fault":
            self._add_histograms(window)
        if self.points and self.reports % self.reports_per_point:
            self.points[-1] = self.points[-1].merge(point)
        else:
            self.points.append(point)
        for end, share in zip(window.ends, window.nearest, strict=True):
            self._add_share(end, share)
        self.reports += 1
        if len(self.points) == MAX_POINTS:
            self.points = [a.merge(b) for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self.reports_per_point *= 2

    def _add_share(self, end: int, share: float | None) -> None:
        if self.nearest and self.windows % self.windows_per_share:
            self.nearest[-1] = (end, _larger_share(self.nearest[-1][1], share))
        else:
            self.nearest.append((end, share))
        self.windows += 1
        if len(self.nearest) == MAX_SHARES:
            pairs = zip(self.nearest[::2], self.nearest[1::2], strict=True)
            self.nearest = [(later[0], _larger_share(earlier[1], later[1])) for earlier, later in pairs]
            self.windows_per_share *= 2

    def latest(self, field_name: str) -> tuple[str, StateHistogram] | None:
        """Return the field's last state, faults apart, and its rows in that state."""
        state = self._last_state.get(field_name)
        return None if state is None else (state, self.histograms[field_name][state])

    def _add_histograms(self, window: WindowReport) -> None:
        for name, report in window.fields.items():
            states = self.histograms.setdefault(name, {})
            if report.state not in _STATE_SEVERITY:
                continue
            before, counts = states.get(report.state), report.histogram()
            if before is not None and len(before.counts) != len(counts):
                continue
            begins = report.state == "drift" and self._last_state.get(name) != "drift"
            if before is None or begins:
                states[report.state] = StateHistogram(window.windows, counts)
            else:
                states[report.state] = StateHistogram(before.windows + window.windows, before.counts + counts)
            self._last_state[name] = report.state

    def spells(self, subject: str, state: str) -> Iterator[tuple[int, int, bool]]:
        """Yield (first, last, ongoing) of each run of points in which `subject` was in `state`; epoch µs."""
        begin = end = None
        for point in self.points:
            report = point.subjects.get(subject)
            if report is not None and report.state == state:
                begin, end = (point.t[0] if begin is None else begin), point.t[1]
            elif begin is not None and end is not None:
                yield begin, point.t[1], False
                begin = end = None
        if begin is not None and end is not None:
            yield begin, end, True


def _larger_share(a: float | None, b: float | None) -> float | None:
    return max((share for share in (a, b) if share is not None), default=None)


def _worse_report(a: SubjectReport | None, b: SubjectReport | None) -> SubjectReport:
    if a is None or b is None:
        known = a or b
        assert known is not None
        return known
    state = max(a.state, b.state, key=lambda name: _STATE_SEVERITY.get(name, 0))
    limit = b.limit if b.limit is not None else a.limit
    return SubjectReport(state, max(a.mean, b.mean), max(a.spread, b.spread), limit)
