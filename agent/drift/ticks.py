"""How readings follow each other: the time from row to row, and rows that say again what the row before said.

A clock that is set, or a pause, must not spoil a window's mean step. So steps are counted and added up by octave, and
the mean is taken of those near the middle one.
"""

from __future__ import annotations

import msgspec
import numpy as np

from agent.drift.codec import Floats, Ints

OCTAVES = 48  # of µs: up to nine years
ENOUGH = 10  # steps that tell a mean


class Ticks(msgspec.Struct, frozen=True, eq=False):
    """Of rows in model windows; whole numbers, which add exactly. Steps back and of no time are left out."""

    steps: Ints = msgspec.field(default_factory=lambda: np.zeros(OCTAVES, np.int64))  # by octave of their size in µs
    total_us: Ints = msgspec.field(default_factory=lambda: np.zeros(OCTAVES, np.int64))
    repeated: Ints = msgspec.field(default_factory=lambda: np.zeros(1, np.int64))  # rows equal to the one before

    def __add__(self, other: Ticks) -> Ticks:
        return Ticks(self.steps + other.steps, self.total_us + other.total_us, self.repeated + other.repeated)

    def with_spans(self, spans_us: Ints, each: int) -> Ticks:
        """With `spans_us` (..., m) of `each` steps, whose mean counts."""
        octave = np.frexp(spans_us / each)[1] - 1
        some = (octave >= 0) & (octave < OCTAVES) & (spans_us > 0)
        windows = int(np.prod(spans_us.shape[:-1]))
        place = (octave + OCTAVES * np.arange(windows).reshape(*spans_us.shape[:-1], 1))[some]
        steps = np.bincount(place, minlength=windows * OCTAVES) * each
        # Not by bincount, too: its sums are floats, which a year in µs is too much for.
        total = np.zeros(windows * OCTAVES, np.int64)
        np.add.at(total, place, spans_us[some])
        shape = (*spans_us.shape[:-1], OCTAVES)
        return Ticks(self.steps + steps.reshape(shape), self.total_us + total.reshape(shape), self.repeated)

    def with_repeated(self, rows: Ints) -> Ticks:
        """With as many `rows` (..., 1) that repeat the one before."""
        return Ticks(self.steps, self.total_us, self.repeated + rows)

    def step_us(self) -> Floats:
        """(...,) mean of the usual steps; NaN where too few tell it."""
        count = self.steps.sum(-1, keepdims=True)
        middle = (np.cumsum(self.steps, axis=-1) >= count / 2).argmax(-1)
        near = np.abs(np.arange(OCTAVES) - middle[..., None]) <= 1
        steps = np.where(near, self.steps, 0).sum(-1)
        told = np.where(near, self.total_us, 0).sum(-1) / np.maximum(steps, 1)
        return np.asarray(np.where(count[..., 0] >= ENOUGH, told, np.nan))


def spans(t: Ints, starts: Ints, window_rows: int, before: int) -> Ints:
    """(m,) from the first to the last row of each model window; for single rows from the row before, the first one from
    `before` (0: there is none). `t` (n,) epoch µs."""
    if window_rows > 1:
        return np.asarray(t[starts + window_rows - 1] - t[starts])
    times = t[starts]
    return np.diff(times, prepend=before) if before else np.diff(times)
