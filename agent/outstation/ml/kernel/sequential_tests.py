"""Compiled loops of sequential tests over consecutive drift windows: CUSUMs, weighted means, and their periods."""

from __future__ import annotations

import numpy as np

from outstation.foundation.arrays import Bools, Float32s, Float64s, Ints
from outstation.ml.kernel.library import Library, address


class Periods:
    """Periods since each of the sums began: windows, the sum of their effects, and the begin of the first."""

    def __init__(self, windows: Ints, effect: Float64s, since: Ints) -> None:
        """Copy these arrays, of one shape."""
        self.windows: Ints = np.array(windows, np.int64)
        self.effect: Float64s = np.array(effect, np.float64)
        self.since: Ints = np.array(since, np.int64)

    @property
    def _addresses(self) -> tuple[int, int, int]:
        return address(self.windows), address(self.effect), address(self.since)

    def extend_cusums(
        self, library: Library, z: Float64s, before: Float64s, values: Float64s, effects: Float64s, t: Ints
    ) -> None:
        """Add windows with sums `values` (W, 2, T), after those `before` (2, T), of scores and effects (W, T)."""
        z, before, values, effects = _floats(z), _floats(before), _floats(values), _floats(effects)
        t = np.ascontiguousarray(t, np.int64)
        windows, _, tests = values.shape
        if not z.shape == effects.shape == (windows, tests) or before.shape != (2, tests) or t.shape != (windows,):
            raise ValueError("scores, sums and effects of windows differ in shape")
        _require(self.windows.shape == self.effect.shape == self.since.shape == (2, tests))
        library.extend_periods(
            *(windows, tests, address(z), address(before), address(values), address(effects), address(t)),
            *self._addresses,
        )

    def extend_means(
        self, library: Library, z: Float64s, before: Float64s, means: Float64s, effects: Float64s, t: Ints
    ) -> None:
        """Add windows with weighted `means` (W, S), after those `before` (S,), of scores and effects (W, S)."""
        before, means, t = _floats(before), _floats(means), np.ascontiguousarray(t, np.int64)
        z, effects, stride = _rows_alike(z, effects)
        windows, scores = means.shape
        if not z.shape == effects.shape == means.shape or before.shape != (scores,) or t.shape != (windows,):
            raise ValueError("scores, means and effects of windows differ in shape")
        _require(self.windows.shape == self.effect.shape == self.since.shape == (scores,))
        library.extend_signs(
            *(windows, scores, stride, address(z), address(before), address(means), address(effects), address(t)),
            *self._addresses,
        )


def run_cusums(
    library: Library, z: Float64s, before: Float64s, slack: Float64s, limit: Float64s, clip: float
) -> tuple[Float64s, Bools]:
    """Return the sums (W, 2, T) over windows with scores `z` (W, T), and which windows exceed a limit (W,)."""
    z, before, slack, limit = _floats(z), _floats(before), _floats(slack), _floats(limit)
    windows, tests = z.shape
    _require(before.shape == (2, tests) and slack.shape == limit.shape == (tests,))
    values, exceeds, bound = np.empty((windows, 2, tests)), np.empty(windows, np.int64), np.array([clip])
    library.run_cusums(
        *(windows, tests, address(z), address(before), address(slack), address(limit), address(bound)),
        *(address(values), address(exceeds)),
    )
    return values, exceeds > 0


def run_means(
    library: Library, z: Float64s, before: Float64s, numbers: tuple[float, float, float]
) -> tuple[Float64s, Float64s]:
    """Return weighted means (W, S) over windows with scores `z` (W, S), and their statistic (W,).

    `numbers` are the weight of a window, the largest score and the slack.
    """
    z, _, stride = _rows_alike(z, z)
    before, constants = _floats(before), np.array(numbers)
    windows, scores = z.shape
    _require(before.shape == (scores,))
    means, statistics = np.empty(z.shape), np.empty(windows)
    library.run_means(
        *(windows, scores, stride, address(z), address(before), address(constants)),
        *(address(means), address(statistics)),
    )
    return means, statistics


def add_means(library: Library, z: Float64s, count: Ints, mean: Float32s) -> None:
    """Add scores `z` (W, F) to running means (F,) and their counts (F,), in place; NaN is left out."""
    z, _, stride = _rows_alike(z, z)
    _require(count.shape == mean.shape == z.shape[1:] and count.dtype == np.int64 and mean.dtype == np.float32)
    _require(count.flags.c_contiguous and mean.flags.c_contiguous)
    library.add_means(len(z), z.shape[1], stride, address(z), address(count), address(mean))


def _rows_alike(z: Float64s, effects: Float64s) -> tuple[Float64s, Float64s, int]:
    """Return both, of float64 with rows that lie equally far apart, and how far."""
    size = z.itemsize
    if z.strides != effects.strides or z.strides[1] != size or z.strides[0] % size or z.dtype != effects.dtype:
        z, effects = _floats(z), _floats(effects)
    return z, effects, z.strides[0] // z.itemsize


def _floats(values: Float64s) -> Float64s:
    return np.ascontiguousarray(values, np.float64)


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("scores and states of sequential tests differ in shape")
