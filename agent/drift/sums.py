"""Sufficient statistics of many groups at once: they add, and batch boundaries leave no trace in them."""

from __future__ import annotations

import msgspec
import numpy as np

from agent.drift.codec import Floats, Ints


class Moments(msgspec.Struct, frozen=True, eq=False):
    """Count, mean and sum of squared deviations per group; arrays of one shape. An empty group has mean 0."""

    n: Ints
    mean: Floats
    m2: Floats

    def pooled(self, axis: int) -> Moments:
        """All groups along `axis` as one.

        Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.
        """
        n = self.n.sum(axis)
        mean = (self.n * self.mean).sum(axis) / np.maximum(n, 1)
        apart = self.mean - np.expand_dims(mean, axis)
        return Moments(n, mean, (self.m2 + self.n * apart**2).sum(axis))


class Sums(msgspec.Struct, frozen=True, eq=False):
    """Count, sum and sum of squares of D values in each of G groups, shape (G, D), NaN left out.

    Values are measured from an origin near their mean, which keeps the squares small enough to subtract.
    """

    n: Ints
    total: Floats
    squares: Floats

    @classmethod
    def zeros(cls, groups: int, values: int) -> Sums:
        shape = (groups, values)
        return cls(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))

    def add(self, groups: Ints, values: Floats) -> Sums:
        """With `values` (m, D) added to their `groups` (m,).

        Each cell is summed strictly in row order, beginning with the sum so far, so the result has the same bits
        however the rows were cut into batches. A pairwise sum would not.
        """
        count, width = self.total.shape
        present, rows = _powers(values)
        place = groups
        if self.n.any():
            rows = np.concatenate([np.concatenate([self.total, self.squares], axis=1), rows])
            place = np.concatenate([np.arange(count), groups])
        both = _in_order(place, rows, count)
        n = np.bincount(groups, minlength=count)[:, None]
        if present is not None:
            n = _in_order(groups, present.astype(np.float64), count).astype(np.int64)
        return Sums(self.n + n, both[:, :width], both[:, width:])

    @classmethod
    def of(cls, values: Floats) -> Sums:
        """Of W times one group, (W, 1, D), with `values` (W, n, D): the same bits as `add` gives."""
        width = values.shape[2]
        if width == 1:
            # numpy adds whole rows one after another where they lie so in memory, but a single column in pairs.
            two = cls.of(np.repeat(values, 2, axis=2))
            return cls(two.n[..., :1], two.total[..., :1], two.squares[..., :1])
        windows, count, _ = values.shape
        shape = windows, 1, width
        missing = np.isnan(values)
        n = np.full(shape, count, np.int64)
        if missing.any():
            n -= missing.sum(1, keepdims=True)
            values = np.where(missing, 0.0, values)
        # Side by side: the wider the rows that are added, the fewer they are.
        known = values.transpose(1, 0, 2).reshape(count, windows * width)
        return cls(n, known.sum(0).reshape(shape), (known * known).sum(0).reshape(shape))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def moments(self, origin: Floats) -> Moments:
        shift = self.total / np.maximum(self.n, 1)
        mean = np.where(self.n > 0, shift + origin, 0.0)
        return Moments(self.n, mean, np.maximum(self.squares - shift * self.total, 0.0))


def _powers(values: Floats) -> tuple[np.ndarray | None, Floats]:
    """Where `values` (..., D) are known, None for everywhere; and (..., 2D) they and their squares, unknown ones 0."""
    missing = np.isnan(values)
    some = bool(missing.any())
    known = np.where(missing, 0.0, values) if some else values
    return ~missing if some else None, np.concatenate([known, known * known], axis=-1)


def _in_order(groups: Ints, rows: Floats, count: int) -> Floats:
    """(count, D) sums of `rows` (m, D) in each of `groups` (m,), added one after another in the order they come."""
    width = rows.shape[1]
    place = (groups * width)[:, None] + np.arange(width)
    return np.asarray(np.bincount(place.ravel(), rows.ravel(), count * width), np.float64).reshape(count, width)
