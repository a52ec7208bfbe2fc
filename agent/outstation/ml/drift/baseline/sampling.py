"""Sampling intervals: time from row to row, and repeated rows.

A clock step or a pause must not spoil a window's mean interval. So intervals are counted and added up by octave, and
the mean is taken of those near the median one.
"""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints, any_true
from outstation.foundation.indices import bincount

OCTAVES = 48  # of µs: up to nine years
MIN_STEPS = 10  # for a mean


class SamplingIntervals(msgspec.Struct, frozen=True, eq=False):
    """Intervals of rows in model windows, as whole numbers that add exactly. Steps back and of no time are left out."""

    steps: Ints = msgspec.field(default_factory=lambda: np.zeros(OCTAVES, np.int64))  # by octave of their size in µs
    total_us: Ints = msgspec.field(default_factory=lambda: np.zeros(OCTAVES, np.int64))
    repeated: Ints = msgspec.field(default_factory=lambda: np.zeros(1, np.int64))  # rows equal to the one before

    def __add__(self, other: SamplingIntervals) -> SamplingIntervals:
        return SamplingIntervals(
            self.steps + other.steps, self.total_us + other.total_us, self.repeated + other.repeated
        )

    def add_spans(self, spans_us: Ints, steps_per_span: int) -> SamplingIntervals:
        """Add `spans_us` (..., m) of `steps_per_span` intervals each; the mean of a span counts."""
        size = spans_us.shape[-1]
        if size:
            least, most = _octave(np.stack([spans_us.min(-1), spans_us.max(-1)]), steps_per_span)
            if (least == most).all() and (least >= 0).all() and (most < OCTAVES).all():
                # Where the clock is steady, all are in one octave.
                here = np.arange(OCTAVES) == least[..., None]
                return self._add(
                    np.where(here, size * steps_per_span, 0), np.where(here, spans_us.sum(-1)[..., None], 0)
                )
        octave = _octave(spans_us, steps_per_span)
        counted = (octave >= 0) & (octave < OCTAVES)
        windows = int(np.prod(spans_us.shape[:-1]))
        place = (octave + OCTAVES * np.arange(windows, dtype=np.int64).reshape(*spans_us.shape[:-1], 1))[counted]
        steps = bincount(place, minlength=windows * OCTAVES) * steps_per_span
        # Not by bincount: its sums are floats, too small for a year in µs.
        total = np.zeros(windows * OCTAVES, np.int64)
        np.add.at(total, place, spans_us[counted])
        shape = (*spans_us.shape[:-1], OCTAVES)
        return self._add(steps.reshape(shape), total.reshape(shape))

    def _add(self, steps: Ints, total_us: Ints) -> SamplingIntervals:
        return SamplingIntervals(self.steps + steps, self.total_us + total_us, self.repeated)

    def add_repeated(self, rows: Ints) -> SamplingIntervals:
        """Add `rows` (..., 1) that repeat the row before."""
        return SamplingIntervals(self.steps, self.total_us, self.repeated + rows)

    def mean_step_us(self) -> Float64s:
        """Return the mean (...,) of the usual intervals; NaN if there are too few."""
        count = steps = self.steps.sum(-1)
        total_us = self.total_us
        if any_true(self.steps.max(-1) < count):
            middle = (np.cumsum(self.steps, axis=-1) >= count[..., None] / 2).argmax(-1)
            near = np.abs(np.arange(OCTAVES) - middle[..., None]) <= 1
            steps, total_us = np.where(near, self.steps, 0).sum(-1), np.where(near, total_us, 0)
        return np.asarray(np.where(count >= MIN_STEPS, total_us.sum(-1) / np.maximum(steps, 1), np.nan))


def _octave(spans_us: Ints, steps_per_span: int) -> Ints:
    """Return the octave of the mean interval of each span; below 0 where time goes back or stands still."""
    octave = np.frexp(spans_us / steps_per_span)[1] - 1
    return np.asarray(np.where(spans_us > 0, octave, -1))


def compute_spans(t: Ints, starts: Ints, window_rows: int, before: int) -> Ints:
    """Return the time (m,) from the first to the last row of each model window, of rows at `t` (n,) epoch µs.

    Single rows have the time from the row before; `before` is that of the first one, 0 for none.
    """
    if window_rows > 1:
        return np.asarray(t[starts + window_rows - 1] - t[starts])
    times = t[starts]
    return np.diff(times, prepend=before) if before else np.diff(times)
