"""Sufficient statistics of many groups at once: they add, and batch boundaries leave no trace in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.drift.codec import Floats, Ints


@dataclass(frozen=True, eq=False)
class Moments:
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


@dataclass(frozen=True, eq=False)
class Sums:
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
        n, total, squares = self.n.copy(), self.total.copy(), self.squares.copy()
        for group in np.unique(groups) if len(self.n) > 1 else range(len(self.n)):
            part = values[groups == group] if len(self.n) > 1 else values
            present = ~np.isnan(part)
            n[group] += present.sum(0)
            part = part if present.all() else np.where(present, part, 0.0)
            total[group] = _in_order(total[group], part)
            squares[group] = _in_order(squares[group], part * part)
        return Sums(n, total, squares)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def moments(self, origin: Floats) -> Moments:
        shift = self.total / np.maximum(self.n, 1)
        mean = np.where(self.n > 0, shift + origin, 0.0)
        return Moments(self.n, mean, np.maximum(self.squares - shift * self.total, 0.0))


def _in_order(before: Floats, values: Floats) -> Floats:
    """(D,) `before` + the first of `values` (m, D) + the second …, for each column.

    numpy adds whole rows one after another where they lie so in memory and there are at least two columns; a column
    that lies in one piece it would add in pairs.
    """
    if values.shape[1] == 1:
        return np.cumsum(np.concatenate([before, values[:, 0]]))[-1:]
    rows = np.empty((len(values) + 1, values.shape[1]))
    rows[0], rows[1:] = before, values
    return np.asarray(rows.sum(0))
