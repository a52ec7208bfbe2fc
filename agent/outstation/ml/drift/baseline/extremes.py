"""Extremes of a drift window: the two lowest and two highest values of each field, with their numbers of rows."""

from __future__ import annotations

import msgspec
import numpy as np

from outstation.foundation.arrays import Float64s, Ints

LOW, HIGH = 0, 1


class Extremes(msgspec.Struct, frozen=True, eq=False):
    """Outermost value and the next one, per field and side (low, high), with their numbers of rows.

    Low values are negated, so that the outermost is the greatest on both sides. A missing value is -inf with 0 rows.
    """

    values: Float64s  # (F, 2, 2)
    rows: Ints  # (F, 2, 2)

    @classmethod
    def empty(cls, fields: int) -> Extremes:
        return cls(np.full((fields, 2, 2), -np.inf), np.zeros((fields, 2, 2), np.int64))

    @classmethod
    def from_sorted(cls, ordered: np.ndarray, count: Ints) -> Extremes:
        """Find the extremes of ascending columns (..., F, n), whose first `count` (..., F) entries are values."""
        columns, lengths = ordered.reshape(count.size, ordered.shape[-1]), count.ravel()
        ends = _end_values(columns, lengths).astype(np.float64)
        first, second, third = ends[..., 0], ends[..., 1], ends[..., 2]
        rows = np.ones((len(columns), 2, 2), np.int64)
        # In most columns each occurs once.
        several = (first == second) | (second == third) | (lengths < 3)[:, None]
        for side in (LOW, HIGH):
            columns_left = np.flatnonzero(several[:, side])
            if len(columns_left):
                ends[columns_left, side, :2], rows[columns_left, side] = _count_outermost(
                    columns[columns_left], lengths[columns_left], first[columns_left, side], side
                )
        values = ends[..., :2]
        values[:, LOW] *= -1
        # A zero is positive on both sides, whichever it was among equal ones.
        values += 0.0
        values[np.isnan(values)] = -np.inf
        return cls(values.reshape(*count.shape, 2, 2), rows.reshape(*count.shape, 2, 2))

    def __getitem__(self, index: int) -> Extremes:
        return Extremes(self.values[index], self.rows[index])

    def merge(self, other: Extremes) -> Extremes:
        """Merge both; associative, commutative and exact."""
        values = np.concatenate([self.values, other.values], axis=-1)
        rows = np.concatenate([self.rows, other.rows], axis=-1)
        first = values.max(-1, keepdims=True)
        second = np.where(values < first, values, -np.inf).max(-1, keepdims=True)
        held = [np.where(values == value, rows, 0).sum(-1) for value in (first, second)]
        return Extremes(np.concatenate([first, second], axis=-1), np.stack(held, axis=-1))

    @property
    def low(self) -> Float64s:
        """(..., F) lowest value."""
        return np.asarray(-self.values[..., LOW, 0])

    @property
    def high(self) -> Float64s:
        """(..., F) highest value."""
        return np.asarray(self.values[..., HIGH, 0])


def _end_values(ordered: np.ndarray, count: Ints) -> np.ndarray:
    """Return the first three values of each column and the last three backwards (n, 2, 3); any if there are fewer."""
    rows = ordered.shape[1]
    if rows >= 3 and (count == rows).all():
        return ordered[:, np.array([[0, 1, 2], [-1, -2, -3]])]
    if not rows:
        return np.full((len(ordered), 2, 3), np.nan)
    last = np.maximum(count - 1, 0)[:, None]
    at = np.stack([np.minimum(np.arange(3), last), np.maximum(last - np.arange(3), 0)], axis=1)
    return np.take_along_axis(ordered[:, None], at, axis=-1)


def _count_outermost(ordered: np.ndarray, count: Ints, value: Float64s, side: int) -> tuple[Float64s, Ints]:
    """Return the outermost `value` and the next one, NaN for none, and how many rows have them: (n, 2) each."""
    columns, last = np.arange(len(ordered)), np.maximum(count - 1, 0)
    if not ordered.shape[1]:
        return np.full((len(ordered), 2), np.nan), np.zeros((len(ordered), 2), np.int64)
    value = np.where(count > 0, value, np.nan)
    occurrences = (ordered == value[:, None]).sum(1)
    another = count > occurrences
    place = np.where(another, last - occurrences if side == HIGH else occurrences, 0)
    following = np.where(another, ordered[columns, place].astype(np.float64), np.nan)
    rows = np.stack([occurrences, (ordered == following[:, None]).sum(1)], axis=1)
    return np.stack([value, following], axis=1), rows
