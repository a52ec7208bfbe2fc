"""Steps from row to row, runs of one value, and spikes, of W drift windows with equally many rows."""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.foundation.indices import bincount

SPIKE_SDS, NEIGHBOUR_SDS = 10.0, 5.0  # robust sd of first differences
MIN_STUCK_RUN, STUCK_RUN_FACTOR = 10, 5  # rows, and times the longest run of a reference

RestValues = tuple[tuple[float, ...], ...]  # values that each field may hold for long


def max_constant_run(longest: Ints) -> Ints:
    """Return the longest run (F,) of windows with one value that is still normal; the reference had `longest`."""
    return np.asarray(np.maximum(MIN_STUCK_RUN, STUCK_RUN_FACTOR * longest))


def max_normal_run(longest: Ints, rows: Ints) -> Ints:
    """Return the longest run (W, F) that is still normal, in windows of `rows` (W,) rows.

    It is never so long that a drift window could not show a longer one, unless the reference itself had such a run.
    """
    allowed = np.minimum(STUCK_RUN_FACTOR * longest, rows[:, None] - 1)
    return np.maximum(np.maximum(MIN_STUCK_RUN, allowed), longest)


class Tail(msgspec.Struct, frozen=True, eq=False):
    """End of the rows so far: the last two rows (up to 2, F), the last value of each field and how long it has run."""

    rows: Float64s
    last: Float64s  # (F,) NaN if there was none
    run: Ints
    t: int = 0  # epoch µs of the last one

    @classmethod
    def empty(cls, fields: int) -> Tail:
        return cls(np.empty((0, fields)), np.full(fields, np.nan), np.zeros(fields, np.int64))


class Trace(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Rows (W, m, F) of which the last `n` are new; the others came before them. NaN is missing."""

    rows: Float64s
    step: Float64s  # (W, m - 1, F)
    n: int

    @classmethod
    def from_rows(cls, rows: Float64s, before: Float64s | None = None) -> Trace:
        """Trace `rows` (W, n, F); if W is 1, up to two rows `before` them (2, F) may be known."""
        joined = rows if before is None or not len(before) else np.concatenate([before[None], rows], axis=1)
        return cls(joined, joined[:, 1:] - joined[:, :-1], rows.shape[1])

    @cached_property
    def steps_into(self) -> Float64s:
        """(W, n or n - 1, F) steps that lead to one of the n rows."""
        return self.step[:, -self.n :] if self.n else self.step[:, :0]

    @cached_property
    def zero_steps(self) -> Bools:
        """(W, n or n - 1, F) True for steps of 0."""
        return np.asarray(self.steps_into == 0)


def longest_runs(trace: Trace, tail: Tail, rest: RestValues) -> tuple[Ints, Ints]:
    """Return the longest run of one value and the run of the last value, (W, F) each.

    `tail` ends the rows before. A rest value has no runs; a missing value neither ends a run nor counts.
    """
    windows, rows, fields = trace.rows.shape
    known = np.full((windows, fields), rows, np.int64)
    follows = np.full(fields, trace.n < rows)
    if np.isnan(trace.rows).any():
        new = trace.rows[:, -trace.n :] if trace.n else trace.rows[:, :0]
        follows = ~np.isnan(tail.last)
        before = np.broadcast_to(tail.last, (windows, 1, fields))
        trace, known = _without_missing(np.concatenate([before, new], axis=1))
        rows = trace.rows.shape[1]
    longest = np.ones((windows, fields), np.int64)
    last = np.where(follows & (known == 1), np.maximum(tail.run, 1), 1)
    place = _find_repeats(trace, rest)
    if not len(place):
        return longest, last
    begins = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    ends = np.append(begins[1:], len(place)) - 1
    column, at = np.divmod(place[begins], rows)
    owner = np.divmod(column, fields)
    # The first row of a run is not counted yet, unless the run continues that of the rows before.
    earlier = np.where((at == 0) & follows[owner[1]], tail.run[owner[1]], 1)
    length = ends - begins + 1 + earlier
    np.maximum.at(longest, owner, length)
    open_end = place[ends] % rows == known[owner] - 2 - (rows - 1 - trace.steps_into.shape[1])
    last[owner[0][open_end], owner[1][open_end]] = length[open_end]
    return longest, last


def last_values(rows: Float64s, before: Float64s) -> Float64s:
    """Return the last value of each column of `rows` (n, F), or that of the rows `before` (F,)."""
    if len(rows) and not any_true(np.isnan(rows[-1])):
        return np.asarray(rows[-1], np.float64)
    joined = np.concatenate([before[None], rows])
    place = len(rows) - (~np.isnan(joined[::-1])).argmax(0)
    return np.asarray(joined[place, np.arange(rows.shape[1])])


def _without_missing(rows: Float64s) -> tuple[Trace, Ints]:
    """Move missing values behind all others, and return how many others there are (W, F)."""
    missing = np.isnan(rows)
    order = np.argsort(missing, axis=1, kind="stable")
    compact = np.take_along_axis(rows, order, axis=1)
    return Trace(compact, compact[:, 1:] - compact[:, :-1], rows.shape[1] - 1), (~missing).sum(1, dtype=np.int64)


def _find_repeats(trace: Trace, rest: RestValues) -> Ints:
    """Return places among (W, F, m), ascending, of rows that repeat the row before; most rows do not."""
    (_, rows, fields), count = trace.rows.shape, trace.steps_into.shape[1]
    row, field = np.divmod(np.flatnonzero(trace.zero_steps), fields)
    window, row = np.divmod(row, max(1, count))
    place = (window * fields + field) * rows + row
    for resting in (resting for resting, values in enumerate(rest) if values):
        goes_on = (field != resting) | ~np.isin(trace.rows[window, row + rows - count, field], rest[resting])
        window, field, row, place = window[goes_on], field[goes_on], row[goes_on], place[goes_on]
    return np.sort(place)


def count_spikes(trace: Trace, jump: Float64s, span: Float64s | None = None) -> Ints:
    """Count rows (W, F) that lie far from both neighbors while these agree.

    `jump` (F,) is the robust sd of first differences; 0 switches the count off. A row is judged once the row after it
    is there, so the counts do not depend on how the rows were cut. With the `span` (W, F) of all values, fields without
    room for a spike are skipped.
    """
    out = np.zeros((len(trace.rows), len(jump)), np.int64)
    fields = np.flatnonzero((jump > 0) & (True if span is None else ~(span <= SPIKE_SDS * jump).all(0)))
    if not len(fields):
        return out
    step, limit = trace.step[:, :, fields], jump[fields]
    far = np.abs(step) > SPIKE_SDS * limit
    lone = far[:, 1:] & far[:, :-1]
    if lone.any():
        rows = trace.rows[:, :, fields]
        lone &= np.abs(rows[:, 2:] - rows[:, :-2]) <= NEIGHBOUR_SDS * limit
        out[:, fields] = lone.sum(1)
    return out


def count_repeated_rows(trace: Trace, rest: RestValues, few_levels: Bools) -> Ints:
    """Count rows (W,) equal to the row before in all fields, unless all of them rest or have `few_levels` (F,).

    A missing value equals none.
    """
    # Most rows differ in the first field already.
    window, at = np.nonzero(trace.zero_steps[:, :, 0])
    same = trace.zero_steps[window, at].all(1)
    window, at = window[same], at[same]
    if not len(window):
        return np.zeros(len(trace.rows), np.int64)
    rows = trace.rows[window, at + trace.rows.shape[1] - trace.steps_into.shape[1]]
    resting = np.stack([np.isin(rows[:, i], values) for i, values in enumerate(rest)], axis=1) | few_levels
    return bincount(window[~resting.all(1)], minlength=len(trace.rows))
