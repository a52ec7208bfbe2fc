"""Missing values of a reference: their usual share, how they cluster, and the limit of the chart that tests them.

Missing values seldom come alone: a radio drops rows in a burst, a station sleeps at night. The evidence of one value is
therefore divided by the dispersion, and the limit lies above what the chart reached over the learned windows in order.

Source: McCullagh & Nelder (1989), Generalized Linear Models, for dividing a log likelihood by the dispersion.
"""

from __future__ import annotations

import msgspec
import numpy as np
from msgspec.structs import replace

from outstation.foundation.arrays import Float64s, Ints
from outstation.ml.drift.numeric import false_alarm_budget

MIN_SHARE, MIN_RISE = 0.001, 0.02  # least usual share that is believed, and least share that is looked for
# The same before a site has learned: shipped rows may come from a better line.
SHIPPED_MIN_SHARE, SHIPPED_MIN_RISE = 0.01, 0.06
MAX_SHARE = 0.99
LEARNED_MARGIN = 1.5  # times what the learned windows reached


class MissingBaseline(msgspec.Struct, frozen=True, eq=False):
    """Usual `share` of rows without a value (F,), their `dispersion` over windows (F,), and the `limit` (F,)."""

    share: Float64s
    rise: Float64s  # share that is looked for
    dispersion: Float64s
    limit: Float64s

    @classmethod
    def from_windows(
        cls, missing: Float64s, rows: float, thinning: int, total: Ints, total_rows: int
    ) -> MissingBaseline:
        """Learn from the shares (K, F) of K windows of about `rows` rows, in order; one in `thinning` was kept.

        `total` (F,) values of `total_rows` rows were missing in all windows, kept or not.
        """
        share = np.clip((total + 0.5) / (total_rows + 1), MIN_SHARE, MAX_SHARE)
        spread = share * (1 - share) / max(rows, 1.0)
        variance = ((missing - total / max(total_rows, 1)) ** 2).sum(0) / max(len(missing) - 1, 1)
        # A cause that drops rows often drops them of all fields alike, and few fields show it in few windows.
        dispersion = np.maximum(1.0, np.maximum(variance / spread, variance.sum() / spread.sum()))
        baseline = _with_rise(share, dispersion, rows, MIN_RISE)
        reached, evidence = np.zeros_like(share), np.zeros_like(share)
        for window in missing:
            evidence = np.maximum(0.0, evidence + thinning * baseline.evidence(window * rows, rows))
            reached = np.maximum(reached, evidence)
        return replace(baseline, limit=np.maximum(baseline.limit, LEARNED_MARGIN * reached))

    @classmethod
    def from_totals(cls, missing: Ints, rows: Ints) -> MissingBaseline:
        """Return the baseline of a reference that knows only `missing` (F,) values of `rows` (F,)."""
        share = np.clip((missing + 0.5) / (rows + 1), MIN_SHARE, MAX_SHARE)
        return _with_rise(share, np.ones_like(share), 1.0, MIN_RISE)

    def merge(self, shipped: MissingBaseline) -> MissingBaseline:
        """Return a site's baseline that takes for usual what was usual in the `shipped` reference, too."""
        share = np.maximum(self.share, np.where(shipped.share > 2 * MIN_SHARE, shipped.share, 0.0))
        dispersion = np.maximum(self.dispersion, shipped.dispersion)
        return replace(_with_rise(share, dispersion, 1.0, MIN_RISE), limit=np.maximum(self.limit, shipped.limit))

    def before_learning(self) -> MissingBaseline:
        """Return the baseline for a site that has not learned: its line may be a little worse than the shipped one."""
        share = np.maximum(self.share, SHIPPED_MIN_SHARE)
        return replace(_with_rise(share, self.dispersion, 1.0, SHIPPED_MIN_RISE), limit=self.limit)

    def evidence(self, missing: Float64s | Ints, rows: float | Ints) -> Float64s:
        """Return the log likelihood ratio (..., F) of a risen share, from `missing` (..., F) of `rows` values."""
        absent = np.log(self.rise / self.share)
        present = np.log((1 - self.rise) / (1 - self.share))
        return np.asarray((missing * absent + (rows - missing) * present) / self.dispersion)

    def recovery(self, missing: Ints, rows: int, rate: Float64s) -> Float64s:
        """Return the log likelihood ratio (F,) of the usual share against this `rate` (F,)."""
        rate = np.maximum(rate, self.rise)
        absent, present = np.log(self.share / rate), np.log((1 - self.share) / (1 - rate))
        return np.asarray((missing * absent + (rows - missing) * present) / self.dispersion)

    def is_valid(self, fields: int) -> bool:
        parts = (self.share, self.rise, self.dispersion, self.limit)
        return all(part.shape == (fields,) and bool((part > 0).all()) for part in parts) and bool(
            (self.share < self.rise).all() and (self.rise < 1).all()
        )


def _with_rise(share: Float64s, dispersion: Float64s, rows: float, least: float) -> MissingBaseline:
    rise = np.minimum(np.maximum(2 * share, share + least), (1 + share) / 2)
    limit = _bernoulli_limit(share, rows, len(share))
    return MissingBaseline(share, rise, dispersion, limit)


def _bernoulli_limit(share: Float64s, rows: float, fields: int) -> Float64s:
    """Return the limits (F,) of Bernoulli CUSUMs, in log likelihood, in windows of `rows` rows.

    A sum leaves zero with a value that counts, which is a `share` (F,) of rows, and reaches h by chance in fewer than
    exp(-h) of such starts.
    """
    return np.maximum(
        np.log(share * rows * fields / false_alarm_budget.MISSING_BUDGET), false_alarm_budget.MIN_BERNOULLI_LIMIT
    )
