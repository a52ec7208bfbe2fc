"""Constant runs over drift windows: how long each field has had one value, however short the windows are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.drift.baseline.reference import Reference
from outstation.ml.drift.baseline.runs import max_constant_run
from outstation.ml.drift.baseline.summary import Summary


class ConstantRuns(msgspec.Struct, frozen=True, eq=False):
    """The value (F,) of the newest windows in which a field had one value only, NaN for none, and their `rows` (F,)."""

    value: Float64s
    rows: Ints

    @classmethod
    def none(cls, fields: int) -> ConstantRuns:
        return cls(np.full(fields, np.nan), np.zeros(fields, np.int64))

    def find_stuck(self, reference: Reference) -> Bools:
        """Return the fields (F,) that had one value for longer than is normal."""
        return np.asarray(self.rows > max_constant_run(reference.longest))

    def update(self, low: Float64s, high: Float64s, rows: Ints) -> ConstantRuns:
        """Add a window with these extremes (F,) of `rows` (F,) known values; one without values changes nothing."""
        constant = (low == high) & (rows > 0)
        length = np.where(constant, rows + np.where(low == self.value, self.rows, 0), 0)
        value = np.where(constant, low, np.nan)
        unknown = rows == 0
        return ConstantRuns(np.where(unknown, self.value, value), np.where(unknown, self.rows, length))


def run_until_stuck(before: ConstantRuns, windows: Summary, ahead: slice, reference: Reference) -> list[ConstantRuns]:
    """Return the runs after each of the windows `ahead`, up to the first in which a field is stuck.

    That one is left out unless it is the first.
    """
    low, high = windows.extremes.low[ahead], windows.extremes.high[ahead]
    known = windows.row_counts[ahead, None] - windows.missing[ahead]
    resting = _find_resting(low, reference.rest)
    constant = (low == high) & ~resting
    if not (any_true(before.rows) or any_true(constant)):
        return [before] * len(low)
    states: list[ConstantRuns] = []
    now = before
    for lowest, highest, rows in zip(low, np.where(resting, np.nan, high), known, strict=True):
        now = now.update(lowest, highest, rows)
        if any_true(now.find_stuck(reference)):
            return states or [now]
        states.append(now)
    return states


def _find_resting(values: Float64s, rest: Sequence[Sequence[float]]) -> Bools:
    """Return which values (W, F) are rest values of their field."""
    resting = np.zeros(values.shape, np.bool_)
    for field, known in enumerate(rest):
        if known:
            resting[:, field] = np.isin(values[:, field], known)
    return resting
