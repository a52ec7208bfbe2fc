"""Two-sided cumulative sums over drift windows: what raises a drift alarm, and what clears it.

Source: Page (1954), Continuous inspection schemes, Biometrika 41; k and h in reference standard deviations.
"""

from __future__ import annotations

import msgspec
import numpy as np

from agent.drift.codec import Bools, Floats, Ints

K = 1.0  # slack: half the shift that should be found fast
H = 5.0  # alarm limit
CLIP = 4.0  # the most that one window may say, so that one odd window alone never alarms
CALM = 3  # windows in a row without evidence that clear an alarm
_SIDES = np.array([[1.0], [-1.0]])


class Cusum(msgspec.Struct, frozen=True, eq=False):
    """Row 0 looks for values that are too high, row 1 for too low; one column per test: shape (2, T).

    `windows`, `effect` and `since` (epoch µs) cover the windows since `value` last left zero, which is when the change
    began, as far as the sums can tell. `on` is the alarm: raised above the limit, cleared (and the sum restarted) after
    CALM windows in a row whose z does not exceed the slack on its side.
    """

    value: Floats
    windows: Ints
    effect: Floats
    since: Ints
    on: Bools
    calm: Ints

    @classmethod
    def zeros(cls, tests: int) -> Cusum:
        shape = (2, tests)
        whole, none = np.zeros(shape, np.int64), np.zeros(shape)
        return cls(none, whole, none, whole, np.zeros(shape, np.bool_), whole)

    def update(
        self, z: Floats, effect: Floats, *, slack: Floats | float = K, limit: Floats | float = H, t: int = 0
    ) -> Cusum:
        """After one more window, begun at `t`, with scores `z` (T,), NaN where there was nothing to test, and effects.

        `slack` and `limit` are for all tests or for each (T,).
        """
        tested = np.isfinite(z)
        if not tested.any():
            return self
        sided = np.where(tested, np.minimum(np.maximum(z, -CLIP), CLIP), 0.0) * _SIDES
        value = np.where(tested, np.maximum(0.0, self.value + sided - slack), self.value)
        on, calm = self.on, self.calm
        if on.any():
            calm = np.where(tested, np.where(on & (sided <= slack), calm + 1, 0), calm)
            cleared = on & (calm >= CALM)
            value, on = np.where(cleared, 0.0, value), on & ~cleared
        going = value > 0
        windows = np.where(going, self.windows + tested, 0)
        effect = np.where(going, self.effect + np.where(tested, effect, 0.0), 0.0)
        since = np.where(going, np.where(self.value > 0, self.since, t), 0)
        on = on | (value > limit)
        return Cusum(value, windows, effect, since, on, np.where(on, calm, 0))

    def opened(self, side: int, test: int, windows: int, effect: float, since: int) -> Cusum:
        """With an alarm that other evidence than its sum gave, over so many `windows`."""
        whole, on, total = np.stack([self.windows, self.since]), self.on.copy(), self.effect.copy()
        whole[:, side, test], on[side, test], total[side, test] = (windows, since), True, effect
        return Cusum(self.value, whole[0], total, whole[1], on, self.calm)

    def only(self, which: Bools) -> Cusum:
        """With the sums and alarms of all but the tests `which` (T,) begun anew."""
        windows, since, calm = (np.where(which, part, 0) for part in (self.windows, self.since, self.calm))
        value, effect = (np.where(which, part, 0.0) for part in (self.value, self.effect))
        return Cusum(value, windows, effect, since, self.on & which, calm)


def scores(value: Floats, mean: Floats, sd: Floats, windows: int) -> Floats:
    """z of a new window's `value` when mean and sd were themselves estimated from that many reference windows."""
    return np.asarray((value - mean) / (sd * np.sqrt(1 + 1 / windows)), dtype=np.float64)
