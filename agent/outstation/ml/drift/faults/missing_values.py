"""Missing values chart: a Bernoulli CUSUM of each field over the rows of consecutive drift windows.

Short windows gather evidence together, so a field that stops is reported after as many rows whatever a window's length.

Source: Reynolds & Stoumbos (1999), A CUSUM chart for monitoring a proportion when inspecting continuously, Journal of
Quality Technology 31.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Bools, Float64s, Ints, any_true
from outstation.ml.drift.baseline.missing_values import MissingBaseline

RECOVERY_LIMIT = math.log(10_000)  # log likelihood ratio of the usual share against that of the fault
MAX_RECOVERY_RATE = 0.1  # a field that was wholly empty has to show more than a few values
RECENT_ROWS = 50  # the share of about this number of rows is the fault's size


class MissingValues(msgspec.Struct, frozen=True, eq=False):
    """State of the charts (F,). `rows`, `missing` and `since` (epoch µs) begin where the evidence last left zero."""

    evidence: Float64s
    rows: Ints
    missing: Ints
    since: Ints
    recovery: Float64s  # evidence that the share is the usual one again, while an alarm is open
    recent_share: Float64s  # of about RECENT_ROWS rows
    alarm: Bools

    @classmethod
    def empty(cls, fields: int) -> MissingValues:
        zero, whole = np.zeros(fields), np.zeros(fields, np.int64)
        return cls(zero, whole, whole, whole, zero, zero, np.zeros(fields, np.bool_))

    @property
    def share(self) -> Float64s:
        """(F,) share of missing values since the evidence left zero."""
        return np.asarray(self.missing / np.maximum(self.rows, 1))

    @property
    def is_idle(self) -> bool:
        """True if windows without missing values change nothing."""
        return not (any_true(self.evidence) or any_true(self.alarm))

    def update(self, missing: Ints, rows: int, t: int, baseline: MissingBaseline) -> MissingValues:
        """Add a window of `rows` rows that began at `t`, with the count of missing values of each field (F,)."""
        if self.is_idle and not any_true(missing):
            return self
        evidence = np.maximum(0.0, self.evidence + baseline.evidence(missing, rows))
        going = (evidence > 0) | self.alarm
        weight, share = 1 - math.exp(-rows / RECENT_ROWS), missing / max(rows, 1)
        recent = np.where(self.rows > 0, self.recent_share + weight * (share - self.recent_share), share)
        now = replace(
            self,
            evidence=evidence,
            rows=np.where(going, self.rows + rows, 0),
            missing=np.where(going, self.missing + missing, 0),
            since=np.where(going, np.where(self.rows > 0, self.since, t), 0),
            recent_share=np.where(going, recent, 0.0),
        )
        rate = np.minimum(now.share, MAX_RECOVERY_RATE)
        recovery = np.where(self.alarm, np.maximum(0.0, self.recovery + baseline.recovery(missing, rows, rate)), 0.0)
        recovered = self.alarm & (recovery > RECOVERY_LIMIT)
        alarm = np.where(self.alarm, ~recovered, evidence > baseline.limit)
        # The rows gathered so far belong to the fault that ended.
        return replace(
            now,
            evidence=np.where(recovered, 0.0, evidence),
            rows=np.where(recovered, 0, now.rows),
            missing=np.where(recovered, 0, now.missing),
            recovery=np.where(alarm, recovery, 0.0),
            alarm=alarm,
        )

    def update_until_alarm(self, missing: Ints, rows: Ints, t: Ints, baseline: MissingBaseline) -> list[MissingValues]:
        """Return the state after each window, of `missing` (W, F) and `rows` (W,), up to the first alarm.

        That one is left out unless it is the first.
        """
        states: list[MissingValues] = []
        now = self
        for window, count, begin in zip(missing, rows.tolist(), t.tolist(), strict=True):
            now = now.update(window, count, begin, baseline)
            if any_true(now.alarm):
                return states or [now]
            states.append(now)
        return states
