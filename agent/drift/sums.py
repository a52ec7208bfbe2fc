"""Sufficient statistics of many groups at once: they add, and batch boundaries leave no trace in them."""

from __future__ import annotations

from collections.abc import Iterator
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
        n, both, width = self.n.copy(), np.concatenate([self.total, self.squares], axis=1), values.shape[1]
        present = ~np.isnan(values)
        whole = bool(present.all())
        known = values if whole else np.where(present, values, 0.0)
        rows = np.concatenate([known, known * known], axis=1)
        for group, some in by_group(groups, len(n)):
            part = rows[some]
            n[group] += len(part) if whole else present[some].sum(0)
            both[group] = _in_order(both[group], part)
        return Sums(n, both[:, :width], both[:, width:])

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def moments(self, origin: Floats) -> Moments:
        shift = self.total / np.maximum(self.n, 1)
        mean = np.where(self.n > 0, shift + origin, 0.0)
        return Moments(self.n, mean, np.maximum(self.squares - shift * self.total, 0.0))


def by_group(groups: Ints, count: int) -> Iterator[tuple[int, Ints | slice]]:
    """Each of `count` groups that occurs in `groups` (m,), and where its rows are, in their order."""
    if count == 1:
        yield 0, slice(None)
        return
    order = np.argsort(groups, kind="stable")
    ends = np.cumsum(np.bincount(groups, minlength=count))
    begin = 0
    for group, end in enumerate(ends.tolist()):
        if end > begin:
            yield group, order[begin:end]
        begin = end


def _in_order(before: Floats, values: Floats) -> Floats:
    """(D,) `before` + the first of `values` (m, D) + the second …, for each column.

    numpy adds whole rows one after another where they lie so in memory and there are at least two columns, which there
    are; a column that lies in one piece it would add in pairs.
    """
    rows = np.empty((len(values) + 1, values.shape[1]))
    rows[0], rows[1:] = before, values
    return np.asarray(rows.sum(0))
