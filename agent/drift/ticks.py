"""How readings follow each other: the time from row to row, and rows that say again what the row before said.

A clock that is set, or a pause, must not spoil a window's mean step. So steps are counted and added up by octave, and
the mean is taken of those near the middle one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from agent.drift.codec import Floats, Ints

OCTAVES = 48  # of µs: up to nine years
ENOUGH = 10  # steps that tell a mean


@dataclass(frozen=True, eq=False)
class Ticks:
    """Of rows in model windows; whole numbers, which add exactly. Steps back and of no time are left out."""

    steps: Ints = field(default_factory=lambda: np.zeros(OCTAVES, np.int64))  # by octave of their size in µs
    total_us: Ints = field(default_factory=lambda: np.zeros(OCTAVES, np.int64))
    repeated: Ints = field(default_factory=lambda: np.zeros(1, np.int64))  # rows equal to the one before

    def __add__(self, other: Ticks) -> Ticks:
        return Ticks(self.steps + other.steps, self.total_us + other.total_us, self.repeated + other.repeated)

    def with_spans(self, spans_us: Ints, each: int) -> Ticks:
        """With `spans_us` (m,) of `each` steps, whose mean counts."""
        octave = np.frexp(spans_us / each)[1] - 1
        some = (octave >= 0) & (octave < OCTAVES) & (spans_us > 0)
        told, octave = spans_us[some], octave[some]
        steps = np.bincount(octave, minlength=OCTAVES) * each
        total = np.zeros(OCTAVES, np.int64)
        np.add.at(total, octave, told)
        return Ticks(self.steps + steps, self.total_us + total, self.repeated)

    def with_repeated(self, rows: int) -> Ticks:
        return Ticks(self.steps, self.total_us, self.repeated + rows)

    def step_us(self) -> float:
        """Mean of the usual steps; NaN where too few tell it."""
        if self.steps.sum() < ENOUGH:
            return float("nan")
        middle = int(np.searchsorted(np.cumsum(self.steps), self.steps.sum() / 2))
        near = slice(max(0, middle - 1), middle + 2)
        return float(self.total_us[near].sum() / self.steps[near].sum())


def spans(t: Ints, starts: Ints, window_rows: int, before: int) -> Ints:
    """From the first to the last row of each model window; for single rows from the row before, the first one from
    `before` (0: there is none). `t` (n,) epoch µs."""
    if window_rows > 1:
        return np.asarray(t[starts + window_rows - 1] - t[starts])
    times = t[starts]
    return np.diff(times, prepend=before) if before else np.diff(times)


def repeated(joined: Floats, rest: tuple[tuple[float, ...], ...]) -> int:
    """Rows of `joined` (n, F) equal to the one before in all fields, unless all of them rest. A missing value equals
    none."""
    # Most rows differ in the first field already.
    same = np.flatnonzero(joined[1:, 0] == joined[:-1, 0]) + 1
    same = same[(joined[same] == joined[same - 1]).all(1)]
    if not len(same):
        return 0
    resting = np.stack([np.isin(joined[same, i], values) for i, values in enumerate(rest)], axis=1)
    return int((~resting.all(1)).sum())
