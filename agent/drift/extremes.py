"""The lowest and highest values of a drift window, how many rows hold them, and when so many do that a sensor clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from agent.drift.codec import Bools, Floats, Ints

if TYPE_CHECKING:
    from agent.drift.reference import Reference

PILE, STEEP = 0.05, 4  # share of rows at the limit; how many times more than on the next value
LEVELS = 20  # values less finely told apart often pile up on the outermost
LOW, HIGH = 0, 1


@dataclass(frozen=True, eq=False)
class Extremes:
    """Of each field and side (low, high) the outermost value and the next one to it, with their numbers of rows.

    Low ones are kept negated, so that the outermost is the greatest on both sides. Where there is none: -inf, 0.
    """

    values: Floats  # (F, 2, 2)
    rows: Ints  # (F, 2, 2)

    @classmethod
    def empty(cls, fields: int) -> Extremes:
        return cls(np.full((fields, 2, 2), -np.inf), np.zeros((fields, 2, 2), np.int64))

    @classmethod
    def of(cls, ordered: np.ndarray, count: Ints) -> Extremes:
        """Of columns (F, n) in ascending order of which the first `count` (F,) are values."""
        if not ordered.shape[1]:
            return cls.empty(len(ordered))
        low, high = _outermost(ordered, count, LOW), _outermost(ordered, count, HIGH)
        return cls(np.stack([low[0], high[0]], axis=1), np.stack([low[1], high[1]], axis=1))

    def merge(self, other: Extremes) -> Extremes:
        """Of both; associative, commutative and exact."""
        values = np.concatenate([self.values, other.values], axis=-1)
        rows = np.concatenate([self.rows, other.rows], axis=-1)
        first = values.max(-1, keepdims=True)
        second = np.where(values < first, values, -np.inf).max(-1, keepdims=True)
        held = [np.where(values == value, rows, 0).sum(-1) for value in (first, second)]
        return Extremes(np.concatenate([first, second], axis=-1), np.stack(held, axis=-1))

    @property
    def low(self) -> Floats:
        """(F,) the lowest value."""
        return np.asarray(-self.values[:, LOW, 0])

    @property
    def high(self) -> Floats:
        return np.asarray(self.values[:, HIGH, 0])


def _outermost(ordered: np.ndarray, count: Ints, side: int) -> tuple[Floats, Ints]:
    fields, last = np.arange(len(ordered)), np.maximum(count - 1, 0)
    value = ordered[fields, last if side == HIGH else 0].astype(np.float64)
    value = np.where(count > 0, value, np.nan)
    held = (ordered == value[:, None]).sum(1)
    another = count > held
    at = np.where(another, last - held if side == HIGH else held, 0)
    following = np.where(another, ordered[fields, at].astype(np.float64), np.nan)
    also = (ordered == following[:, None]).sum(1)
    values = np.stack([value, following], axis=1) * (1 if side == HIGH else -1)
    return np.where(np.isnan(values), -np.inf, values), np.stack([held, also], axis=1)


def piled(extremes: Extremes, reference: Reference, rows: int) -> Bools:
    """(F, 2) whether the lowest and the highest value are ones that a sensor cannot get past.

    Not where the reference's readings pile up there, too, nor where a sensor tells so few values apart that the
    outermost is often one of the commonest.
    """
    values, held = extremes.values, extremes.rows
    fine = np.isfinite(values[..., 1])
    gap = np.where(fine, values[..., 0] - np.where(fine, values[..., 1], 0.0), np.inf)
    span = np.where(np.isfinite(extremes.high), extremes.high - extremes.low, 0.0)
    steep = (held[..., 0] > PILE * rows) & (held[..., 0] > STEEP * (held[..., 1] + 1))
    return np.asarray(steep & (span[:, None] >= LEVELS * gap) & ~_usual(extremes, reference))


def _usual(extremes: Extremes, reference: Reference) -> Bools:
    at = np.stack([extremes.low, extremes.high], axis=1)
    # A value that is a limit of two bins of the reference holds the rows of a whole one.
    doubled = (reference.bounds[:, None, :] == at[..., None]).sum(-1) > 1
    rest = [[any(value == known for known in reference.rest[i]) for value in pair] for i, pair in enumerate(at)]
    return np.asarray(doubled | np.array(rest, np.bool_))
