"""Slow trends: whether several fields move together for days, as seasons do, or one change grows, as a ramp does.

Scores of means are averaged over half days, so that no daily cycle is taken for a slope.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.ml.kernel import library as kernel
from outstation.ml.kernel import sequential_tests

RAMP_WINDOWS = 16  # remembered
MIN_RAMP_WINDOWS = 4  # a slope this long at least; a shorter one is a step
MIN_RAMP_GAIN = 1.0  # by how much the slope's squared errors, in sd of a window, must be less
MAX_RAMP_ERROR = 0.8  # of the step's squared errors: where windows vary much by themselves, less fits by chance
HALF_DAY_US = 43_200_000_000
MAX_HALF_DAYS = 14  # half days
MIN_HALF_DAYS = MIN_RAMP_WINDOWS + 2  # half days that tell a slope
MIN_RISE_SD, MIN_STANDARD_ERRORS = 0.75, 5.0  # sd of a window: a smaller rise is none; its standard errors
MIN_FIELDS = 2


class SlowTrend(msgspec.Struct, frozen=True, eq=False):
    """Mean scores of the last half days in which anything was tested."""

    half_day: Ints = msgspec.field(default_factory=lambda: np.empty(0, np.int64))  # (H,) since 1970
    n: Ints = msgspec.field(default_factory=lambda: np.empty((0, 0), np.int64))  # (H, F) windows
    mean: Float32s = msgspec.field(default_factory=lambda: np.empty((0, 0), np.float32))  # of their scores

    def add(self, z: Float64s, t: Ints) -> SlowTrend:
        """Add scores `z` (W, F) of windows at `t` (W,) epoch µs, NaN for none. A clock that is set back restarts it."""
        half_days, season = t // HALF_DAY_US, self
        begins = [0, *(np.flatnonzero(half_days[1:] != half_days[:-1]) + 1).tolist(), len(t)]
        for begin, end in pairwise(begins):
            season = season._add_half_day(int(half_days[begin]), z[begin:end])
        return season

    def _add_half_day(self, half_day_number: int, z: Float64s) -> SlowTrend:
        """Add scores (W, F) of windows in one half day."""
        half_day, n, mean = self._open_half_day(half_day_number, z.shape[1])
        library = kernel.kernel()
        if library is not None:
            sequential_tests.add_means(library, z, n[-1], mean[-1])
            return SlowTrend(half_day, n, mean)
        tested = ~np.isnan(z)
        counts, last = n[-1] + np.cumsum(tested, axis=0), mean[-1]
        for count, counted, score in zip(counts, tested, np.where(tested, z, 0.0), strict=True):
            last += np.where(counted, (score - last) / np.maximum(count, 1), 0.0)
        n[-1] = counts[-1]
        return SlowTrend(half_day, n, mean)

    def _open_half_day(self, half_day_number: int, fields: int) -> tuple[Ints, Ints, Float32s]:
        """Return copies of the members, whose last entry is that of this half day."""
        if len(self.half_day) and half_day_number == self.half_day[-1]:
            return self.half_day, self.n.copy(), self.mean.copy()
        fresh = (
            np.array([half_day_number], np.int64),
            np.zeros((1, fields), np.int64),
            np.zeros((1, fields), np.float32),
        )
        if not len(self.half_day) or half_day_number < self.half_day[-1]:
            return fresh
        recent = slice(1 - MAX_HALF_DAYS, None)
        before = self.half_day[recent], self.n[recent], self.mean[recent]
        half_day, n, mean = (np.concatenate([old, new]) for old, new in zip(before, fresh, strict=True))
        return half_day, n, mean

    def find_slow_fields(self) -> Ints:
        """Return the fields whose mean has moved slowly all that time."""
        return np.array([i for i in range(self.n.shape[1]) if self._is_slow(i)], np.int64)

    def _is_slow(self, field: int) -> bool:
        seen = self.n[:, field] > 0
        mean, each = self.mean[seen, field].astype(np.float64), float(np.sqrt(np.median(self.n[seen, field])))
        if len(mean) < MIN_HALF_DAYS:
            return False
        place = self.half_day[seen] - self.half_day[seen].mean()
        slope = float((place * mean).sum()) / float((place**2).sum())
        left = float((mean - mean.mean() - slope * place).std()) / float(np.sqrt((place**2).sum()))
        rise = abs(slope) * float(place[-1] - place[0])
        return rise > MIN_RISE_SD and abs(slope) > MIN_STANDARD_ERRORS * left and is_ramp(mean * each)


def guess_cause(field: int, trend: SlowTrend, fields: Sequence[str]) -> str:
    """Describe what a field probably follows; empty if it does not move slowly along with others."""
    slow = trend.find_slow_fields()
    if field not in slow or len(slow) < max(MIN_FIELDS, (len(fields) + 1) // 2):
        return ""
    others = ", ".join(fields[i] for i in slow if i != field)
    return f"the season or a slow change of the surroundings: {others} moved as slowly, for more than a day"


def is_ramp(z: Float64s) -> bool:
    """Return True if a slope fits the last scores, oldest first, better than a step does; NaN is left out."""
    z = z[~np.isnan(z)]
    if len(z) <= MIN_RAMP_WINDOWS:
        return False
    place, begin = np.arange(len(z)), np.arange(len(z))[:, None]
    step = _least_squared_error(z, (place >= begin).astype(np.float64))
    slope = _least_squared_error(z, np.maximum(place - begin[:-MIN_RAMP_WINDOWS] + 1, 0).astype(np.float64))
    return bool(step - slope > MIN_RAMP_GAIN and slope < MAX_RAMP_ERROR * step)


def _least_squared_error(z: Float64s, shapes: Float64s) -> float:
    """Return the least squared error of z (n,) as a multiple of one of `shapes` (m, n)."""
    fits = (shapes * z).sum(1) ** 2 / (shapes**2).sum(1)
    return float((z**2).sum() - fits.max())
