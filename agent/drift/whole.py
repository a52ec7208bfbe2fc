"""Drift windows that a batch holds from their first row to their last, all of one size: summarized at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from agent.drift import summary
from agent.drift.codec import Floats, Ints
from agent.drift.reference import Reference
from agent.drift.state import Batch, State
from agent.drift.statistics import Found
from agent.drift.summary import Summary

FIELDS_AT_ONCE = 256  # of drift windows that are looked at together
VALUES_AT_ONCE = 1 << 15  # about: more are slower, as they do not stay near the processor, and need more memory


@dataclass(frozen=True, eq=False)
class Whole:
    """The next W drift windows, of n rows each. `begin` (W,) and `starts` (W, w) are offsets into the batch."""

    begin: Ints
    starts: Ints
    n: int

    @property
    def windows(self) -> int:
        return len(self.begin)

    def summarized(
        self, shipped: Reference, batch: Batch, first: int, classes: Callable[[Found, Ints], Ints]
    ) -> Summary:
        """Stacked. `first` is the number of the first model window; `classes` tells of what was found in model windows,
        and of those that were named, with which they are compared."""
        each = max(1, VALUES_AT_ONCE // (self.n * batch.features.shape[1]))
        parts = [
            self._part(shipped, batch, first, slice(at, min(at + each, self.windows)), classes)
            for at in range(0, self.windows, each)
        ]
        return summary.joined(parts)

    def _part(
        self, shipped: Reference, batch: Batch, first: int, some: slice, classes: Callable[[Found, Ints], Ints]
    ) -> Summary:
        starts, begin = self.starts[some], self.begin[some]
        at = first + some.start * starts.shape[1]
        part = batch.part(slice(at, at + starts.size), shipped)
        if shipped.windowed:
            spans = batch.t[starts + shipped.window_rows - 1] - batch.t[starts]
        else:
            spans = np.diff(batch.t[starts], axis=1)
        rows, named = self._rows(part.values, begin - part.begin), part.named
        return summary.whole(shipped, rows, spans, part.found, named, part.top, classes(part.found, named))

    def _rows(self, values: Floats, begin: Ints) -> Floats:
        """(W, n, F)"""
        windows, fields = len(begin), values.shape[1]
        if (begin[1:] - begin[:-1] == self.n).all():
            # One after another, as they are where readings come without a pause: no copy.
            return values[begin[0] : begin[0] + windows * self.n].reshape(windows, self.n, fields)
        return np.asarray(values[begin[:, None] + np.arange(self.n)])

    def filled(self, state: State, batch: Batch, stack: Summary, number: int) -> State:
        """`state`, which is that after the window before, with window `number` of the `stack` as the open one."""
        rows, t = self.place(batch, number)
        index = state.index + 1 if number else state.index
        return replace(state, index=index, open=summary.at(stack, number), rows=rows, t=t, seen=rows[1])

    def place(self, batch: Batch, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first and the last row of window `number`, and their times."""
        begin, end = int(self.begin[number]), int(self.begin[number]) + self.n - 1
        return (batch.first + begin, batch.first + end), (int(batch.t[begin]), int(batch.t[end]))


def ahead(state: State, shipped: Reference, batch: Batch, first: int) -> Whole | None:
    """From model window number `first` on; None where the next one was begun before, ends later, has gaps or is too
    large."""
    most = max(1, FIELDS_AT_ONCE // batch.features.shape[1])
    count = min((len(batch.starts) - first) // state.window, most)
    if count == 0 or state.open.windows:
        return None
    rows = shipped.window_rows
    starts = batch.starts[first : first + count * state.window].reshape(count, state.window)
    ends = starts[:, -1] + rows
    # A row in several model windows counts in the first drift window that has it.
    begin = starts[:, 0].copy()
    begin[0] = max(begin[0], state.seen + 1 - batch.first)
    np.maximum(begin[1:], ends[:-1], out=begin[1:])
    n = ends - begin
    fit = (n == n[0]) & (n > 0) & (starts[:, 1:] - starts[:, :-1] <= rows).all(1)
    count = len(fit) if fit.all() else int(fit.argmin())
    if not count or n[0] > rows_at_once(batch):
        return None
    return Whole(begin[:count], starts[:count], int(n[0]))


def rows_at_once(batch: Batch) -> int:
    return max(1, VALUES_AT_ONCE // int(batch.features.shape[1]))
