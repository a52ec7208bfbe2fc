"""From row to row: the steps, runs of one value, and lone jumps, of W drift windows of as many rows at once."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.drift.codec import Floats, Ints

JUMP, AGREE = 10.0, 5.0  # robust sd of first differences

Rest = tuple[tuple[float, ...], ...]  # of each field, values that it may hold for long


class Tail(msgspec.Struct, frozen=True, eq=False):
    """What the next rows need of those before: the last two rows (up to 2, F), and how long each last value has run."""

    rows: Floats
    run: Ints
    t: int = 0  # epoch µs of the last one

    @classmethod
    def empty(cls, fields: int) -> Tail:
        return cls(np.empty((0, fields)), np.zeros(fields, np.int64))


class Trace(msgspec.Struct, frozen=True, eq=False):
    """The last `n` of `rows` (W, m, F), which follow on from the others, if any; NaN missing."""

    rows: Floats
    step: Floats  # (W, m - 1, F)
    n: int

    @classmethod
    def of(cls, rows: Floats, before: Floats | None = None) -> Trace:
        """Of `rows` (W, n, F); where W is 1, those `before` them (up to 2, F) may be known."""
        joined = rows if before is None or not len(before) else np.concatenate([before[None], rows], axis=1)
        return cls(joined, joined[:, 1:] - joined[:, :-1], rows.shape[1])

    @property
    def into(self) -> Floats:
        """(W, n or n - 1, F) steps that lead to one of the n rows."""
        return self.step[:, -self.n :] if self.n else self.step[:, :0]


def longest(trace: Trace, before: Ints, rest: Rest) -> tuple[Ints, Ints]:
    """Longest run of one value, and the run of the last one, (W, F), where the value before has run so long (F,).

    A value in `rest` has no runs.
    """
    windows, rows, fields = trace.rows.shape
    most, last = np.ones((windows, fields), np.int64), np.ones((windows, fields), np.int64)
    # Rows that say what the row before said, field after field; most say something else.
    window, field, at = np.nonzero((trace.into == 0).transpose(0, 2, 1))
    for one in (one for one, values in enumerate(rest) if values):
        goes_on = (field != one) | ~np.isin(trace.rows[window, at + rows - trace.into.shape[1], field], rest[one])
        window, field, at = window[goes_on], field[goes_on], at[goes_on]
    if not len(window):
        return most, last
    begins = np.flatnonzero(np.diff((window * fields + field) * rows + at, prepend=-2) != 1)
    ends = np.append(begins[1:], len(at)) - 1
    of = window[begins], field[begins]
    # The first row of a run is not counted yet; of one that goes on from the rows before, they are.
    earlier = np.where((at[begins] == 0) & (trace.n < rows), before[of[1]], 1)
    length = ends - begins + 1 + earlier
    np.maximum.at(most, of, length)
    open_end = at[ends] == trace.into.shape[1] - 1
    last[of[0][open_end], of[1][open_end]] = length[open_end]
    return most, last


def lone_jumps(trace: Trace, jump: Floats) -> Ints:
    """(W, F) rows that lie far from both neighbours, which agree.

    `jump` (F,) is the robust sd of first differences; 0 switches this off. A row's jump is judged once the row after it
    is there, so the counts are the same however the rows were cut.
    """
    far = np.abs(trace.step) > JUMP * jump
    lone = far[:, 1:] & far[:, :-1]
    if not lone.any():
        return np.zeros((len(trace.rows), len(jump)), np.int64)
    lone &= (np.abs(trace.rows[:, 2:] - trace.rows[:, :-2]) <= AGREE * jump) & (jump > 0)
    return np.asarray(lone.sum(1), dtype=np.int64)


def repeated(trace: Trace, rest: Rest) -> Ints:
    """(W,) rows equal to the one before in all fields, unless all of them rest. A missing value equals none."""
    # Most rows differ in the first field already.
    window, at = np.nonzero(trace.into[:, :, 0] == 0)
    same = (trace.into[window, at] == 0).all(1)
    window, at = window[same], at[same]
    if not len(window):
        return np.zeros(len(trace.rows), np.int64)
    rows = trace.rows[window, at + trace.rows.shape[1] - trace.into.shape[1]]
    resting = np.stack([np.isin(rows[:, i], values) for i, values in enumerate(rest)], axis=1)
    return np.bincount(window[~resting.all(1)], minlength=len(trace.rows))
