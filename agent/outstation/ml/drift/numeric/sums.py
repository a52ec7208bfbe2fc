"""Grouped sums: sufficient statistics that add, without a trace of batch boundaries; and medians."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import msgspec
import numpy as np

from outstation.foundation.arrays import Float32s, Float64s, Ints
from outstation.foundation.indices import bincount, repeat, take
from outstation.ml.kernel import group_sums
from outstation.ml.kernel import library as kernel

MIN_ROWS_PER_GROUP = 20  # rows in a group, from which on to add up each by itself is the faster way

MAX_COUNT = 1 << 40  # of anything in a reference: sums of such counts fit 64 bits


def are_counts(values: Ints) -> bool:
    """Return True if all `values` can be counts."""
    return bool(((values >= 0) & (values <= MAX_COUNT)).all())


def is_part(counts: Ints, of_counts: Ints) -> bool:
    """Return True if `counts` can be of some of the items that `of_counts` counts."""
    return counts.shape == of_counts.shape and bool(((counts >= 0) & (counts <= of_counts)).all())


class Groups(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Groups of m consecutive items."""

    group_ids: Ints  # (m,) the group of each, one of `count`
    count: int

    @cached_property
    def order(self) -> Ints:
        """(m,) places by group, in each of them as they came."""
        # Few groups are few bits, which are sorted many times faster.
        return np.argsort(self.group_ids.astype(np.min_scalar_type(self.count)), kind="stable")

    @cached_property
    def n(self) -> Ints:
        """(count,) how many are in each."""
        return bincount(self.group_ids, minlength=self.count)

    def iter_groups(self) -> Iterator[tuple[int, Ints]]:
        """Yield each group that is not empty, and the places of its items."""
        begin = 0
        for group, n in enumerate(self.n.tolist()):
            if n:
                yield group, self.order[begin : begin + n]
            begin += n


class GroupMoments(msgspec.Struct, frozen=True, eq=False):
    """Count, mean and sum of squared deviations per group; arrays of one shape. An empty group has mean 0."""

    n: Ints
    mean: Float64s
    m2: Float64s

    def pooled(self, axis: int) -> GroupMoments:
        """Pool all groups along `axis`.

        Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing sample variances.
        """
        n = self.n.sum(axis)
        mean = (self.n * self.mean).sum(axis) / np.maximum(n, 1)
        deviation = self.mean - np.expand_dims(mean, axis)
        return GroupMoments(n, mean, (self.m2 + self.n * deviation**2).sum(axis))


class GroupSums(msgspec.Struct, frozen=True, eq=False, dict=True):
    """Count, sum and sum of squares of D values in each of G groups, shape (G, D), NaN left out.

    Values are measured from an origin near their mean, which keeps the squares small enough to subtract.
    """

    n: Ints
    total: Float64s
    squares: Float64s

    @classmethod
    def zeros(cls, *shape: int) -> GroupSums:
        return cls(np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape))

    def reshape(self, *shape: int) -> GroupSums:
        return GroupSums(self.n.reshape(shape), self.total.reshape(shape), self.squares.reshape(shape))

    def add(self, groups: Groups, values: Float32s | Float64s, origin: Float64s | float = 0.0) -> GroupSums:
        """Add `values` (m, D) less their `origin` to their `groups`.

        Each cell is summed strictly in row order, beginning with the sum so far, so the result has the same bits
        however the rows were cut into batches. A pairwise sum would not.
        """
        library = kernel.kernel()
        if library is not None:
            origins = origin if isinstance(origin, np.ndarray) else np.full(values.shape[1], origin)
            sums = group_sums.add(library, values, origins, groups.group_ids, self.n, self.total, self.squares)
            return GroupSums(*sums)
        shifted: Float64s = np.subtract(values, origin, dtype=np.float64)
        missing = np.isnan(shifted)
        if missing.any():
            shifted[missing] = 0.0
        before = np.concatenate([self.total, self.squares], axis=1)
        add_up = _sum_by_group if len(shifted) >= MIN_ROWS_PER_GROUP * np.count_nonzero(groups.n) else _sum_by_cell
        both, width = add_up(before, groups, shifted), shifted.shape[1]
        n = self.n + groups.n[:, None]
        if missing.any():
            np.subtract.at(n, groups.group_ids, missing)
        return GroupSums(n, both[:, :width], both[:, width:])

    @classmethod
    def from_rows(cls, rows: Float64s, origin: Float64s | float = 0.0, before: GroupSums | None = None) -> GroupSums:
        """Sum `rows` (W, n, D) from their `origin` to one group each, (W, 1, D), with the same bits as `add`.

        Sums begin with those `before`, if there are any.
        """
        windows, count, width = rows.shape
        first = 0 if before is None else 1
        # Side by side: the wider the rows that are added, the fewer they are.
        summed = np.empty((first + count, windows, width))
        known = summed[first:]
        np.subtract(rows.transpose(1, 0, 2), origin, out=known)
        missing = np.isnan(known)
        n = np.full((windows, 1, width), count, np.int64)
        if missing.any():
            n -= missing.sum(0)[:, None]
            known[missing] = 0.0
        if before is not None:
            n += before.n
            summed[0] = before.total[:, 0]
        total = sum_sequentially(summed)
        np.multiply(known, known, out=known)
        if before is not None:
            summed[0] = before.squares[:, 0]
        return cls(n, total[:, None], sum_sequentially(summed)[:, None])

    def __add__(self, other: GroupSums) -> GroupSums:
        return GroupSums(self.n + other.n, self.total + other.total, self.squares + other.squares)

    def moments(self, origin: Float64s) -> GroupMoments:
        if self._last is not None and self._last[0] is origin:
            return self._last[1]
        shift = self.total / np.maximum(self.n, 1)
        m2 = np.maximum(self.squares - shift * self.total, 0.0)
        mean = np.where(self.n > 0, shift + origin, 0.0)
        moments = GroupMoments(self.n, mean, m2)
        self.__dict__["_last"] = origin, moments
        return moments

    @property
    def _last(self) -> tuple[Float64s, GroupMoments] | None:
        """The origin that moments were computed from, and these: several detectors ask for the same."""
        last: tuple[Float64s, GroupMoments] | None = self.__dict__.get("_last")
        return last


def sum_sequentially(values: Float64s) -> Float64s:
    """Sum `values` (m, ...) in the order they come."""
    rows = np.ascontiguousarray(values.reshape(len(values), -1))
    if rows.shape[1] == 1:
        # numpy adds whole rows one after another where they lie so in memory, but a single column in pairs.
        rows = repeat(rows, 2, axis=1)
    return np.asarray(np.add.reduce(rows, axis=0)[: values[0].size]).reshape(values.shape[1:])


def _sum_by_group(before: Float64s, groups: Groups, values: Float64s) -> Float64s:
    """Add sums and squares (count, 2D) of `values` (m, D) to those `before`, group by group."""
    out, width = before.copy(), values.shape[1]
    for group, members in groups.iter_groups():
        rows = np.empty((1 + len(members), 2 * width))
        rows[0], rows[1:, :width] = before[group], take(values, members, axis=0)
        np.multiply(rows[1:, :width], rows[1:, :width], out=rows[1:, width:])
        out[group] = sum_sequentially(rows)
    return out


def _sum_by_cell(before: Float64s, groups: Groups, values: Float64s) -> Float64s:
    """Add them cell by cell, which is faster for small groups."""
    count, width = before.shape
    rows = np.concatenate([before, np.concatenate([values, values * values], axis=1)])
    cells = (np.concatenate([np.arange(count), groups.group_ids]) * width)[:, None] + np.arange(width)
    return np.asarray(bincount(cells.ravel(), rows.ravel(), count * width), np.float64).reshape(count, width)


def fit_trend(values: Float64s) -> tuple[Float64s, Float64s]:
    """Return the straight line through values in a row (K, T), as what it rises by (T,), and the residuals (K, T)."""
    at = np.linspace(-0.5, 0.5, len(values))[:, None]
    rise = (at * values).sum(0) / (at**2).sum()
    return rise, values - values.mean(0) - at * rise


def median(values: Float64s | Ints) -> Float64s:
    """Return the median along the first axis, of at least one value; NaN where one is. The same bits as numpy."""
    ordered = np.sort(values, axis=0)
    middle = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return np.asarray(np.where(np.isnan(ordered[-1]), np.nan, middle))


def nanmedian(values: Float64s) -> Float64s:
    """Return medians (T,) of values (K, T), NaN left out."""
    ordered, n = np.sort(values, axis=0), (~np.isnan(values)).sum(0)
    either = np.stack([np.maximum(n - 1, 0) // 2, n // 2])
    return np.asarray(np.take_along_axis(ordered, either, axis=0).sum(0) / 2)
