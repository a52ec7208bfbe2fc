"""Fault limits: how far the symptoms of sensor faults went in honest windows, and so what is no fault here.

A machine that is held at a level, codes cut off at a top and heavy tails look like faults. The learned windows show how
far each symptom goes by nature. Their largest values are extrapolated to the false-alarm budget of all faults.

Source: Pickands (1975), Statistical inference using extreme order statistics, Annals of Statistics 3, for exponential
excesses over a high threshold.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float64s
from outstation.ml.drift.numeric import false_alarm_budget
from outstation.ml.drift.numeric.sums import GroupMoments
from outstation.ml.kernel import comparisons
from outstation.ml.kernel import library as kernel

# Symptoms of a field in a drift window, in this order.
MISSING, PILE_LOW, PILE_HIGH, OUTSIDE, SPIKES, SD = range(6)
SYMPTOMS = 6
TAIL_SHARE = 0.25  # of windows, whose excesses show the tail
RANGE_MARGIN = 0.5  # spans of a reference beyond its limits
# Independent windows whose span, so widened, holds a level that chance exceeds once in 10,000; and below which it is
# widened further. By Student's t, the margin is about inverse to their number.
RANGE_WINDOWS, FEW_RANGE_WINDOWS = 40, 20
_TESTED = 6  # piles at both ends, outside, spikes, louder, calmer


class FaultLimits(msgspec.Struct, frozen=True, eq=False):
    """Largest symptoms (F,) that are no fault; 0 where none showed. A site's `misfit` is that of its own fields."""

    pile: Float64s  # (F, 2) share of rows at the lowest and highest value
    outside: Float64s  # share of rows
    spikes: Float64s  # share of rows
    loud: Float64s  # logarithm of the spread against the reference's
    calm: Float64s  # its negative
    misfit: Float64s

    @classmethod
    def none(cls, fields: int) -> FaultLimits:
        zero = np.zeros(fields)
        return cls(np.zeros((fields, 2)), zero, zero, zero, zero, zero)

    @classmethod
    def learn(cls, symptoms: Float64s, sd: Float64s, misfit: Float64s) -> FaultLimits:
        """Learn from symptoms (K, F, SYMPTOMS) and `misfit` (K, F) of windows; `sd` (F,) is of the shipped rows."""
        known = (symptoms[..., SD] > 0) & (sd > 0)
        loud = np.where(known, np.log(np.where(known, symptoms[..., SD], 1.0) / np.where(sd > 0, sd, 1.0)), 0.0)
        return cls(
            extrapolate(symptoms[..., [PILE_LOW, PILE_HIGH]]),
            extrapolate(symptoms[..., OUTSIDE]),
            extrapolate(symptoms[..., SPIKES]),
            extrapolate(loud, windows=2),
            extrapolate(-loud, windows=2),
            extrapolate(misfit, windows=2),
        )

    def merge(self, shipped: FaultLimits) -> FaultLimits:
        """Return the limits of a site: what was no fault in the `shipped` reference's windows is none here, either."""
        parts = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(shipped), strict=True)
        return replace(FaultLimits(*(np.maximum(*both) for both in parts)), misfit=self.misfit)

    def is_valid(self, fields: int) -> bool:
        parts = msgspec.structs.astuple(self)
        return self.pile.shape == (fields, 2) and all(
            part.shape[0] == fields and bool(np.isfinite(part).all()) for part in parts
        )


def extrapolate(values: Float64s, windows: int = 1) -> Float64s:
    """Return the level that chance exceeds as seldom as the budget of faults says, learned from K windows (K, F, …).

    An alert needs `windows` consecutive windows.
    """
    level = (false_alarm_budget.FAULT_BUDGET / (_TESTED * values.shape[1])) ** (1 / windows)
    count = len(values)
    tail = max(int(TAIL_SHARE * count), 2)
    ordered = np.sort(values, axis=0)
    threshold = ordered[-tail - 1] if count > tail else ordered[0]
    excess = np.maximum(ordered[-tail:] - threshold, 0.0).mean(0)
    # The mean of few excesses is uncertain: two standard errors to the safe side for a single window.
    reach = excess * (1 + 2 / windows / math.sqrt(tail)) * max(math.log(tail / count / level), 1.0)
    return np.asarray(np.where(excess > 0, threshold + reach, np.maximum(threshold, 0.0)))


def compute_reach(independent: Float64s) -> Float64s:
    """Return how far (F,) a field may wander beyond a reference's limits, in its spans; 0 for the usual margin.

    The learned windows are like their neighbors; `independent` (F,) windows would tell as much as they do.
    """
    margin = RANGE_MARGIN * RANGE_WINDOWS / np.maximum(independent, 1.0)
    return np.where(independent < FEW_RANGE_WINDOWS, margin, 0.0)


def compute_misfit(
    moments: GroupMoments,
    class_mean: Float64s,
    class_sd: Float64s,
    permutation: np.ndarray,
    *,
    mirrored: bool = False,
) -> Float64s:
    """Return minus the log likelihood (..., F) of each field's statistics as those of field `permutation` (F,).

    It is per model window and statistic, and about 0 where they fit the `class_mean` (..., C, D) and `class_sd` (C, D).
    """
    count = len(permutation)
    total = np.zeros((*moments.n.shape[:-2], count))
    for first in range(0, moments.n.shape[-1], count):
        mine, its = slice(first, first + count), first + permutation
        n, mean = moments.n[..., mine], moments.mean[..., mine] * (-1 if mirrored and first == 0 else 1)
        sd = class_sd[:, its]
        square = (moments.m2[..., mine] + n * (mean - class_mean[..., its]) ** 2) / sd**2
        total += (square - n + 2 * n * np.log(sd / class_sd[:, mine])).sum(-2) / np.maximum(n.sum(-2), 1)
    return np.asarray(total / 2 / (moments.n.shape[-1] // count))


def compute_own_misfit(moments: GroupMoments, class_mean: Float64s, class_sd: Float64s, fields: int) -> Float64s:
    """Return the same (W, F) of fields in their own places, of stacked moments (W, C, D)."""
    library, classes = kernel.kernel(), moments.n.shape[1]
    if library is None or not comparisons.sums_in_order(classes, fields):
        return compute_misfit(moments, class_mean, class_sd, np.arange(fields))
    each = comparisons.compute_misfit(library, moments.n, moments.mean, moments.m2, class_mean, class_sd)
    total = np.zeros((len(each), fields))
    for first in range(0, each.shape[1], fields):
        total += each[:, first : first + fields]
    return np.asarray(total / 2 / (each.shape[1] // fields))
