"""Sufficient statistics of many groups at once: they add, and batch boundaries leave no trace in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from agent.drift.codec import Bools, Floats, Ints
from agent.drift.groups import Groups

ENOUGH = 20  # rows in a group, from which on to add up each by itself is the faster way


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

    def add(self, groups: Groups, values: Floats) -> Sums:
        """With `values` (m, D) added to their `groups`.

        Each cell is summed strictly in row order, beginning with the sum so far, so the result has the same bits
        however the rows were cut into batches. A pairwise sum would not.
        """
        width = values.shape[1]
        present, powers = _powers(values.take(groups.order, axis=0))
        before = np.concatenate([self.total, self.squares], axis=1) if self.n.any() else None
        both = _in_order(groups, powers, before)
        n = groups.n[:, None]
        if present is not None:
            n = _in_order(groups, present.astype(np.float64), None).astype(np.int64)
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
        # Side by side: the wider the rows that are added, the fewer they are.
        known = np.empty((count, windows, width))
        known[:] = values.transpose(1, 0, 2)
        if missing.any():
            n -= missing.sum(1, keepdims=True)
            known[missing.transpose(1, 0, 2)] = 0.0
        rows = known.reshape(count, windows * width)
        total = np.add.reduce(rows, axis=0)
        np.multiply(rows, rows, out=rows)
        return cls(n, total.reshape(shape), np.add.reduce(rows, axis=0).reshape(shape))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def moments(self, origin: Floats) -> Moments:
        shift = self.total / np.maximum(self.n, 1)
        mean = np.where(self.n > 0, shift + origin, 0.0)
        return Moments(self.n, mean, np.maximum(self.squares - shift * self.total, 0.0))


def _powers(values: Floats) -> tuple[Bools | None, Floats]:
    """Where `values` (m, D) are known, None for everywhere; and (m, 2D) they and their squares, unknown ones 0."""
    rows, width = values.shape
    out, missing = np.empty((rows, 2 * width)), np.isnan(values)
    known, squares = out[:, :width], out[:, width:]
    known[:] = values
    some = bool(missing.any())
    if some:
        known[missing] = 0.0
    np.multiply(known, known, out=squares)
    return ~missing if some else None, out


def _in_order(groups: Groups, rows: Floats, before: Floats | None) -> Floats:
    """(count, D) sums of `rows` (m, D), which lie by group: added one after another to those `before` (count, D)."""
    count, width = len(groups.n), rows.shape[1]
    if len(rows) >= ENOUGH * np.count_nonzero(groups.n) and width > 1:
        out = np.zeros((count, width)) if before is None else before.copy()
        for group, some in groups.parts():
            part = rows[some] if before is None else np.concatenate([before[group, None], rows[some]])
            # numpy adds whole rows one after another where they lie so in memory, but a single column in pairs.
            np.add.reduce(part, axis=0, out=out[group])
        # As sums do that begin with 0: none is -0.
        return out + 0.0
    place = np.repeat(np.arange(count), groups.n)
    if before is not None:
        rows, place = np.concatenate([before, rows]), np.concatenate([np.arange(count), place])
    cells = (place * width)[:, None] + np.arange(width)
    return np.asarray(np.bincount(cells.ravel(), rows.ravel(), count * width), np.float64).reshape(count, width)
