"""From row to row: the steps, runs of one value, and lone jumps, of W drift windows of as many rows at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.drift.codec import Floats, Ints

JUMP, AGREE = 10.0, 5.0  # robust sd of first differences

Rest = tuple[tuple[float, ...], ...]  # of each field, values that it may hold for long


@dataclass(frozen=True, eq=False)
class Tail:
    """What the next rows need of those before: the last two rows (up to 2, F), and how long each last value has run."""

    rows: Floats
    run: Ints
    t: int = 0  # epoch µs of the last one

    @classmethod
    def empty(cls, fields: int) -> Tail:
        return cls(np.empty((0, fields)), np.zeros(fields, np.int64))


@dataclass(frozen=True, eq=False)
class Trace:
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
    same = trace.into == 0
    window, field = np.nonzero(same.any(1))
    if not len(window):
        return most, last
    runs_on = same[window, :, field]
    if trace.n == rows:
        runs_on = np.concatenate([np.zeros((len(window), 1), np.bool_), runs_on], axis=1)
    for one in (one for one, values in enumerate(rest) if values):
        of_it = field == one
        runs_on[of_it] &= ~np.isin(trace.rows[window[of_it], -trace.n :, one], rest[one])
    place = np.arange(1, trace.n + 1)
    broken = np.maximum.accumulate(np.where(runs_on, 0, place), axis=1)
    length = np.where(broken > 0, place - broken + 1, before[field][:, None] + place)
    most[window, field], last[window, field] = length.max(1), length[:, -1]
    return most, last


def lone_jumps(trace: Trace, jump: Floats) -> Ints:
    """(W, F) rows that lie far from both neighbours, which agree.

    `jump` (F,) is the robust sd of first differences; 0 switches this off. A row's jump is judged once the row after it
    is there, so the counts are the same however the rows were cut.
    """
    far = np.abs(trace.step) > JUMP * jump
    lone = far[:, 1:] & far[:, :-1]
    if lone.any():
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
