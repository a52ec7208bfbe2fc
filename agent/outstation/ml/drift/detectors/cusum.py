"""CUSUM charts: two-sided cumulative sums over drift windows, which raise and clear drift alarms.

Source: Page (1954), Continuous inspection schemes, Biometrika 41; slack and limit in reference standard deviations.
"""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.kernel import library as kernel
from outstation.ml.kernel import sequential_tests
from outstation.ml.kernel.sequential_tests import Periods

K = 1.0  # slack: half the shift to find fast
H = 5.0  # alarm limit
Z_CLIP = 4.0  # largest score of one window, so that one odd window alone never alarms
WINDOWS_TO_CLEAR, ROWS_TO_CLEAR = 3, 60  # consecutive windows without evidence, and rows of these, at least
_SIDES = np.array([[1.0], [-1.0]])


def windows_to_clear(rows: int) -> int:
    """Return how many windows without evidence clear an alert, if each has `rows` rows: a few rows prove nothing."""
    return max(WINDOWS_TO_CLEAR, -(-ROWS_TO_CLEAR // max(rows, 1)))


class Cusum(msgspec.Struct, frozen=True, eq=False):
    """CUSUMs of T tests, shape (2, T): row 0 looks for values that are too high, row 1 for too low.

    `windows`, `effect` and `since` (epoch µs) cover the windows since `value` last left zero, the best estimate of when
    the change began. `alarm` is raised above the limit, and cleared (and the sum restarted) after that number of
    windows in a row as `windows_to_clear` says, whose score does not exceed the slack on its side.
    """

    value: Float64s
    windows: Ints
    effect: Float64s
    since: Ints
    alarm: Bools
    clear_count: Ints

    @classmethod
    def zeros(cls, tests: int) -> Cusum:
        shape = (2, tests)
        whole, none = np.zeros(shape, np.int64), np.zeros(shape)
        return cls(none, whole, none, whole, np.zeros(shape, np.bool_), whole)

    def update(
        self, z: Float64s, effect: Float64s, *, slack: Float64s | float = K, limit: Float64s | float = H, t: int = 0
    ) -> Cusum:
        """Add a window that began at `t`, with scores `z` (T,), NaN where there was nothing to test, and effects.

        `slack` and `limit` are for all tests or for each (T,).
        """
        return self.run_windows(z[None], effect[None], slack=slack, limit=limit, t=np.array([t])).state_after(1)

    def run_windows(
        self,
        z: Float64s,
        effects: Float64s,
        *,
        slack: Float64s | float = K,
        limit: Float64s | float = H,
        t: Ints,
        to_clear: int = WINDOWS_TO_CLEAR,
    ) -> CusumSequence:
        """Run over W consecutive windows that began at `t` (W,), with scores and effects (W, T)."""
        if not isinstance(slack, np.ndarray):
            slack = np.full(z.shape[1], slack)
        if not isinstance(limit, np.ndarray):
            limit = np.full(z.shape[1], limit)
        library = kernel.kernel()
        if library is None:
            values = _run_by_numpy(z, self.value, slack)
            exceeds = np.asarray((values > limit).any((1, 2)))
        else:
            values, exceeds = sequential_tests.run_cusums(library, z, self.value, slack, limit, Z_CLIP)
        return CusumSequence(self, z, slack, values, exceeds, effects, limit, t, to_clear)

    def open_alarm(self, side: int, test: int, windows: int, effect: float, since: int) -> Cusum:
        """Open an alarm over `windows` windows on evidence other than the sum."""
        whole, on, total = np.stack([self.windows, self.since]), self.alarm.copy(), self.effect.copy()
        whole[:, side, test], on[side, test], total[side, test] = (windows, since), True, effect
        return Cusum(self.value, whole[0], total, whole[1], on, self.clear_count)

    def reset_except(self, tests: Bools) -> Cusum:
        """Reset sums and alarms of all tests but these (T,)."""
        windows, since, calm = (np.where(tests, part, 0) for part in (self.windows, self.since, self.clear_count))
        value, effect = (np.where(tests, part, 0.0) for part in (self.value, self.effect))
        return Cusum(value, windows, effect, since, self.alarm & tests, calm)


class CusumSequence(msgspec.Struct, frozen=True, eq=False):
    """Sums over W consecutive windows in which no alarm is raised or cleared.

    Only the last window taken may raise an alarm; if an alarm is open before, only the first one is taken.
    """

    before: Cusum
    z: Float64s  # (W, T)
    slack: Float64s  # (T,)
    values: Float64s  # (W, 2, T) after each
    exceeds_limit: Bools  # (W,) windows in which a sum exceeds its limit
    effects: Float64s  # (W, T)
    limit: Float64s  # (T,)
    t: Ints  # (W,)
    to_clear: int

    def state_after(self, count: int) -> Cusum:
        """Return the state after `count` windows."""
        before, z, values, effects, t = self.before, self.z[:count], self.values[:count], self.effects[:count], self.t
        tested = np.isfinite(z)
        if not any_true(tested):
            return before
        alarm, clear_count = before.alarm, before.clear_count
        if any_true(alarm):
            calm = _sided_scores(z[:1])[0] <= self.slack
            clear_count = np.where(tested[0], np.where(alarm & calm, clear_count + 1, 0), clear_count)
            cleared = alarm & (clear_count >= self.to_clear)
            values, alarm = np.where(cleared, 0.0, values), alarm & ~cleared
        library = kernel.kernel()
        if library is None:
            windows, effect, since = _extend_by_numpy(before, tested, values, effects, t)
        else:
            periods = Periods(before.windows, before.effect, before.since)
            periods.extend_cusums(library, z, before.value, values, effects, t[:count])
            windows, effect, since = periods.windows, periods.effect, periods.since
        alarm = alarm | (values[-1] > self.limit)
        # A copy: the state would keep the sums of all windows in memory.
        return Cusum(values[-1].copy(), windows, effect, since, alarm, np.where(alarm, clear_count, 0))


def _sided_scores(z: Float64s) -> Float64s:
    """Return the clipped scores (W, 2, T) of each side; 0 where nothing was tested."""
    clipped = np.where(np.isfinite(z), np.minimum(np.maximum(z, -Z_CLIP), Z_CLIP), 0.0)
    return np.asarray(clipped[:, None] * _SIDES)


def _run_by_numpy(z: Float64s, value: Float64s, slack: Float64s) -> Float64s:
    """Return the sums (W, 2, T): the definition, which the library equals bit by bit."""
    sided = _sided_scores(z)
    # A test that is left out stays as it is.
    less, values = np.where(np.isfinite(z), slack, 0.0)[:, None], np.empty_like(sided)
    for after, more, allowed in zip(values, sided, less, strict=True):
        np.add(value, more, out=after)
        np.subtract(after, allowed, out=after)
        value = np.maximum(0.0, after, out=after)
    return values


def _extend_by_numpy(
    before: Cusum, tested: Bools, values: Float64s, effects: Float64s, t: Ints
) -> tuple[Ints, Float64s, Ints]:
    """Return windows, effects and begin (2, T) since each sum left zero: the definition, as above."""
    windows, effect, since, was_going = before.windows, before.effect, before.since, before.value > 0
    counted_effects = np.where(tested, effects, 0.0)
    for going, counted, more, begin in zip(values > 0, tested, counted_effects, t.tolist(), strict=False):
        windows = np.where(going, windows + counted, 0)
        effect = np.where(going, effect + more, 0.0)
        since = np.where(going, np.where(was_going, since, begin), 0)
        was_going = going
    return windows, effect, since


def standardize(value: Float64s, mean: Float64s, sd: Float64s, windows: int) -> Float64s:
    """Return the score of a window's `value`, given that mean and sd were estimated from this number of windows."""
    score = np.asarray(value - mean, dtype=np.float64)
    score /= sd * np.sqrt(1 + 1 / windows)
    return score
