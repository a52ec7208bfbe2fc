"""Drift windows that a batch holds from their first row to their last, all of one size: summarized at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from agent.drift import summary
from agent.drift.codec import Floats, Ints
from agent.drift.reference import Reference
from agent.drift.state import Batch, State
from agent.drift.summary import Summary


@dataclass(frozen=True, eq=False)
class Whole:
    """The next W drift windows, of n rows each. `begin` (W,) and `starts` (W, w) are offsets into the batch."""

    begin: Ints
    starts: Ints
    n: int

    @property
    def windows(self) -> int:
        return len(self.begin)

    def summarized(self, shipped: Reference, batch: Batch, first: int, classes: Ints) -> Summary:
        """Stacked. `first` is the number of the first model window, `classes` (W · w,) what they are compared with."""
        some = slice(first, first + self.starts.size)
        if shipped.windowed:
            spans = batch.t[self.starts + shipped.window_rows - 1] - batch.t[self.starts]
        else:
            spans = np.diff(batch.t[self.starts], axis=1)
        return summary.whole(
            shipped,
            self._rows(batch),
            spans,
            batch.found[some],
            batch.named[some],
            None if batch.top is None else batch.top[some],
            classes,
        )

    def _rows(self, batch: Batch) -> Floats:
        """(W, n, F)"""
        begin, fields = int(self.begin[0]), batch.values.shape[1]
        if (np.diff(self.begin) == self.n).all():
            # One after another, as they are where readings come without a pause: no copy.
            return batch.values[begin : begin + self.windows * self.n].reshape(self.windows, self.n, fields)
        return np.asarray(batch.values[self.begin[:, None] + np.arange(self.n)])

    def filled(self, state: State, batch: Batch, stack: Summary, number: int) -> State:
        """`state`, which is that after the window before, with window `number` of the `stack` as the open one."""
        rows, t = self.place(batch, number)
        index = state.index + 1 if number else state.index
        return replace(state, index=index, open=summary.at(stack, number), rows=rows, t=t, seen=rows[1])

    def place(self, batch: Batch, number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The first and the last row of window `number`, and their times."""
        begin, end = int(self.begin[number]), int(self.begin[number]) + self.n - 1
        return (batch.first + begin, batch.first + end), (int(batch.t[begin]), int(batch.t[end]))


def ahead(state: State, shipped: Reference, batch: Batch, first: int, most: int) -> Whole | None:
    """From model window number `first` on, at most so many; None where the next one was begun before, ends later, or
    has gaps."""
    count = min((len(batch.starts) - first) // state.window, most)
    if count == 0 or state.open.windows:
        return None
    rows = shipped.window_rows
    starts = batch.starts[first : first + count * state.window].reshape(count, state.window)
    ends = starts[:, -1] + rows
    # A row in several model windows counts in the first drift window that has it.
    before = np.concatenate([[state.seen + 1 - batch.first], ends[:-1]])
    begin = np.maximum(starts[:, 0], before)
    n = ends - begin
    fit = (n == n[0]) & (n > 0) & (np.diff(starts, axis=1) <= rows).all(1)
    count = len(fit) if fit.all() else int(fit.argmin())
    return Whole(begin[:count], starts[:count], int(n[0])) if count else None
